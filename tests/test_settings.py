"""The table of settings, its checks and sources, and that its copies agree."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fimserver
from fimserver import paths
from fimserver.datatypes import Mode
from fimserver.engine.client import EngineOptions
from fimserver.errors import SettingsError
from fimserver.lsp.configuration import Configuration, Source
from fimserver.settings import (
    AUTOMATIC_CONFIDENCE,
    BY_WIRE_NAME,
    ENGINE_SETTINGS,
    Settings,
    parse_settings,
    read_config_file,
    read_settings,
    refuse_unsure,
    to_markdown,
    to_sampling,
    to_wire_value,
)

DOCS = Path(fimserver.__file__).parent / "docs"


def test_the_settings_of_vscode_are_up_to_date() -> None:
    script = DOCS.parents[1] / "editors" / "vscode" / "scripts" / "settings.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}; run {script}"


def test_the_documented_table_is_up_to_date() -> None:
    """Write it again with: python -m fimserver.settings."""
    assert to_markdown() in (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")


def test_the_documented_config_file_is_valid(tmp_path: Path) -> None:
    text = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    example = text.split("```toml\n", 1)[1].split("```", 1)[0]
    (tmp_path / "config.toml").write_text(example)
    assert read_config_file(tmp_path / "config.toml") == (tomllib.loads(example), [])


def test_no_settings_means_the_defaults() -> None:
    assert parse_settings({}) == Settings()


@pytest.mark.parametrize("wire_name", list(BY_WIRE_NAME))
def test_every_default_is_allowed(wire_name: str) -> None:
    assert parse_settings({wire_name: to_wire_value(BY_WIRE_NAME[wire_name].default)}) == Settings()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("maxLines", 0, ["maxLines", "0", "1 to 200"]),
        ("maxLines", True, ["maxLines", "True"]),
        ("maxLines", "8", ["maxLines", "'8'"]),
        ("maxLines", None, ["maxLines", "None"]),
        ("mode", "slow", ["mode", "'slow'", "auto | diffusion | speculative | verified | autoregressive"]),
        ("languages", {"python": 1}, ["languages", "'python': 1", "language ids"]),
        ("languages", {"": True}, ["languages", "language ids"]),
        ("languages", ["python"], ["languages", "['python']"]),
        ("languages", None, ["languages", "None"]),
        ("temperature", 2.1, ["temperature", "2.1", "number 0 to 2 or null"]),
        ("temperature", float("nan"), ["temperature", "nan"]),
        ("minConfidence", -0.1, ["minConfidence", "-0.1", "number 0 to 1"]),
        ("minConfidence", True, ["minConfidence", "True"]),
        ("contextTokens", 63, ["contextTokens", "64 to 262144 or null"]),
        ("contextTokens", 64.0, ["contextTokens", "64.0", "whole number"]),
        ("idleUnloadMinutes", 1441, ["idleUnloadMinutes", "number 0 to 1440"]),
        ("completionItems", True, ["completionItems", "auto | on | off"]),
        ("enabled", 1, ["enabled", "true | false"]),
        ("device", "gpu", ["device", "cuda:N"]),
        ("model", "", ["model", "text"]),
        ("seed", -1, ["seed", "or null"]),
        ("max_lines", 8, ["max_lines", "not a setting", "maxLines"]),
        ("logLevel", "loud", ["logLevel", "error | warning"]),
        ("engine", "cloud", ["engine", "'cloud'", "local | vllm"]),
        ("remote", "http://a", ["remote", "url, model, apiKey, timeoutMs"]),
        ("remote", {"uri": "x"}, ["remote.uri", "not a setting", "url, model"]),
        ("remote", {"url": "file:///etc/passwd"}, ["remote.url", "http://"]),
        ("remote", {"url": ["http://a"]}, ["remote.url", "http://"]),
        ("remote", {"timeoutMs": 1}, ["remote.timeoutMs", "50 to 60000"]),
        ("remote", {"apiKey": "sk-proj-1"}, ["remote.apiKey", "keyring:NAME"]),
        ("remote", {"apiKey": "abcdef0123"}, ["remote.apiKey", "NAME_OF_A_VARIABLE"]),
    ],
)
def test_a_bad_value_names_key_value_and_range(key: str, value: object, words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings({key: value})
    assert all(word in str(error.value) for word in words), error.value


def test_a_key_in_the_settings_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings({"remote": {"apiKey": "sk-proj-1234"}})
    assert "sk-proj" not in str(error.value)


def test_one_bad_value_leaves_the_others() -> None:
    settings, problems = read_settings({"maxLines": 3, "mode": "loud", "seed": None, "device": "cuda:1"})
    assert (settings.max_lines, settings.mode, settings.device) == (3, "auto", "cuda:1")
    assert len(problems) == 1


def test_engine_settings_match_the_engines_arguments() -> None:
    own = ("model", "device", "threads", "contextTokens", "fp4Activations", "cudaGraphs", "idleUnloadMinutes")
    assert list(ENGINE_SETTINGS) == ["engine", "remote", "fallback", *own]
    values = {"model": "m", "device": "cpu", "threads": 3, "contextTokens": 64, "fp4Activations": True}
    settings = parse_settings({**values, "idleUnloadMinutes": 0.5})
    options = EngineOptions().under(settings)
    assert options == EngineOptions("m", "cpu", 3, 64, fp4_activations=True, idle_unload_minutes=0.5)
    shown = {"model": "m", "device": "cpu", "threads": 3, "context_tokens": 64, "fp4_activations": True}
    shown["cuda_graphs"] = "auto"
    assert options.arguments == shown
    server = {"engine": "vllm", "remote": {"url": "http://a:1", "timeoutMs": 100}, "fallback": "none"}
    options = EngineOptions().under(parse_settings({**values, **server}))
    remote = {"url": "http://a:1", "model": "", "api_key": "", "timeout_ms": 100}
    assert options.arguments == {**shown, "engine": "vllm", "remote": remote, "fallback": "none", "agreed": ""}
    assert EngineOptions.from_arguments(options.arguments).arguments == options.arguments


@pytest.mark.parametrize(
    ("languages", "language", "allowed"),
    [
        ({}, "python", True),
        ({"python": False}, "python", False),
        ({"python": False}, "lua", True),
        ({"*": False}, "lua", False),
        ({"*": False, "python": True}, "python", True),
        ({"*": True, "python": False}, "python", False),
    ],
)
def test_languages(languages: dict[str, bool], language: str, *, allowed: bool) -> None:
    settings = parse_settings({"languages": languages})
    assert settings.allows(language) is allowed
    assert settings == parse_settings({"languages": dict(reversed(languages.items()))})
    assert hash(settings)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("auto", Mode.AUTO),
        ("verified", Mode.SPECULATIVE),
        ("speculative", Mode.SPECULATIVE),
        ("diffusion", Mode.DIFFUSION),
        ("autoregressive", Mode.AUTOREGRESSIVE),
    ],
)
def test_modes(name: str, mode: Mode) -> None:
    sampling = to_sampling(parse_settings({"mode": name, "temperature": 1}), min_tokens=0)
    assert sampling.mode is mode
    assert sampling.temperature == 1.0


def test_unsure_answers_are_refused_with_both_numbers() -> None:
    assert refuse_unsure(0.5, Settings(), invoked=True) is None
    assert refuse_unsure(0.01, Settings(), invoked=True) is None, "what the user asks for is answered"
    assert refuse_unsure(AUTOMATIC_CONFIDENCE, Settings(), invoked=False) is None
    assert refuse_unsure(AUTOMATIC_CONFIDENCE - 0.01, Settings(), invoked=False) is not None
    assert refuse_unsure(0.5, parse_settings({"minConfidence": 0.5}), invoked=True) is None
    refusal = refuse_unsure(0.5, parse_settings({"minConfidence": 0.75}), invoked=True)
    assert refusal is not None
    assert refusal.reason == "low_confidence"
    assert "0.50" in refusal.detail
    assert "0.75" in refusal.detail


# config.toml and the other sources


def test_a_missing_config_file_is_fine(tmp_path: Path) -> None:
    assert read_config_file(tmp_path / "config.toml") == ({}, [])


@pytest.mark.parametrize(
    ("content", "values", "words"),
    [
        (b"maxLines = 3\nlanguages = { lua = false }\n", {"maxLines": 3, "languages": {"lua": False}}, []),
        (b"\xef\xbb\xbfmaxLines = 3\n", {"maxLines": 3}, []),
        (b"maxLines = \n", {}, ["not TOML", "line 1"]),
        (b"maxLines = 3\nmodel = '\xe9'\n", {}, ["not UTF-8", "byte 22"]),
        (b"maxLines = 0\nseed = 3\n", {"seed": 3}, ["fimserver.maxLines is 0", "1 to 200"]),
        (b"max_lines = 8\nseed = 3\n", {"seed": 3}, ["max_lines is not a setting"]),
        (b"[fimserver]\nseed = 3\n", {}, ["fimserver.fimserver is not a setting"]),
        (b"mode = 2020-01-01\n", {}, ["fimserver.mode"]),
        (b"a = " + b"[" * 20_000, {}, ["not TOML"]),
    ],
)
def test_config_file(tmp_path: Path, content: bytes, values: dict[str, object], words: list[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    good, problems = read_config_file(path)
    assert good == values
    assert len(problems) == bool(words)
    for word in words:
        assert word in problems[0]
        assert str(path) in problems[0]


def test_an_unreadable_config_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    values, (problem,) = read_config_file(tmp_path / "config.toml")
    assert values == {}
    assert "cannot be read" in problem


def test_each_source_wins_over_the_earlier_ones() -> None:
    changes: list[None] = []
    configuration = Configuration(on_change=lambda: changes.append(None))
    assert configuration.set_layer(Source.CONFIG_FILE, {"maxLines": 1, "seed": 1, "threads": 1, "comments": True}) == []
    assert configuration.initialize({"fimserver": {"maxLines": 2, "seed": 2, "threads": 2}}) == []
    assert configuration.configure({"maxLines": 3, "seed": 3, "model": None}, Source.WORKSPACE) == []
    assert configuration.configure({"fimserver": {"maxLines": 4, "threads": None}}, Source.CHANGE) == []
    settings = configuration.settings
    assert (settings.max_lines, settings.seed, settings.threads, settings.comments) == (4, 3, 2, True)
    configuration.set_layer(Source.COMMAND_LINE, {"maxLines": 5})
    assert configuration.settings.max_lines == 5
    configuration.set_layer(Source.COMMAND_LINE, {})
    changes.clear()
    configuration.configure({"fimserver": None}, Source.CHANGE)
    assert configuration.settings.max_lines == 3
    assert len(changes) == 1
    configuration.configure({"fimserver": None}, Source.CHANGE)
    assert len(changes) == 1
    configuration.configure({}, Source.WORKSPACE)
    assert configuration.settings.max_lines == 2
    configuration.initialize({"maxLines": 6})
    assert configuration.settings.max_lines == 6


@pytest.mark.parametrize("options", [None, [], 3, {}])
def test_no_initialization_options(options: object) -> None:
    configuration = Configuration()
    assert configuration.initialize(options) == []
    assert configuration.settings == Settings()


def test_a_section_that_is_not_an_object_is_reported() -> None:
    configuration = Configuration()
    assert "not an object" in configuration.initialize({"fimserver": 3})[0]
    assert "not an object" in configuration.configure({"fimserver": []}, Source.CHANGE)[0]


def test_bad_values_fall_back_to_the_source_below() -> None:
    configuration = Configuration()
    configuration.set_layer(Source.CONFIG_FILE, {"maxLines": 3})
    (problem,) = configuration.initialize({"maxLines": 0})
    assert "fimserver.maxLines is 0" in problem
    assert configuration.settings.max_lines == 3


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = (
        paths.config_folder,
        paths.data_folder,
        paths.state_folder,
        paths.cache_folder,
        paths.runtime_folder,
    )
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path))
    assert [f() for f in folders] == [tmp_path / name for name in ("config", "data", "state", "cache", "runtime")]
    assert paths.config_file() == tmp_path / "config" / "config.toml"
    monkeypatch.delenv("FIMSERVER_HOME")
    for folder in folders:
        assert folder().is_absolute()
        assert "fimserver" in str(folder())


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", *arguments]
    environment = {**os.environ, "FIMSERVER_HOME": str(home)}
    return subprocess.run(
        command, input="# the \n", capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.slow("starts commands that load a model")
def test_commands_read_the_config_file_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "config" / "config.toml"
    file.parent.mkdir()
    place = ["complete", "-:1:7", "--path", "a.py", "--json", "--model", "/no/such"]
    assert '"in_comment"' in run(tmp_path, *place).stdout
    file.write_text("comments = true\nmaxLines = 0\n")
    result = run(tmp_path, *place)
    assert '"engine"' in result.stdout
    assert "fimserver.maxLines is 0" in result.stderr
    assert str(file) in result.stderr
    assert '"in_comment"' in run(tmp_path, *place, "--set", "comments=false").stdout
    doctor = run(tmp_path, "doctor", "--model", "/no/such")
    assert re.search(rf"FAIL config +{re.escape(str(file))}", doctor.stdout)
    assert "fimserver.maxLines is 0" in doctor.stdout
    assert doctor.stderr == ""
    file.unlink()
    assert re.search(r"ok +config .*\(absent\)", run(tmp_path, "doctor", "--model", "/no/such").stdout)
