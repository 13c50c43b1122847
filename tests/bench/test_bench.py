"""The benches report right values for known numbers, and they run."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fimserver.bench.datasets import LONG_TOKENS, draw_holes
from fimserver.bench.decode import (
    DecodeBench,
    EagerDecoder,
    EngineDecoder,
    GenerateDecoder,
    check_generation_config,
    is_compared,
    parse_decoders,
    settled_at,
)
from fimserver.bench.metrics import bootstrap_median, choose_ours, paired_ratios, pareto_front, percentile
from fimserver.bench.plots import PASSES_FILE, QUALITY_FILE, Point, check_plots, write_plots
from fimserver.bench.profiling import Span, list_parts, own_times, profile_requests
from fimserver.checkpoints.engine_limits import CHUNK_TOKENS
from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.datatypes import Mode, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.prompt import build_prompt
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.settings import Settings

TINY = SHIPPED_MODELS / "tiny"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_median_lies_in_its_interval_and_the_same_data_gives_the_same() -> None:
    values = [float(i) for i in range(1, 100)]
    interval = bootstrap_median(values)
    assert interval == bootstrap_median(values)
    assert (interval.median, interval.holes) == (50.0, 99)
    assert interval.low is not None
    assert interval.high is not None
    # a median's 95% interval by ranks: n/2 -+ 0.98 sqrt(n), which is 40 to 60 here
    assert interval.low == pytest.approx(40, abs=2)
    assert interval.high == pytest.approx(60, abs=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], (None, None, None, 0)), ([3.0], (3.0, 3.0, 3.0, 1)), ([2.0] * 9, (2.0, 2.0, 2.0, 9))],
)
def test_intervals_of_little(values: list[float], expected: tuple[float | None, ...]) -> None:
    interval = bootstrap_median(values)
    assert (interval.median, interval.low, interval.high, interval.holes) == expected


def test_ratios_are_of_the_holes_that_both_ran_on() -> None:
    assert paired_ratios({0: 6.0, 1: 8.0, 5: 1.0}, {1: 2.0, 0: 3.0, 7: 1.0}) == [2.0, 4.0]
    assert percentile([5.0, 1.0, 3.0], 0.95) == 3.0
    assert percentile(list(map(float, range(101))), 0.95) == 95.0


@pytest.mark.parametrize(
    ("modes", "mode", "qualifies"),
    [
        ({"autoregressive": (100, 0.30), "diffusion": (50, 0.30)}, "diffusion", True),
        ({"autoregressive": (100, 0.30), "diffusion": (50, 0.29)}, "diffusion", True),  # within a point
        ({"autoregressive": (100, 0.30), "diffusion": (50, 0.28)}, "diffusion", False),
        ({"autoregressive": (100, 0.30), "diffusion": (50, 0.28), "speculative": (80, 0.30)}, "speculative", True),
        ({"autoregressive": (100, 0.30), "diffusion": (50, 0.30), "speculative": (80, 0.30)}, "diffusion", True),
        ({"autoregressive": (10, 0.30), "diffusion": (50, 0.20), "speculative": (80, 0.20)}, "diffusion", False),
        ({"diffusion": (50, 0.30)}, "diffusion", False),
    ],
)
def test_the_fastest_good_mode_is_chosen(modes: dict[str, tuple[float, float]], mode: str, *, qualifies: bool) -> None:
    ours = choose_ours(modes, "autoregressive")
    assert ours is not None
    assert (ours.mode, ours.qualifies) == (mode, qualifies)
    assert ours.why


def test_autoregressive_is_never_chosen() -> None:
    assert choose_ours({"autoregressive": (100, 0.3)}, "autoregressive") is None


def test_pareto_front() -> None:
    assert pareto_front([(4, 0.3), (1, 0.1), (2, 0.1), (3, 0.3), (9, 0.5)]) == [1, 3, 4]


@pytest.mark.parametrize(
    ("drafts", "answer", "expected"),
    [
        ([(1.0, "a"), (2.0, "ab"), (3.0, "ab")], "ab", 2.0),
        ([(1.0, "ab"), (2.0, "ax"), (3.0, "ab")], "ab", 3.0),
        ([(1.0, "ab"), (2.0, "ab\nc")], "ab\ncd", 1.0),
        ([(1.0, "a")], "ab", 9.0),
        ([], "", 9.0),
    ],
)
def test_a_line_counts_when_it_stays(drafts: list[tuple[float, str]], answer: str, expected: float) -> None:
    assert settled_at(drafts, answer, 9.0) == expected


COMPLETE = {
    "eos_token_id": 1,
    "max_denoising_steps": 48,
    "sampler_config": SimpleNamespace(entropy_bound=0.1),
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


def test_a_complete_config_is_taken() -> None:
    values = check_generation_config(SimpleNamespace(**COMPLETE))
    assert values["entropy_bound"] == 0.1
    assert values["max_denoising_steps"] == 48


@pytest.mark.parametrize("key", list(COMPLETE))
def test_a_config_that_lacks_something_is_named(key: str) -> None:
    name = "entropy_bound" if key == "sampler_config" else key
    with pytest.raises(FimserverError, match=name):
        check_generation_config(SimpleNamespace(**{**COMPLETE, key: None}))


def test_a_third_of_the_holes_is_long(vocabulary: Vocabulary) -> None:
    holes = draw_holes(12, vocabulary, max_prompt_tokens=384, canvas_length=32)
    assert holes == draw_holes(12, vocabulary, max_prompt_tokens=384, canvas_length=32)
    assert sum(hole.num_tokens >= LONG_TOKENS for hole in holes) >= 4
    assert any(hole.is_long for i, hole in enumerate(holes) if is_compared(i))
    for hole in holes:
        whole = hole.filled(hole.middle)
        assert hole.context.prefix + hole.middle + hole.context.suffix in whole
        assert "\n" not in hole.middle
        assert hole.filled("abc" + hole.middle, taken_off=3)[hole.snapshot.cursor :].startswith(hole.middle)


@pytest.mark.parametrize("text", ["", "diffusion,fast", "autoregresive"])
def test_unknown_ways(text: str) -> None:
    with pytest.raises(FimserverError, match="--modes"):
        parse_decoders(text)


def test_ways() -> None:
    assert parse_decoders("speculative,speculative-no-grammar") == ("speculative", "speculative-no-grammar")
    assert parse_decoders("diffusion, generate") == ("diffusion", "generate")
    assert set(parse_decoders(None)) == {*Mode, "generate", "eager"}


def test_every_autoregressive_way_gives_the_same_text(tiny_engine: Engine) -> None:
    """transformers' modules, token by token, are the reference of our own mode: same text, same passes."""
    network = load_weights(TINY, dtype=torch.float32)
    holes = draw_holes(3, tiny_engine.vocabulary, max_prompt_tokens=384, canvas_length=32)
    eager, ours = (
        EagerDecoder(network, tiny_engine),
        EngineDecoder(tiny_engine, Sampling(Mode.AUTOREGRESSIVE, seed=0, without=("grammar",))),
    )
    for hole in holes:
        theirs, own = eager(hole.context), ours(hole.context)
        assert (theirs.text, theirs.tokens, theirs.finish) == (own.text, own.tokens, own.finish)
        prompt = build_prompt(hole.context, tiny_engine.vocabulary, tiny_engine.model.metadata).token_ids
        chunks = len(range(0, len(prompt) - CHUNK_TOKENS, CHUNK_TOKENS))  # of a long prompt, so that a cancel is seen
        assert theirs.passes == own.passes - chunks
        assert 0 < own.first_line_ms <= own.ms


