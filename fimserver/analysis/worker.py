"""Analyse the user's text: the process that the daemon asks, one step of the pipeline at a time.

    from the daemon   a JSON object with ``step``, ``query`` and the step's own values, then new texts (``texts.py``)
    to the daemon     {"ready": true} once, then one object for each step: ``result`` and ``cpu_ms``, or ``error``

Native code runs here on text that can be anything: a parser may crash, never end, or fill the memory. The kernel ends
the process after a limit of CPU time for each step (where it has such a timer; elsewhere the daemon does, by the clock)
and beyond a size of memory. End of input ends it as well.

Knows:  the pipeline, frames.  Never: LSP, the engine, other processes.
"""

import json
import signal
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fimserver import pipeline
from fimserver.analysis.texts import ReceivedTexts
from fimserver.context.languages.names import find_language
from fimserver.context.limits import ANALYSIS_BYTES
from fimserver.context.privacy.file_checks import FileChecks
from fimserver.context.query import Deletion, OtherDocument, Query
from fimserver.context.syntax import load_grammar
from fimserver.datatypes import Completion, Generation, ModelInfo, NoCompletion, Snapshot, from_plain, to_plain
from fimserver.framing import read_body, take_private_streams, to_frame
from fimserver.pipeline import Found, Memory
from fimserver.settings import Settings

_PLACES = 32  # whose trees and matches are kept for the engine's answer
_DOCUMENTS = 64  # whose last tree is kept


@dataclass(slots=True)
class Analyst:
    """The steps, and what is kept between them."""

    texts: ReceivedTexts = field(default_factory=ReceivedTexts)
    _files: FileChecks = field(default_factory=FileChecks)
    _memories: OrderedDict[str, Memory] = field(default_factory=OrderedDict)  # by document
    _found: OrderedDict[tuple[Any, ...], Found] = field(default_factory=OrderedDict)  # by place

    def answer(self, message: dict[str, Any], bodies: list[bytes]) -> dict[str, Any]:
        """Return the result of one message's step, or the error in it; no text is quoted in an error."""
        begin = time.process_time()
        self.texts.receive(message["new"], bodies, message["dropped"])  # if this fails, so does everything after it
        try:
            result = self._run(message)
        except Exception as error:  # noqa: BLE001  one step fails, the process continues
            return {"error": _describe(error)}
        return {"result": result, "cpu_ms": (time.process_time() - begin) * 1e3}

    def _run(self, message: dict[str, Any]) -> Any:  # noqa: PLR0911  one for each step
        step = message["step"]
        if step == "load":
            return load_grammar(find_language(message["language_id"]))
        if step == "forget":
            return self._forget(message["key"])
        query, key = self._to_query(message), message["query"]["key"]
        memory = self._memory(key)
        place = (key, message["query"]["text"], query.snapshot.cursor, query.invoked, query.snapshot.language_id)
        if step == "find":
            return self._find(query, memory, place, with_matches=message["with_matches"])
        found = self._found.get(place) or pipeline.find(query, memory)
        if isinstance(found, NoCompletion):
            return {"refusal": to_plain(found)}
        if step == "context":
            info = from_plain(ModelInfo, message["info"]) if message["info"] else None
            return {"context": to_plain(pipeline.to_context(query, memory, found, info))}
        if step == "line":
            line = pipeline.read_line(query, found, message["text"])
            return {"completion": to_plain(line) if line is not None else None}
        shown = from_plain(Completion, message["shown"]) if message["shown"] else None
        generation = from_plain(Generation, message["generation"])
        answer = pipeline.read_answer(query, found, generation, shown=shown)
        return {"refusal" if isinstance(answer, NoCompletion) else "answer": to_plain(answer)}

    def _find(self, query: Query, memory: Memory, place: tuple[Any, ...], *, with_matches: bool) -> dict[str, Any]:
        hole = pipeline.find_hole_at(query, memory)
        if isinstance(hole, NoCompletion):
            return {"refusal": to_plain(hole)}
        sure, confidence = None, 0.0
        if with_matches:
            found = self._found[place] = pipeline.find_matches_for(query, memory, hole)
            self._found.move_to_end(place)
            while len(self._found) > _PLACES:
                self._found.popitem(last=False)
            sure, confidence = to_plain(found.sure) if found.sure is not None else None, found.confidence
        kept = {"sure": sure, "confidence": confidence}
        return {"hole": to_plain(hole.hole), "language_id": hole.language_id, **kept}

    def _to_query(self, message: dict[str, Any]) -> Query:
        values, is_plain = message["query"], message["is_plain"]
        snapshot = Snapshot(
            values["uri"],
            values["version"],
            "plaintext" if is_plain else values["language_id"],
            self.texts[values["text"]],
            values["cursor"],
        )
        others, above = (
            [OtherDocument(uri, language_id, self.texts[text]) for uri, language_id, text in values[name]]
            for name in ("others", "above")
        )
        return Query(
            snapshot,
            _to_settings(values["settings"]),
            invoked=values["invoked"],
            others=[] if is_plain else others,
            deleted=[] if is_plain else [from_plain(Deletion, deletion) for deletion in values["deleted"]],
            above=above,
            uses_matches=values["uses_matches"],
            offers_matches=values["offers_matches"],
        )

    def _memory(self, key: str) -> Memory:
        memory = self._memories.setdefault(key, Memory(files=self._files))
        self._memories.move_to_end(key)
        while len(self._memories) > _DOCUMENTS:
            self._memories.popitem(last=False)
        return memory

    def _forget(self, key: str) -> None:
        self._memories.pop(key, None)
        for place in [place for place in self._found if place[0] == key]:
            del self._found[place]


@lru_cache(maxsize=16)
def _to_settings(values: str) -> Settings:
    return from_plain(Settings, json.loads(values))


def _describe(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{where}"


def limit_memory() -> None:
    """Let allocations fail beyond ``ANALYSIS_BYTES``, on systems that support it."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415  not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (ANALYSIS_BYTES, ANALYSIS_BYTES))


def limit_time(seconds: float) -> None:
    """Let the kernel end this process after so much more CPU time, on systems that support it; 0 for no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> int:
    """Answer messages until the input ends."""
    stream_in, stream_out = take_private_streams()
    limit_memory()
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the daemon's to handle
    analyst = Analyst()
    reply: dict[str, Any] = {"ready": True}
    while True:
        stream_out.write(to_frame(json.dumps(reply).encode()))
        stream_out.flush()
        body = read_body(stream_in)
        if body is None:
            return 0
        message = json.loads(body)
        bodies = [read_body(stream_in) or b"" for _ in message["new"]]
        limit_time(message["limit_s"])
        reply = analyst.answer(message, bodies)
        limit_time(0)


if __name__ == "__main__":
    sys.exit(main())
