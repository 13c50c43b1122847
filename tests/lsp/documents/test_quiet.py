"""By default automatic requests get what is likely to be right, and requests by the user get everything."""

from collections.abc import Callable

import pytest
from support.fake_engine import FakeServer

from fimserver.settings import AUTOMATIC_CONFIDENCE

CALL = "def call(first, second):\n    return join(\u25ae)\n"
# The same call stands elsewhere: as often as the number says, each time with the same arguments or not.
KNOWN = "value = compute_everything_again_for_all(first, second)\n"
ASKED = "result = compute_everything_again_for_all(\u25ae\n"


@pytest.fixture
def default(start_fake: Callable[..., FakeServer]) -> FakeServer:
    """A server with the default settings, and a user who has not accepted anything yet."""
    server = start_fake(options={"minConfidence": None, "learnFromUse": False})
    server.wait_until_ready()
    return server


def texts(items: list[dict[str, str]]) -> list[str]:
    return [item["insertText"] for item in items]


@pytest.mark.parametrize("confidence", [AUTOMATIC_CONFIDENCE - 0.05, AUTOMATIC_CONFIDENCE + 0.05])
def test_the_model(default: FakeServer, confidence: float) -> None:
    place = default.show("file:///unsure.py", CALL, order={"answer": "first, second", "confidence": confidence})
    is_offered = confidence >= AUTOMATIC_CONFIDENCE
    assert bool(default.complete(*place, invoked=False)) is is_offered
    if not is_offered:
        assert default.last["reason"] == "low_confidence"
        for number in (f"{confidence:.2f}", f"{AUTOMATIC_CONFIDENCE:g}"):
            assert number in default.last["detail"]
        assert "minConfidence" in default.last["detail"]
    assert texts(default.complete(*place)) == ["first, second"]


def test_a_sure_match_needs_no_model(default: FakeServer) -> None:
    place = default.show("file:///match.py", KNOWN * 3 + ASKED, order={"answer": "model"})
    assert texts(default.complete(*place, invoked=False)) == ["first, second)"]
    assert default.last["source"] == "match"
    assert default.last["facts"]["match_confidence"] >= AUTOMATIC_CONFIDENCE


def test_an_unsure_match_is_the_models_to_judge(default: FakeServer) -> None:
    long = "".join(f"argument_{n}, " for n in range(20))
    text = f"value = compute_everything_again_for_all({long})\n{ASKED}"
    place = default.show("file:///long.py", text, order={"answer": "first, second)", "confidence": 0.9})
    assert texts(default.complete(*place, invoked=False)) == ["first, second)"]
    assert default.last["source"] == "model"
    assert default.last["facts"]["match_confidence"] < AUTOMATIC_CONFIDENCE
    default.set(minConfidence=0, learnFromUse=False)
    assert default.complete(*place, invoked=False)
    assert default.last["source"] == "match"
    default.set(minConfidence=None, learnFromUse=False)
    assert default.complete(*place)
    assert default.last["source"] == "match", "as the user asked"