@pytest.mark.slow("measures a model")
def test_generate_counts_its_passes_and_may_miss_the_cut_word(tiny_engine: Engine) -> None:
    generate = GenerateDecoder(load_weights(TINY, dtype=torch.float32), tiny_engine, 0)
    hole = draw_holes(1, tiny_engine.vocabulary, max_prompt_tokens=384, canvas_length=32)[0]
    outcome = generate(hole.context)
    assert outcome == replace(generate(hole.context), ms=outcome.ms, first_line_ms=outcome.first_line_ms)
    assert outcome.passes == outcome.steps + 1
    assert 1 <= outcome.steps <= 48
    assert (outcome.finish == "steps") is (outcome.steps == 48)
    word = replace(hole.context, prefix="qqxz = value_of_nothing(zqxv")
    missed = generate(word)
    assert missed.lacking == "zqxv"


@pytest.mark.slow("measures a model")
def test_the_summary_covers_every_measurement() -> None:
    threads = torch.get_num_threads()
    try:
        bench = DecodeBench(Settings(threads=1), limit=3, decoders=("autoregressive", "auto"))
        measured = bench.run()
    finally:
        torch.set_num_threads(threads)
    outcomes = measured.outcomes["autoregressive"]
    right = replace(outcomes[0], text=measured.cuts[0].middle + " ")
    assert measured.is_exact(0, right)
    assert measured.is_sound(0, right)
    assert not measured.is_exact(0, replace(right, lacking="x"))
    assert not measured.is_sound(0, replace(right, text="((("))
    comparison = bench.summarize(measured)
    numbers = comparison.modes["autoregressive"]
    assert numbers.passes_mean == statistics.fmean(o.passes for o in outcomes.values())
    assert numbers.ms_p50 == statistics.median(o.ms for o in outcomes.values())
    assert comparison.ours is None
    assert comparison.auto is not None
    assert comparison.auto["mode"] == "speculative"
    assert list(comparison.modes) == ["autoregressive"]


