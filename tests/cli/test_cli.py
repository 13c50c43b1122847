"""The command line as a user types it."""

import json
import re
from pathlib import Path

import pytest
from support.command import run

import fimserver
from fimserver.context.scan import python_parses

SAMPLE = Path(fimserver.__file__).parent / "samples" / "inventory.py"
ROOT = Path(__file__).parents[2]


def readme_target() -> str:
    match = re.search(
        r"fimserver complete \S*(inventory\.py:\d+:\d+)", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert match, "README.md completes the sample file"
    return match[1]


def test_the_readme_completes_the_sample() -> None:
    result = run("complete", SAMPLE.parent / readme_target())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.slow("starts commands that load a model")
def test_json_has_everything_and_nothing_else_is_on_stdout() -> None:
    result = run("complete", SAMPLE.parent / readme_target(), "--json")
    values = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    keys = {"text", "range", "hole", "reason", "mode", "denoising_steps", "forward_passes", "timings_ms", "model"}
    assert keys <= values.keys()
    assert values["reason"] is None
    assert values["range"]["start"] == values["range"]["end"]
    assert {"startup", "total", "model", "encode", "decode"} <= values["timings_ms"].keys()
    assert values["timings_ms"]["total"] < 2000
    assert values["model"]["name"] == "tiny"
    assert 0 < values["confidence"] <= 1
    line, column = map(int, readme_target().split(":")[1:])
    assert values["range"]["start"] == {"line": line, "column": column}


def test_nothing_to_complete_is_exit_1_with_a_reason() -> None:
    result = run("complete", "-:1:5", "--path", "a.py", "--json", stdin="# comment\n")
    assert result.returncode == 1
    values = json.loads(result.stdout)
    assert values["text"] is None
    assert values["reason"] == "in_comment"
    assert "fimserver.comments" in result.stderr
    assert "total" in values["timings_ms"]


def test_a_setting_can_be_given() -> None:
    result = run("complete", "-:1:6", "--path", "a.py", "--set", "comments=true", "--json", stdin="# the \n")
    assert json.loads(result.stdout)["hole"]["kind"] == "comment"


@pytest.mark.slow("starts commands that load a model")
def test_an_unsure_answer_is_refused() -> None:
    result = run("complete", SAMPLE.parent / readme_target(), "--set", "minConfidence=1", "--json")
    values = json.loads(result.stdout)
    assert result.returncode == 1
    assert values["reason"] == "low_confidence"
    assert values["confidence"] < 1
    assert "fimserver.minConfidence" in result.stderr


@pytest.mark.slow("starts commands that load a model")
def test_standard_input_and_characters_not_bytes() -> None:
    result = run("complete", "-:1:15", "--path", "a.py", "--json", stdin="x = '\U0001f40d\u00e9' + nam\nname = 1\n")
    values = json.loads(result.stdout)
    assert values["hole"]["kind"] == "rest_of_line"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complete"], "FILE:LINE:COL"),
        (["complete", "a.py"], "FILE:LINE:COL"),
        (["complete", "a.py:x:1"], "FILE:LINE:COL"),
        (["complete", "/no/such.py:1:1"], "cannot be read"),
        (["complete", f"{SAMPLE}:9999:1"], "has lines 1 to"),
        (["complete", f"{SAMPLE}:1:999"], "has columns 1 to"),
        (["complete", f"{SAMPLE}:0:1"], "has lines 1 to"),
        (["complete", f"{SAMPLE}:1:1", "--mode", "loud"], "loud"),
        (["complete", f"{SAMPLE}:1:1", "--device", "gpu"], "fimserver.device"),
        (["complete", f"{SAMPLE}:1:1", "--set", "maxLines=0"], "1 to 200"),
        (["complete", f"{SAMPLE}:1:1", "--set", "maxLines"], "NAME=VALUE"),
        (["complete", f"{SAMPLE}:1:1", "--set", "no=1"], "not a setting"),
        (["lsp", "--device", "gpu"], "fimserver.device"),
        (["eval", "infilling"], "--data"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_use_is_exit_2_with_a_remedy(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_invalid_utf8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes(b"x = '\xe9'\n")
    result = run("complete", f"{path}:1:1")
    assert result.returncode == 2
    assert "not UTF-8" in result.stderr


@pytest.mark.slow("starts commands that load a model")
def test_a_bad_model_is_exit_1_with_the_reason() -> None:
    result = run("complete", SAMPLE.parent / readme_target(), "--model", "/no/such", "--json")
    assert result.returncode == 1
    values = json.loads(result.stdout)
    assert values["reason"] == "engine"
    assert "total" in values["timings_ms"]
    assert "/no/such" in result.stderr


@pytest.mark.slow("starts commands that load a model")
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_trace_shows_every_step(mode: str) -> None:
    result = run("complete", SAMPLE.parent / readme_target(), "--trace", "--mode", mode)
    for heading in ("hole", "context", "prompt", "timings, ms", "<mid>", "confidence"):
        assert heading in result.stdout
    assert ("canvas after every step" in result.stdout) == (mode == "diffusion")
    quiet = run("complete", SAMPLE.parent / readme_target(), "--trace", "--json", "--mode", mode)
    json.loads(quiet.stdout)
    assert "timings, ms" in quiet.stderr


def test_version() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert fimserver.__version__ in result.stdout


@pytest.mark.slow("starts commands that load a model")
def test_doctor_finds_no_problem_here() -> None:
    result = run("doctor", "--device", "cpu")
    assert result.returncode == 0, result.stdout
    assert "FAIL" not in result.stdout
    for word in ("python", "packages", "memory", "grammars", "answered initialize in", "probe answered"):
        assert word in result.stdout


@pytest.mark.slow("starts commands that load a model")
def test_doctor_names_what_an_editor_would_use(tmp_path: Path) -> None:
    home = tmp_path / "home"
    env = {"FIMSERVER_HOME": str(home), "HTTPS_PROXY": "http://me:secret@proxy", "PATH": "/usr/bin:/bin"}
    env |= {"HF_TOKEN": "hf_secret", "FIMSERVER_SOME_KEY": "secret"}
    result = run("doctor", "--set", "maxLines=4", env=env)
    assert result.returncode == 0, result.stdout
    lines = {line.split()[1]: line for line in result.stdout.splitlines() if line.startswith("ok")}
    assert "not on PATH; editors have to be given /" in lines["program"]
    assert f"FIMSERVER_HOME={home}" in lines["environment"]
    for name in ("HTTPS_PROXY", "HF_TOKEN", "FIMSERVER_SOME_KEY"):
        assert f"{name} (set)" in lines["environment"]
    assert "secret" not in result.stdout
    assert "maxLines = 4" in lines["settings"]
    assert str(home / "runtime") in lines["folders"]
    run("daemon", "stop", env=env)


@pytest.mark.slow("starts commands that load a model")
def test_doctor_finds_folders_that_cannot_be_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "state").write_text("a file in its place")
    result = run("doctor", env={"FIMSERVER_HOME": str(home)})
    assert result.returncode == 1
    assert f"FAIL folders     {home / 'state'} cannot be written" in result.stdout
    assert "set FIMSERVER_HOME" in result.stdout
    run("daemon", "stop", env={"FIMSERVER_HOME": str(home)})


@pytest.mark.slow("starts commands that load a model")
def test_doctor_explains_fixes() -> None:
    result = run("doctor", "--model", "/no/such")
    assert result.returncode == 1
    assert "FAIL model" in result.stdout
    assert "set fimserver.model" in result.stdout


def test_python_parses() -> None:
    assert python_parses("x = '\\d'")
    assert not python_parses("x = (")


@pytest.mark.slow("starts commands that load a model")
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_eval_lines_shows_what_an_editor_gets(mode: str) -> None:
    """Cut lines of the standard library: at least half are answered, in time, and no offer breaks a file."""
    result = run("eval", "lines", "--limit", "24", "--mode", mode, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["answered"] >= 0.5
    assert values["broken"] == 0
    assert values["ms_p50"] < 2000
    assert values["mode"] == mode
    assert sum(values["refusals"].values()) == round(24 * (1 - values["answered"]))


@pytest.mark.slow("starts commands that load a model")
def test_bench_keystroke_measures_the_server_and_the_cache() -> None:
    result = run("bench", "keystroke", "--limit", "60", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["keystrokes"] == 60
    assert sum(values["sources"].values()) == 60
    assert 0 < values["asked"] <= 60
    assert values["lines"] == 10_000
    assert 0 < values["server_ms_p50"] < 25
    assert 0 < values["reencoded_tokens_per_character_p50"] <= 8
    assert values["model_ms_p50"] > values["server_ms_p50"]


@pytest.mark.slow("starts commands that load a model")
def test_bench_keystroke_with_a_bad_model_is_exit_1() -> None:
    result = run("bench", "keystroke", "--model", "/nowhere")
    assert result.returncode == 1
    assert "/nowhere" in result.stderr


@pytest.mark.slow("starts commands that load a model")
def test_a_sure_match_needs_no_model(tmp_path: Path) -> None:
    line = "connection.execute_script(first_argument, second_argument)"
    file = tmp_path / "a.js"
    file.write_text(f"{line};\nother();\nconnection.execute_script(first_argument, \n")
    result = run("complete", f"{file}:3:43", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["text"], values["source"], values["model"]) == ("second_argument);", "match", None)
    traced = run("complete", f"{file}:3:43", "--trace")
    assert "second_argument);" in traced.stdout
    assert "canvas" in traced.stdout or "answer" in traced.stdout


@pytest.mark.slow("starts commands that load a model")
def test_matches_can_be_left_out_of_an_evaluation() -> None:
    result = run("eval", "lines", "--limit", "12", "--no-matches", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["matched"] == 0
