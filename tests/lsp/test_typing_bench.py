"""Typing at a user's speed: pauses, the share that is right so far, and a short session with the shipped model."""

import itertools
import json
import random
import statistics

import pytest
from support.command import run

from fimserver.bench.latency import begins_right
from fimserver.bench.simulated_editor import Key, draw_pause, to_keystrokes


@pytest.mark.slow("types at a human speed")
def test_a_short_session_adds_up() -> None:
    result = run("bench", "keystroke", "--human", "--limit", "40", "--speed", "2", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["keystrokes"] == 40
    assert values["shown"] + sum(values["empty"].values()) + values["cancelled"] == 40
    assert values["by_model"] + values["reused"] + values["matched"] == values["shown"]
    assert values["shown"] > 0
    assert 0 <= values["wasted"] <= values["asked"] <= 40
    assert values["asked"] >= values["by_model"]
    assert values["asked"] - values["wasted"] >= values["by_model"]
    assert 0 <= values["wasted_s"] <= values["asked_s"]
    assert values["debounce_ms"] is None, "it adapts"
    assert 0 < values["answer_ms_p50"] <= values["answer_ms_p95"]
    assert values["by_model"] == 0 or values["model_answer_ms_p50"] > 0
    assert 0 <= values["right_so_far"] <= 1


@pytest.mark.slow("types at a human speed")
def test_too_fast_to_see_the_model() -> None:
    """Keys within the debounce do not reach the model: every offer comes without it, and no pass is wasted."""
    result = run("bench", "keystroke", "--human", "--limit", "30", "--speed", "100", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["keystrokes"] == 30
    assert values["cancelled"] > 0
    assert values["asked"] <= 2


@pytest.mark.slow("types at a human speed")
def test_a_bad_model_is_exit_1() -> None:
    result = run("bench", "keystroke", "--human", "--model", "/nowhere")
    assert result.returncode == 1
    assert "/nowhere" in result.stderr


def test_pauses_are_those_of_a_user() -> None:
    rng = random.Random(0)
    inside, word, line = (Key(key, 0, 0, rest) for key, rest in (("a", "b"), ("a", " b"), ("\n    ", "b")))
    for key, low, high in ((inside, 0.17, 0.19), (word, 0.17, 0.21), (line, 0.3, 0.7)):
        pauses = [draw_pause(key, rng) for _ in range(2000)]
        assert low < statistics.median(pauses) < high
        assert min(pauses) > 0
        assert max(pauses) <= 4
    default = [draw_pause(key, rng) for key in to_keystrokes(300)]
    assert sum(default) < 180


def test_keys_know_the_text_after_them() -> None:
    keys = list(to_keystrokes(300))
    for key, following in itertools.pairwise(keys):
        if following.opens is None:
            assert key.rest.startswith(following.text)
            assert key.after == (following.line, following.column)
        else:
            assert not key.rest


@pytest.mark.parametrize(
    ("ghost", "typed", "right"),
    [
        ("name(a)", "name, b", True),
        ("names", "name", False),
        ("me", "me)", True),
        (" + 1", " + 2", True),
        ("+1", " + 1", False),
        (")", "))", True),
        ("\n    return x", "\n    return y", True),
        ("return", "\n    return", False),
        ("x", "", False),
        ("", "x", False),
    ],
)
def test_right_so_far_means_the_next_word(ghost: str, typed: str, right: bool) -> None:
    assert begins_right(ghost, typed) is right
