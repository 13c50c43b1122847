"""The files of docs/team: valid by the tools' own schemas, everywhere the same, and a gateway that works."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import kubernetes_validate
import pytest
import yaml
from support.completion_server import CompletionServer, serve
from support.tls import make_certificate

from fimserver.datatypes import FimContext, Hole, HoleKind, Sampling
from fimserver.engine.remote.address import parse_address
from fimserver.engine.remote.connection import Connection
from fimserver.engine.remote.engine import RemoteEngine
from fimserver.engine.remote.servers.vllm import Vllm
from fimserver.errors import CompletionCancelledError, RemoteError

ROOT = Path(__file__).parent.parent
TEAM = ROOT / "fimserver" / "docs" / "team"
MODEL = "nvidia/diffusiongemma-26B-A4B-it-NVFP4"
KUBERNETES = "1.37"
RAY = os.environ.get("FIMSERVER_TEST_RAY", "")
CADDY, PROMTOOL = shutil.which("caddy"), shutil.which("promtool")
LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
CONTEXT = FimContext("def add(first, second):\n    return ", "\n\nprint(add(1, 2))\n", "/home/me/a.py", "python", LINE)


def read(name: str) -> Any:
    return yaml.safe_load((TEAM / name).read_text(encoding="utf-8"))


def read_all(name: str) -> list[Any]:
    return list(yaml.safe_load_all((TEAM / name).read_text(encoding="utf-8")))


def to_values(options: list[str]) -> dict[str, Any]:
    """Return command-line options of vLLM as its engine's arguments."""
    values: dict[str, Any] = {}
    for option in options:
        name, _, value = option.removeprefix("--").partition("=")
        values[name.replace("-", "_")] = yaml.safe_load(value) if value else True
    return values


# The schemas


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_is_valid(tmp_path: Path) -> None:
    found = check_compose(TEAM / "compose.yaml")
    assert found.returncode == 0, found.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((TEAM / "compose.yaml").read_text().replace("restart:", "restarts:"))
    assert check_compose(wrong).returncode == 1


@pytest.mark.parametrize("resource", read_all("kubernetes.yaml"), ids=lambda r: f"{r['kind']}-{r['metadata']['name']}")
def test_the_kubernetes_manifests_are_valid(resource: Any) -> None:
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**resource, "speck": {}}, KUBERNETES, strict=True)


