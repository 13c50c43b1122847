"""The analysis in this process: the same messages and the same steps, without the other process."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fimserver.analysis.client import AnalysisClient, _Job
from fimserver.analysis.texts import SentTexts
from fimserver.analysis.worker import Analyst

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

STEP_S = 0.002


class _LocalProcess:
    """A process that is a function call."""

    pid = 0
    is_alive = True

    def __init__(self) -> None:
        self.texts = SentTexts()
        self._analyst = Analyst()

    def exchange(self, message: dict[str, Any], _within_s: float) -> dict[str, Any]:
        parcel = self.texts.take()
        message = json.loads(json.dumps({**message, "new": parcel.new, "dropped": parcel.dropped}))
        reply: dict[str, Any] = json.loads(json.dumps(self._analyst.answer(message, parcel.bodies)))
        return reply

    def end(self) -> int:
        return 0


class LocalAnalysis(AnalysisClient):
    """Runs each step in a later step of a loop, or at once without a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        self._process = _LocalProcess()  # type: ignore[assignment]
        self._later: Callable[..., Any] = (
            (lambda run: loop.call_later(STEP_S, run)) if loop is not None else (lambda run: run())
        )

    def _put(self, job: _Job) -> "Future[Any]":
        def run() -> None:
            if job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(self._run(job))
                except Exception as error:  # noqa: BLE001  the future has it
                    job.future.set_exception(error)

        self._later(run)
        return job.future
