"""By default automatic requests get what is likely to be right, and requests by the user get everything."""

import pytest
from support.fake_engine import FakeServer

from fimserver.settings import AUTOMATIC_CONFIDENCE

CALL = "def call(first, second):\n    return join(\u25ae)\n"
# The same call stands elsewhere: as often as the number says, each time with the same arguments or not.
KNOWN = "value = compute_everything_again_for_all(first, second)\n"
ASKED = "result = compute_everything_again_for_all(\u25ae\n"


def texts(items: list[dict[str, str]]) -> list[str]:
    return [item["insertText"] for item in items]


@pytest.mark.parametrize("confidence", [AUTOMATIC_CONFIDENCE - 0.05, AUTOMATIC_CONFIDENCE + 0.05])
def test_the_model(fake: FakeServer, confidence: float) -> None:
    place = fake.show("file:///unsure.py", CALL, order={"answer": "first, second", "confidence": confidence})
    is_offered = confidence >= AUTOMATIC_CONFIDENCE
    assert bool(fake.complete(*place, invoked=False)) is is_offered
    if not is_offered:
        assert fake.last["reason"] == "low_confidence"
        for number in (f"{confidence:.2f}", f"{AUTOMATIC_CONFIDENCE:g}"):
            assert number in fake.last["detail"]
        assert "minConfidence" in fake.last["detail"]
    assert texts(fake.complete(*place)) == ["first, second"]


def test_a_sure_match_needs_no_model(fake: FakeServer) -> None:
    place = fake.show("file:///match.py", KNOWN * 3 + ASKED, order={"answer": "model"})
    assert texts(fake.complete(*place, invoked=False)) == ["first, second)"]
    assert fake.last["source"] == "match"
    assert fake.last["facts"]["match_confidence"] >= AUTOMATIC_CONFIDENCE


def test_an_unsure_match_is_the_models_to_judge(fake: FakeServer) -> None:
    long = "".join(f"argument_{n}, " for n in range(20))
    text = f"value = compute_everything_again_for_all({long})\n{ASKED}"
    place = fake.show("file:///long.py", text, order={"answer": "first, second)", "confidence": 0.9})
    assert texts(fake.complete(*place, invoked=False)) == ["first, second)"]
    assert fake.last["source"] == "model"
    assert fake.last["facts"]["match_confidence"] < AUTOMATIC_CONFIDENCE
    fake.set(minConfidence=0)
    assert fake.complete(*place, invoked=False)
    assert fake.last["source"] == "match"
    fake.set()
    assert fake.complete(*place)
    assert fake.last["source"] == "match", "as the user asked"