def test_names_in_the_manifests_agree() -> None:
    """Schemas do not see that a selector selects nothing, or that a volume is not there."""
    resources = read_all("kubernetes.yaml")
    deployments = {r["metadata"]["name"]: r["spec"] for r in resources if r["kind"] == "Deployment"}
    claims = {r["metadata"]["name"] for r in resources if r["kind"] == "PersistentVolumeClaim"}
    for spec in deployments.values():
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        pod = spec["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == volumes.keys()
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
        } <= claims
    for resource in resources:
        spec = resource.get("spec", {})
        if resource["kind"] == "Service":
            pod = deployments[spec["selector"]["app"]]["template"]["spec"]
            ports = {port["name"] for container in pod["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        if resource["kind"] == "HorizontalPodAutoscaler":
            assert spec["scaleTargetRef"]["name"] in deployments
            assert "replicas" not in deployments["vllm"], "the autoscaler decides"
            (metric,) = spec["metrics"]
            (rule,) = read("adapter.yaml")["rules"]["custom"]
            assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
        if resource["kind"] != "Namespace":
            assert resource["metadata"]["namespace"] == "fimserver"


def test_every_file_starts_the_model_with_the_same_options() -> None:
    compose = read("compose.yaml")["services"]
    deployment = next(r for r in read_all("kubernetes.yaml") if r["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    expected = to_values(compose["diffusiongemma"]["command"])
    assert expected["model"] == MODEL
    assert expected["diffusion_config"] == {"canvas_length": 64}
    assert to_values(container["args"]) == expected
    assert container["image"] == compose["diffusiongemma"]["image"]
    qwen = to_values(compose["qwen"]["command"])
    ours = read("ray.yaml")["applications"][0]["args"]["llm_configs"]
    for config, values in zip(ours, (expected, qwen), strict=True):
        model = config["model_loading_config"]["model_id"]
        assert {"model": model, **config["engine_kwargs"]} == values


VERIFY = """
import json, sys
from ray.serve.llm import LLMServingArgs
from ray.serve.schema import ServeDeploySchema
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

given = json.loads(sys.stdin.read())
application = ServeDeploySchema.model_validate(given["ray"]).applications[0]
for config in LLMServingArgs.model_validate(application.args).llm_configs:
    print(config.get_engine_config().hf_model_id)
    print(AsyncEngineArgs(model=".", **config.engine_kwargs).max_model_len)
for options in given["options"]:
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    print(parsed.max_num_seqs, parsed.diffusion_config)
"""


@pytest.mark.skipif(not RAY, reason="FIMSERVER_TEST_RAY is not a Python with ray[serve,llm] and vllm")
def test_ray_and_vllm_read_their_files() -> None:
    """By Ray Serve's and vLLM's own classes."""
    services = read("compose.yaml")["services"]
    options = [services[name]["command"] for name in ("diffusiongemma", "qwen")]
    given = json.dumps({"ray": read("ray.yaml"), "options": options})
    found = subprocess.run([RAY, "-c", VERIFY], input=given, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert f"{MODEL}\n16384" in found.stdout
    assert "16 {'canvas_length': 64}" in found.stdout


# The alerts


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm:\w+|http_requests_total)", expression))


def test_metrics_are_those_that_the_server_has() -> None:
    """The list is what vLLM 0.32's /metrics gave while it served a diffusion model."""
    known = set((ROOT / "tests" / "data" / "vllm" / "metrics.txt").read_text(encoding="utf-8").split())
    used = {
        name for group in read("alerts.yml")["groups"] for rule in group["rules"] for name in names_in(rule["expr"])
    }
    for rule in read("adapter.yaml")["rules"]["custom"]:
        used |= names_in(rule["seriesQuery"]) | names_in(rule["metricsQuery"])
    assert len(used) >= 6
    assert used <= known, used - known


ALERT_TESTS = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'vllm:num_requests_running{instance="a"}', values: '1x60'}
      - {series: 'vllm:num_requests_waiting{instance="a"}', values: '0x20 3x40'}
      - {series: 'vllm:e2e_request_latency_seconds_bucket{le="0.5"}', values: '0+90x60'}
      - {series: 'vllm:e2e_request_latency_seconds_bucket{le="1.0"}', values: '0+100x60'}
      - {series: 'vllm:e2e_request_latency_seconds_bucket{le="+Inf"}', values: '0+100x60'}
      - {series: 'vllm:prefix_cache_queries_total', values: '0+60000x60'}
      - {series: 'vllm:prefix_cache_hits_total', values: '0+50000x60'}
      - {series: 'http_requests_total{handler="/v1/completions",status="2xx"}', values: '0+100x60'}
      - {series: 'http_requests_total{handler="/v1/completions",status="5xx"}', values: '0+5x60'}
    alert_rule_test:
      - {eval_time: 15m, alertname: RequestsWait, exp_alerts: []}
      - eval_time: 30m
        alertname: RequestsWait
        exp_alerts:
          - exp_labels: {severity: ticket}
            exp_annotations: {summary: Requests wait for a slot on every GPU.}
      - {eval_time: 30m, alertname: NoServer, exp_alerts: []}
      - {eval_time: 50m, alertname: CacheMisses, exp_alerts: []}
      - eval_time: 30m
        alertname: SlowAnswers
        exp_alerts:
          - exp_labels: {severity: ticket}
            exp_annotations: {summary: "5 of 100 answers take longer than 0.5 s: add GPUs (fimserver bench capacity)."}
      - eval_time: 30m
        alertname: ServerErrors
        exp_alerts:
          - exp_labels: {severity: page}
            exp_annotations: {summary: More than 1 of 100 requests fails.}
  - interval: 1m
    input_series:
      - {series: 'vllm:num_requests_running{instance="a"}', values: '1x5 _x20'}
    alert_rule_test:
      - {eval_time: 5m, alertname: NoServer, exp_alerts: []}
      - eval_time: 14m
        alertname: NoServer
        exp_alerts:
          - exp_labels: {severity: page}
            exp_annotations: {summary: "No vLLM server answers; editors use their own engines."}
"""


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    shutil.copy(TEAM / "alerts.yml", tmp_path)
    shutil.copy(TEAM / "prometheus.yml", tmp_path)
    (tmp_path / "tests.yml").write_text(ALERT_TESTS)
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "tests.yml"]):
        found = subprocess.run([PROMTOOL, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr


# The gateway


class Gateway:
    """Caddy with the files of docs/team in front of servers of completions."""

    def __init__(self, servers: list[CompletionServer], folder: Path) -> None:
        self.server = servers[0]
        upstreams = folder / "upstreams"
        addresses = " ".join(f"127.0.0.1:{server.port}" for server in servers)
        listed = (TEAM / "upstreams.list").read_text(encoding="utf-8")
        upstreams.write_text(listed.replace("gpu-0:8000", addresses))
        assert addresses in upstreams.read_text()
        self.certificate = make_certificate(folder)
        self.keys = folder / "keys"
        self.keys.write_text('"Bearer alice-key" alice\n"Bearer bob-key" bob\n')
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"https://127.0.0.1:{port}"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "SITE": self.url,
            "TLS": f"{self.certificate} {self.certificate}",
            "UPSTREAMS": str(upstreams),
            "KEYS": str(self.keys),
        }
        assert CADDY is not None
        self.process = subprocess.Popen(
            [CADDY, "run", "--config", str(TEAM / "Caddyfile"), "--adapter", "caddyfile"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    pytest.fail(self.process.communicate()[1])
                time.sleep(0.05)

    def ask(self, path: str, key: str = "alice-key", method: str = "GET", **options: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.request(method, self.url + path, headers=headers, verify=False, timeout=10, **options)

    def engine(self, key: str) -> RemoteEngine:
        address = parse_address(self.url)
        return RemoteEngine(Vllm(), address.origin, lambda: Connection(address, key, 5.0))

    def close(self) -> str:
        self.process.terminate()
        _, log = self.process.communicate(timeout=20)
        return log


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    if CADDY is None:
        pytest.skip("caddy is not installed")
    with serve(models=("qwen2.5-coder-7b",)) as server:
        found = Gateway([server], tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(found.certificate))
        try:
            yield found
        finally:
            log = found.close()
        assert "first" not in log, "no code in the gateway's log"
        assert "alice-key" not in log


@pytest.mark.skipif(CADDY is None, reason="caddy is not installed")
@pytest.mark.parametrize("name", ["upstreams.list", "upstreams.name"])
def test_the_gateway_reads_both_lists_of_servers(name: str) -> None:
    assert CADDY is not None
    values = {"SITE": "https://:8443", "TLS": "internal", "KEYS": str(TEAM / "keys.example")}
    environment = {"PATH": os.environ["PATH"], "UPSTREAMS": str(TEAM / name), **values}
    command = [CADDY, "adapt", "--config", str(TEAM / "Caddyfile"), "--adapter", "caddyfile"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert ("gpu-0:8000" in found.stdout) == (name == "upstreams.list")


@pytest.mark.skipif(CADDY is None, reason="caddy is not installed")
def test_a_user_stays_on_one_server_as_long_as_it_answers(tmp_path: Path) -> None:
    with serve(models=("a",)) as first, serve(models=("b",)) as second:
        gateway = Gateway([first, second], tmp_path)
        try:

            def answering() -> str:
                response = gateway.ask("/v1/models")
                assert response.status_code == 200
                return str(response.json()["data"][0]["id"])

            chosen = answering()
            assert {answering() for _ in range(8)} == {chosen}
            (first if chosen == "a" else second).fault = "unhealthy"
            deadline = time.monotonic() + 20
            while answering() == chosen:
                assert time.monotonic() < deadline, "a server that is not healthy still gets requests"
                time.sleep(0.1)
        finally:
            gateway.close()


def test_the_gateway_lets_in_those_with_a_key(gateway: Gateway) -> None:
    for key in ("", "other", "alice"):
        assert gateway.ask("/v1/models", key=key).status_code == 401
    assert gateway.ask("/v1/models").status_code == 200
    for path in ("/metrics", "/health", "/v1/load_lora_adapter", "/"):
        assert gateway.ask(path).status_code == 404, "nothing else is reached from outside"
    refused = gateway.ask("/v1/completions", method="POST", content=b"x" * 2_000_000)
    assert refused.status_code >= 400
    seen = [asked.headers for asked in gateway.server.asked]
    assert {headers["x-user"] for headers in seen} == {"alice"}
    assert all("authorization" not in headers for headers in seen), "keys stay at the gateway"
    forged = httpx2.get(
        f"{gateway.url}/v1/models",
        headers={"Authorization": "Bearer bob-key", "X-User": "alice"},
        verify=False,
    )
    assert forged.status_code == 200
    assert gateway.server.asked[-1].headers["x-user"] == "bob"


def test_completions_and_cancels_pass_the_gateway(gateway: Gateway) -> None:
    engine = gateway.engine("alice-key")
    assert engine.complete(CONTEXT, Sampling()).text == "first + second"
    gateway.server.pieces, gateway.server.pause_s = tuple(" x" for _ in range(1000)), 0.02
    begin = time.monotonic()
    cancelled = False

    def on_partial(_partial: object) -> None:
        nonlocal cancelled
        cancelled = True

    with pytest.raises(CompletionCancelledError):
        engine.complete(CONTEXT, Sampling(), cancelled=lambda: cancelled, on_partial=on_partial)
    while gateway.server.num_closed == 0:
        assert time.monotonic() - begin < 5, "a cancelled request continues on the server"
        time.sleep(0.01)
    engine.close()
    stranger = gateway.engine("other")
    with pytest.raises(RemoteError, match="apiKey"):
        stranger.complete(CONTEXT, Sampling())
    stranger.close()
