"""Find the errors of a syntax tree in a process of its own: a grammar can crash, and the model stays loaded.

    ErrorParser.find_errors   the byte ranges of errors in a text

If the process dies or takes too long, that text has no known errors, and the next one gets another process.

Knows:   texts, processes.  Never: tokens, tensors.
Threads: one at a time.
"""

import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from fimserver.errors import FrameError
from fimserver.framing import read_message, take_private_streams, write_message
from fimserver.paths import OUTSIDE

COMMAND = (sys.executable, "-P", "-m", "fimserver.engine.decoding.parsing")
_WITHIN_S = 1.0  # a text of 2,500 characters takes 1 ms
_START_S = 30.0  # for Python to start and to import, on a busy machine
_IS_WINDOWS = os.name == "nt"
Spans = list[tuple[int, int]]


class ErrorParser:
    """The process, and the texts that it is asked about."""

    def __init__(self, command: tuple[str, ...] = COMMAND, within_s: float = _WITHIN_S) -> None:
        self._command, self._within_s = command, within_s
        self._process: subprocess.Popen[bytes] | None = None
        self.deaths = 0

    def find_errors(self, text: str, language_id: str) -> Spans | None:
        """Return the byte ranges of errors in a text's tree, none without a grammar; ``None`` if the process died."""
        try:
            if self._process is None:
                self._start()
            reply = self._exchange({"text": text, "language_id": language_id}, self._within_s)
        except (OSError, RuntimeError, FrameError, EOFError):
            self.deaths += 1
            self.close()
            return None
        return [(first, last) for first, last in reply["errors"]]

    def _start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  our own interpreter
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=OUTSIDE
        )
        self._exchange({"text": "", "language_id": "plaintext"}, _START_S)

    def _exchange(self, message: dict[str, Any], within_s: float) -> dict[str, Any]:
        """Send a message and return the reply. Raises ``OSError`` or ``EOFError`` if the process has ended."""
        process = self._process
        if process is None:
            raise EOFError
        stdin, stdout = cast("BinaryIO", process.stdin), cast("BinaryIO", process.stdout)
        with _deadline(process, within_s):
            write_message(stdin, message)
            if not _IS_WINDOWS:
                _wait_for_reply(stdout, within_s)
            reply = read_message(stdout)
        if reply is None:
            raise EOFError
        return reply

    def close(self) -> None:
        """End the process; the next text gets another one."""
        if (process := self._process) is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    cast("BinaryIO", stream).close()
        self._process = None


def _wait_for_reply(stream: BinaryIO, within_s: float) -> None:
    """Wait for the first byte of a reply, which is written at once. Raises ``TimeoutError``."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLIN)
    if not poll.poll(within_s * 1e3):
        msg = f"no reply in {within_s:g} s"
        raise TimeoutError(msg)


@contextmanager
def _deadline(process: "subprocess.Popen[bytes]", within_s: float) -> Iterator[None]:
    """Kill a process after some time on Windows, whose pipes cannot be polled.

    Elsewhere no thread is started for a request: where memory is short, Python may wait for its start for good.
    """
    timer = threading.Timer(within_s, process.kill)
    if _IS_WINDOWS:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main() -> None:
    """Answer messages until the input ends."""
    from fimserver.context.syntax import parse  # noqa: PLC0415  only this process loads grammars

    stream_in, stream_out = take_private_streams()
    while (message := read_message(stream_in)) is not None:
        tree = parse(message["text"], message["language_id"])
        write_message(stream_out, {"errors": tree.errors() if tree is not None else []})


if __name__ == "__main__":
    main()
