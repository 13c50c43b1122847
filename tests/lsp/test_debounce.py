"""How long the server waits after a key, from the model's speed and the user's."""

import random
from collections.abc import Iterable

import pytest

from fimserver.lsp.policy import DEFAULT_PAUSE_S, MAX_PAUSE_S, AdaptiveDebounce


def typed(pauses: Iterable[float]) -> AdaptiveDebounce:
    now = 0.0
    debounce = AdaptiveDebounce(lambda: now)
    debounce.on_edit()
    for pause in pauses:
        now += pause
        debounce.on_edit()
    return debounce


def typist(median: float, seed: int = 0, count: int = 100) -> list[float]:
    """Return pauses of bursts, with a longer pause after every tenth key."""
    draw = random.Random(seed)
    return [draw.lognormvariate(0, 0.3) * (median if i % 10 else 1.0) for i in range(count)]


def test_the_first_pause_is_the_default() -> None:
    assert typed([0.2] * 50).pause_s(None) == DEFAULT_PAUSE_S
    assert typed([0.2] * 3).pause_s(0.1) == DEFAULT_PAUSE_S


@pytest.mark.parametrize("median", [0.12, 0.2, 0.3])
def test_a_model_that_answers_between_two_keys_is_asked_at_once(median: float) -> None:
    assert typed(typist(median)).pause_s(median / 3) == 0


@pytest.mark.parametrize("median", [0.06, 0.1, 0.15])
def test_a_slow_model_is_asked_when_typing_stops(median: float) -> None:
    debounce = typed(typist(median))
    wait = debounce.pause_s(0.5)
    assert median < wait <= MAX_PAUSE_S
    assert wait <= debounce.pause_s(0.6) <= MAX_PAUSE_S


def test_the_wait_is_as_short_as_possible() -> None:
    """Half of the keys come after 0.1 s, half after 1 s: once 0.1 s have passed no key is worth waiting for."""
    assert typed([0.1, 1.0] * 30).pause_s(0.5) == 0, "every second answer comes in time"
    assert typed([0.1, 0.1, 0.1, 1.0] * 20).pause_s(0.5) == pytest.approx(0.1)


def test_slow_typing_needs_no_wait() -> None:
    assert typed([10.0] * 20).pause_s(2.0) == 0


def test_habits_change() -> None:
    slow, quick = [2.0] * 150, [0.05] * 150
    after_quick = pytest.approx(0.05)  # no key for longer than ever before: the user stopped typing
    assert typed(quick).pause_s(0.5) == after_quick
    assert typed(quick + slow).pause_s(0.5) == 0
    assert typed(slow + quick).pause_s(0.5) == after_quick
