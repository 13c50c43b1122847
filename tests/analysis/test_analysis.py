"""The analysis process: what it answers, and that a text can neither hold nor end anything but one request."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimserver import pipeline
from fimserver.analysis import client as client_module
from fimserver.analysis.client import AnalysisClient, FoundHole
from fimserver.analysis.quarantine import Quarantine, Treatment
from fimserver.analysis.texts import ReceivedTexts, SentTexts
from fimserver.context.query import Deletion, OtherDocument, Query
from fimserver.datatypes import Generation, Mode, NoCompletion, Snapshot
from fimserver.errors import AnalysisError
from fimserver.pipeline import Memory
from fimserver.settings import Settings

MARK = "\u25ae"
URI = "file:///project/a.txt"
# Each ends tree-sitter's parser by SIGSEGV, at least in some layouts of memory.
HOSTILE = {
    "yaml, nested deeper than a buffer": ("yaml", "# tasks\n" + "- " * 260 + f"{MARK}a\n"),
    "yaml, in a flow": ("yaml", "a:\n" + "- " * 400 + f"{MARK}\n"),
    "shell, an icon after a brace": ("shellscript", f"prompt=${{\U000f0000{MARK}\nls {{\U000f101d\n"),
    "markdown, lists in lists": ("markdown", "- " * 400 + f"{MARK}\n"),
}
PLACES = {
    "python": ("python", f"items = []\nitems.append(1)\nitems.ap{MARK}\n"),
    "python, a block": ("python", f"import os\n\n\ndef read(path):\n    {MARK}\n    return path\n"),
    "python, a match": ("python", f"print(first_argument, second, third)\nprint(first_argument, second, {MARK}\n"),
    "javascript": ("javascript", f"const names = [];\nfor (const name of names) {{\n  {MARK}\n}}\n"),
    "go": ("go", f"package main\n\nfunc main() {{\n\tvalue := {MARK}\n}}\n"),
    "rust, a string": ("rust", f'fn main() {{\n    println!("hello {MARK}");\n}}\n'),
    "kotlin": ("kotlin", f"fun main() {{\n    val names = listOf({MARK})\n}}\n"),
    "vue, a script": ("vue", f"<template></template>\n<script>\nconst a = {MARK}\n</script>\n"),
    "yaml": ("yaml", f"a:\n  b: {MARK}\n"),
    "crlf and beyond ascii": ("python", f"x = '\U0001f600'\r\ny = {MARK}\r\n"),
}
ANSWER = Generation("value", Mode.DIFFUSION, "end", 1, 1, 1, 0, 3, {"total": 1.0}, confidence=0.5)


def to_query(marked: str, language: str, *, invoked: bool = True, uri: str = URI, **values: Any) -> Query:
    cursor = marked.index(MARK)
    snapshot = Snapshot(uri, 1, language, marked.replace(MARK, ""), cursor)
    return Query(snapshot, Settings(), invoked=invoked, **values)


def refusal(future: Any) -> str:
    """Return the reason that a step failed with."""
    with pytest.raises(AnalysisError) as caught:
        future.result(60)
    reason: str = caught.value.outcome.reason
    return reason


def found_at_last(analysis: AnalysisClient, query: Query) -> bool:
    """Return whether a hole is found, at the second try: a parser that wrote where it should not may end the next."""
    future = analysis.find(1, query)
    if future.exception(60) is not None:
        future = analysis.find(1, query)
    return isinstance(future.result(60), FoundHole)


def worker_with(code: str) -> tuple[str, ...]:
    """Return the command of a worker in which ``code`` runs before it answers."""
    return (sys.executable, "-c", f"from fimserver.analysis import worker\n{code}\nworker.main()")


@pytest.fixture(scope="module")
def client() -> Iterator[AnalysisClient]:
    analysis = AnalysisClient()
    yield analysis
    analysis.close()


@pytest.mark.parametrize("place", PLACES)
def test_the_process_answers_as_the_pipeline_does(client: AnalysisClient, place: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("fimserver.context.gather.find_matches.__kwdefaults__", {"max_seconds": 10.0})
    language, marked = PLACES[place]
    others = [OtherDocument("file:///project/b", language, "names.append(value)\n" * 3)]
    query = to_query(marked, language, others=others, deleted=[Deletion(URI, "x", "total(order)", "\n")])
    memory = Memory()
    expected = pipeline.find(query, memory)
    assert not isinstance(expected, NoCompletion)
    found = client.find(1, query).result(60)
    assert isinstance(found, FoundHole)
    assert found.hole == expected.place.hole
    assert found.language_id == expected.place.language_id
    assert (found.sure and found.sure.middle) == (expected.sure and expected.sure.middle)
    assert client.build_context(1, query, None).result(60) == pipeline.to_context(query, memory, expected, None)
    answer, own = client.read_answer(1, query, ANSWER, None).result(60), pipeline.read_answer(query, expected, ANSWER)
    assert type(answer) is type(own)
    if not isinstance(own, NoCompletion) and not isinstance(answer, NoCompletion):
        assert [c.middle for c in answer.completions] == [c.middle for c in own.completions]
    line, own_line = client.fit_line(1, query, "value").result(60), pipeline.read_line(query, expected, "value")
    assert (line and line.middle) == (own_line and own_line.middle)


def test_a_place_that_the_process_no_longer_knows_is_found_again(client: AnalysisClient) -> None:
    query = to_query("x = \u25ae\n", "python", uri="file:///project/again.py")
    assert isinstance(client.find(1, query).result(60), FoundHole)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    time.sleep(0.1)
    answer = client.read_answer(1, query, ANSWER, None).result(60)
    assert answer.completions[0].middle == "value"  # type: ignore[union-attr]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("invoked", [True, False])
def test_a_text_that_crashes_a_parser_costs_its_own_request_only(name: str, invoked: bool) -> None:
    analysis = AnalysisClient()
    try:
        language, marked = HOSTILE[name]
        bad, good = to_query(marked, language, invoked=invoked), to_query("x = \u25ae\n", "python", uri="file:///b.py")
        for _ in range(4):
            with_bad = analysis.find(1, bad)
            assert found_at_last(analysis, good)
            assert with_bad.exception() is None or refusal(with_bad) == "analysis_crashed"
        if analysis.deaths == 2:
            plain = analysis.find(1, bad).result(60)
            assert isinstance(plain, NoCompletion) or plain.treatment is Treatment.PLAIN_TEXT
    finally:
        analysis.close()


def test_the_crash_that_was_reported_is_still_one() -> None:
    """If this fails, the grammar is corrected: drop the case that has no effect any more."""
    analysis = AnalysisClient()
    try:
        language, marked = HOSTILE["yaml, nested deeper than a buffer"]
        assert refusal(analysis.find(1, to_query(marked, language))) == "analysis_crashed"
    finally:
        analysis.close()


@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="no timer of CPU time")
@pytest.mark.parametrize("invoked", [True, False])
def test_a_step_that_takes_too_long_is_ended(invoked: bool) -> None:
    code = (
        "find = worker.pipeline.find_hole_at\n"
        "def slow(query, memory):\n"
        "    while 'slow' in query.snapshot.text: pass\n"
        "    return find(query, memory)\n"
        "worker.pipeline.find_hole_at = slow"
    )
    analysis = AnalysisClient(worker_with(code))
    try:
        begin = time.monotonic()
        assert refusal(analysis.find(1, to_query("slow = \u25ae\n", "python", invoked=invoked))) == "analysis_slow"
        assert time.monotonic() - begin < 20
        assert isinstance(analysis.find(1, to_query("x = \u25ae\n", "python")).result(60), FoundHole)
        assert analysis.deaths == 1
    finally:
        analysis.close()


def test_a_step_that_waits_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WALL_FACTOR", 1)
    analysis = AnalysisClient(worker_with("import time\nworker.pipeline.find_hole_at = lambda *_: time.sleep(3600)"))
    try:
        assert refusal(analysis.find(1, to_query("x = \u25ae\n", "python"))) == "analysis_slow"
    finally:
        analysis.close()


def test_an_error_in_a_step_is_named_without_text() -> None:
    analysis = AnalysisClient(worker_with("worker.pipeline.find_hole_at = lambda query, _: query.snapshot.text.no"))
    try:
        with pytest.raises(AnalysisError) as caught:
            analysis.find(1, to_query("secret = \u25ae\n", "python")).result(60)
        assert caught.value.outcome.reason == "error"
        assert "AttributeError" in caught.value.outcome.detail
        assert "secret" not in caught.value.outcome.detail
        assert analysis.deaths == 0
    finally:
        analysis.close()


def test_a_process_that_does_not_start_is_reported() -> None:
    for command in ((sys.executable, "-c", "raise SystemExit(3)"), ("/nowhere/python",)):
        analysis = AnalysisClient(command)
        assert refusal(analysis.find(1, to_query("x = \u25ae\n", "python"))) == "analysis"
        analysis.close()


def test_a_process_that_does_not_start_is_not_started_at_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    popen = subprocess.Popen

    def count(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", count)
    analysis = AnalysisClient((sys.executable, "-c", "raise SystemExit(3)"))
    try:
        for _ in range(5):
            assert refusal(analysis.find(1, to_query("x = \u25ae\n", "python"))) == "analysis"
        assert len(started) == 3
    finally:
        analysis.close()


def test_a_thread_that_ended_is_replaced(client: AnalysisClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_timer: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(threading.Timer, "start", fail)
        assert client.find(1, to_query("x = \u25ae\n", "python")).exception(20) is not None
    deadline = time.monotonic() + 30  # the next process may have failed to start too, which is tried again after 5 s
    while (again := client.find(1, to_query("x = \u25ae\n", "python"))).exception(60) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert isinstance(again.result(), FoundHole)


def test_nothing_is_started_after_the_end() -> None:
    analysis = AnalysisClient()
    assert isinstance(analysis.find(1, to_query("x = \u25ae\n", "python")).result(60), FoundHole)
    analysis.close()
    assert refusal(analysis.find(1, to_query("x = \u25ae\n", "python"))) == "cancelled"
    assert analysis.pid is None


def test_the_memory_of_a_step_is_bounded() -> None:
    if sys.platform != "linux":
        pytest.skip("limits of memory")
    analysis = AnalysisClient(worker_with("worker.pipeline.find_hole_at = lambda *_: bytearray(3 * 2**30)"))
    try:
        with pytest.raises(AnalysisError) as caught:
            analysis.find(1, to_query("x = \u25ae\n", "python")).result(60)
        assert "MemoryError" in caught.value.outcome.detail
    finally:
        analysis.close()


def test_steps_that_wait_fail_when_it_is_closed() -> None:
    analysis = AnalysisClient(worker_with("import time\nworker.pipeline.find_hole_at = lambda *_: time.sleep(0.5)"))
    futures = [analysis.find(1, to_query("x = \u25ae\n", "python")) for _ in range(3)]
    analysis.close()
    for future in futures:
        assert future.exception(10) is not None


def test_the_process_ends_when_nothing_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_IDLE_S", 0.2)
    analysis = AnalysisClient()
    try:
        analysis.open(1, URI, "python")
        assert isinstance(analysis.find(1, to_query("x = \u25ae\n", "python")).result(60), FoundHole)
        time.sleep(1.0)
        assert analysis.pid is not None, "a document is open"
        analysis.forget(1, URI)
        deadline = time.monotonic() + 20
        while analysis.pid is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert analysis.pid is None
    finally:
        analysis.close()


class TestQuarantine:
    def make(self) -> tuple[Quarantine, list[float]]:
        now = [1000.0]
        return Quarantine(lambda: now[0]), now

    def test_twice_is_enough(self) -> None:
        quarantine, _ = self.make()
        assert quarantine.treatment("a", "text") is Treatment.NORMAL
        quarantine.note("a", "text")
        assert quarantine.treatment("a", "text") is Treatment.NORMAL
        quarantine.note("a", "text")
        assert quarantine.treatment("a", "text") is Treatment.PLAIN_TEXT
        assert quarantine.treatment("b", "text") is Treatment.NORMAL

    def test_plain_text_that_ends_it_twice_is_not_read(self) -> None:
        quarantine, _ = self.make()
        for _ in range(4):
            quarantine.note("a", "text")
        assert quarantine.treatment("a", "text") is Treatment.UNREAD

    def test_a_change_and_a_pause_give_one_more_try(self) -> None:
        quarantine, now = self.make()
        for _ in range(2):
            quarantine.note("a", "text")
        assert quarantine.treatment("a", "changed") is Treatment.PLAIN_TEXT, "no pause"
        now[0] += 11
        assert quarantine.treatment("a", "text") is Treatment.PLAIN_TEXT, "no change"
        assert quarantine.treatment("a", "changed") is Treatment.NORMAL
        quarantine.note("a", "changed")
        assert quarantine.treatment("a", "changed") is Treatment.PLAIN_TEXT, "one death is enough now"
        now[0] += 11
        assert quarantine.treatment("a", "more") is Treatment.PLAIN_TEXT, "the pause is longer now"
        now[0] += 10
        assert quarantine.treatment("a", "more") is Treatment.NORMAL

    def test_deaths_far_apart_do_not_add_up(self) -> None:
        quarantine, now = self.make()
        for _ in range(5):
            quarantine.note("a", "text")
            assert quarantine.treatment("a", "text") is Treatment.NORMAL
            now[0] += 4000

    def test_a_closed_document_is_forgotten(self) -> None:
        quarantine, _ = self.make()
        for _ in range(2):
            quarantine.note("a", "text")
        quarantine.forget("a")
        assert quarantine.treatment("a", "text") is Treatment.NORMAL


TEXTS = st.text(st.sampled_from("ab\n\u00e9\U0001f600\ud800"), max_size=30)


@given(st.lists(st.tuples(st.sampled_from("xyz"), TEXTS, st.booleans()), max_size=30))
def test_both_sides_hold_the_same_texts(steps: list[tuple[str, str, bool]]) -> None:
    sent, received = SentTexts(), ReceivedTexts()
    for key, text, forgets in steps:
        own = str(list(text)) + text  # a string of its own, not one that another step has too
        number = sent.refer(key, own)
        parcel = sent.take()
        received.receive(parcel.new, parcel.bodies, parcel.dropped)
        assert received[number] == own
        if forgets:
            sent.forget(key)
    for key in "xyz":
        sent.forget(key)
    parcel = sent.take()
    received.receive(parcel.new, parcel.bodies, parcel.dropped)
    assert len(received) == 0


def test_a_change_is_sent_as_one() -> None:
    sent = SentTexts()
    text = "line\n" * 10_000
    sent.refer("a", text)
    assert len(sent.take().bodies[0]) == 50_000
    sent.refer("a", text[:20_000] + "x" + text[20_000:])
    assert sent.take().bodies == [b"x"]


def test_few_texts_of_a_document_are_held() -> None:
    sent, received = SentTexts(), ReceivedTexts()
    texts = [f"{number:02}" * 20 for number in range(20)]
    for text in [*texts, texts[0]]:
        name = sent.refer("a", text)
        parcel = sent.take()
        received.receive(parcel.new, parcel.bodies, parcel.dropped)
        assert received[name] == text
        assert len(received) <= 3


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimserver.analysis.texts.HELD_CHARACTERS", 100)
    sent, received = SentTexts(), ReceivedTexts()
    for number in range(20):
        text = f"{number:02}" * 20
        name = sent.refer(str(number), text)
        parcel = sent.take()
        received.receive(parcel.new, parcel.bodies, parcel.dropped)
        assert received[name] == text
        assert len(received) <= 3