@pytest.mark.slow("measures a model")
def test_bench_decode_prints_what_it_documents(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("decode", "--limit", "2", "--threads", "1", "--json", "--plots", tmp_path / "plots")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    ours = {mode.value for mode in Mode} - {"auto"}
    assert values["modes"].keys() == ours | {"generate", "eager"}
    for numbers in values["modes"].values():
        assert numbers["holes"] == 2
        assert 0 < numbers["first_line_ms_p50"] <= numbers["ms_p50"]
        assert numbers["passes_mean"] >= 1
        assert numbers["batch"] == 1 or numbers["batch"] > 1
        for share in ("exact_match", "parse_ok", "unfinished"):
            assert 0 <= numbers[share] <= 1
    assert values["ratios"].keys() == {
        "generate_ms_over_ours",
        "autoregressive_ms_over_ours",
        "autoregressive_passes_over_ours",
    }
    for ratio in values["ratios"].values():
        assert ratio.keys() == {"median", "low", "high", "holes"}
    ratio = values["ratios"]["generate_ms_over_ours"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert values["ours"].keys() == {"mode", "qualifies", "why"}
    assert values["ours"]["mode"] in ours - {"autoregressive"}
    assert values["warm_over_cold"].keys() <= ours
    assert values["generate_config"]["max_denoising_steps"] == 48
    assert {"torch", "transformers", "python", "threads", "cpu", "dtype"} <= values["machine"].keys()
    for name in (QUALITY_FILE, PASSES_FILE):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow("measures a model")
def test_bench_decode_as_a_table() -> None:
    result = run("decode", "--limit", "1", "--threads", "1", "--modes", "diffusion,autoregressive")
    assert result.returncode == 0, result.stderr
    for word in ("diffusion", "autoregressive_ms_over_ours", "machine", "ours"):
        assert word in result.stdout
    assert "no hole was filled by both" in result.stdout


@pytest.mark.slow("measures a model")
def test_bench_decode_with_a_wrong_way_is_exit_1() -> None:
    result = run("decode", "--modes", "fast")
    assert result.returncode == 1
    assert "--modes fast" in result.stderr


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [Point("diffusion", 16.0, 0.2), Point("4", 4.0, 0.1, is_budget=True)]
    for path in write_plots(tmp_path, points, {"diffusion": [3, 4, 4], "generate": []}, num_holes=3):
        assert path.stat().st_size > 1000


def test_plots_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FimserverError, match=r"matplotlib>="):
        check_plots(tmp_path)


def test_the_own_time_of_a_range_excludes_inner_ranges() -> None:
    spans = [
        Span("fim::request", 0, 100),
        Span("fim::encode", 10, 60),
        Span("fim::attention", 20, 30),
        Span("fim::experts", 30, 50),
        Span("fim::sampling", 70, 80),
        Span("fim::request", 200, 240),
    ]
    own, calls = own_times(reversed(spans))
    assert own == {
        "fim::request": 80,
        "fim::encode": 20,
        "fim::attention": 10,
        "fim::experts": 20,
        "fim::sampling": 10,
    }
    assert calls["fim::request"] == 2


def test_parts_add_up_to_the_request() -> None:
    spans = [
        Span("fim::request", 0, 10_000),
        Span("fim::decode", 1000, 9000),
        Span("fim::attention", 2000, 3000),
        Span("fim::new_part", 3000, 4000),
    ]
    parts = {part.name: part for part in list_parts(spans, 1, 0.5)}
    assert sum(part.ms for part in parts.values()) == pytest.approx(10)
    assert sum(part.share for part in parts.values()) == pytest.approx(1)
    assert parts["attention"].ms == parts["new_part"].ms == 1
    assert parts["Python and other"].ms == pytest.approx(1.5)


def test_ranges_that_the_engine_names_are_rows(tiny_engine: Engine) -> None:
    profile = profile_requests(Settings(threads=1, seed=0), limit=2)
    parts = {part.name: part for part in profile.parts}
    assert profile.has_ranges
    num_layers = tiny_engine.model.text_config.num_hidden_layers
    assert parts["attention"].calls == parts["dense mlp + experts"].calls
    assert parts["attention"].calls == pytest.approx(num_layers * profile.passes)
    assert all(parts[name].ms > 0 for name in ("attention", "dense mlp + experts", "lm_head", "embed"))
    assert parts["Python and other"].share < 0.5
    assert sum(part.ms for part in profile.parts) == pytest.approx(profile.profiled_ms)


@pytest.mark.slow("measures a model")
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_bench_profile(mode: str) -> None:
    result = run("profile", "--limit", "1", "--threads", "1", "--mode", mode, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["mode"] == mode
    assert values["requests"] == 1
    assert sum(part["ms"] for part in values["parts"]) == pytest.approx(values["profiled_ms"])
    assert {"prompt (tokenize)", "attention", "dense mlp + experts", "lm_head", "sampling", "Python and other"} <= {
        part["name"] for part in values["parts"]
    }
    assert values["operators"]
    assert 0 < values["ms_per_pass"] <= values["ms"]
    bound = values["bound"]
    assert bound["ideal_ms"] == max(bound["compute_ms"], bound["memory_ms"])
    assert bound["measured_over_ideal"] > 1
    assert bound["positions"] > 10


@pytest.mark.slow("measures a model")
def test_bench_profile_as_a_table() -> None:
    result = run("profile", "--limit", "1", "--threads", "1")
    assert result.returncode == 0, result.stderr
    for word in ("Python and other", "bound", "probe", "one pass"):
        assert word in result.stdout
