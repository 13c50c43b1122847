"""Read and write messages with a Content-Length header: the editor, the relay, the daemon and the worker use it.

    to_frame              a body with its header
    read_body             the next body of a stream; what is not a frame is skipped, a frame too large is reported
    read_body_async       the same for an asyncio stream of whole frames
    read_message          the next JSON object of a stream; anything else is an error
    write_message         write a JSON object and flush
    find_fault, is_legal_id, is_answer, is_deep  check what a peer sent
    take_private_streams  copies of stdin and stdout that no print can disturb

Standard library only, and without dataclasses or asyncio: every editor window starts a process that imports this.

Knows:  streams of bytes, JSON.  Never: what a message means.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from fimserver.errors import FrameError

if TYPE_CHECKING:
    from asyncio import StreamReader

VERSION = "2.0"  # of JSON-RPC
MAX_BODY_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 4096
_MOST_LEVELS = 100
_NAME = b"content-length:"
_CHUNK_BYTES = 2**16


def take_private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Return copies of stdin and stdout for frames; redirect the originals to the null device and stderr."""
    stream_in, stream_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return stream_in, stream_out


def to_frame(body: bytes) -> bytes:
    """Return a body with its header."""
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def read_body(
    stream: BinaryIO, on_skipped: Callable[[int, bytes, bytes], None] = lambda _size, _begin, _end: None
) -> bytes | None:
    """Return the next body; ``None`` if the stream ends, also in the middle of one.

    A line that is not part of a header is skipped. A body of more than ``MAX_BODY_BYTES`` is skipped too, and
    ``on_skipped`` gets its size, its beginning and its end: the stream continues after it.
    """
    while True:
        length = _read_header(stream)
        if length is None:
            return None
        if length <= MAX_BODY_BYTES:
            body = stream.read(length)
            return body if len(body) == length else None
        remaining, begin, end = length, b"", b""
        while remaining:
            chunk = stream.read(min(_CHUNK_BYTES, remaining))
            if not chunk:
                return None
            begin, end = begin or chunk, (end + chunk)[-_CHUNK_BYTES:]
            remaining -= len(chunk)
        on_skipped(length, begin, end)


async def read_body_async(reader: "StreamReader", most: int = MAX_BODY_BYTES) -> bytes | None:
    """Return the next body of a peer that writes whole frames; ``None`` at the end.

    Raises ``ValueError`` for anything that is not a frame of at most ``most`` bytes, ``EOFError`` inside one.
    """
    line = await reader.readline()
    if not line:
        return None
    length = _parse_length(line)
    if length is None or length > most:
        msg = "not a frame"
        raise ValueError(msg)
    await reader.readline()
    return await reader.readexactly(length)


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """Return the next message; ``None`` at the end of the stream. Raises ``FrameError`` for anything else."""
    length = _read_header(stream, _refuse_junk)
    if length is None:
        return None
    if length > MAX_BODY_BYTES:
        msg = f"a message of {length} bytes is larger than {MAX_BODY_BYTES}"
        raise FrameError(msg)
    body = stream.read(length)
    if len(body) < length:
        return None
    try:
        message = json.loads(body)
    except ValueError as error:
        msg = f"a message of {len(body)} bytes is not JSON"
        raise FrameError(msg) from error
    if not isinstance(message, dict):
        msg = f"a message is a {type(message).__name__}, not an object"
        raise FrameError(msg)
    return message


def find_fault(message: Mapping[str, Any]) -> str | None:
    """Return why an object is no message of JSON-RPC 2.0; ``None`` for a good one."""
    method, message_id = message.get("method"), message.get("id")
    if message_id is not None and not is_legal_id(message_id):
        return "the id of a message has to be a text or a whole number"
    if "method" in message and not isinstance(method, str) and not is_answer(message):
        return "the method of a message is not a string"
    if message.get("jsonrpc") != VERSION:
        return f'a message needs "jsonrpc": "{VERSION}"'
    if method is not None and message_id is not None and is_deep(message):
        return "the message is nested too deeply"
    return None


def is_legal_id(value: object) -> bool:
    """Return whether a value may be a request's id: a text or a finite number."""
    return isinstance(value, str) or (type(value) in (int, float) and value - value == 0)  # type: ignore[operator]


def is_answer(message: Mapping[str, Any]) -> bool:
    """Return whether an object is an answer; some peers write its absent method as null."""
    return message.get("method") is None and ("result" in message or "error" in message)


def is_deep(value: object) -> bool:
    """Return whether a JSON value is nested more deeply than any message of LSP; Python's own limit varies."""
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner = [part for part in level if isinstance(part, list | dict)]
        if not inner:
            return False
        level = [each for part in inner for each in (part.values() if isinstance(part, dict) else part)]
    return True


def write_message(stream: BinaryIO, message: Mapping[str, Any]) -> None:
    """Write one message and flush."""
    stream.write(to_frame(json.dumps(message, separators=(",", ":")).encode("utf-8")))
    stream.flush()


def _read_header(stream: BinaryIO, on_junk: Callable[[bytes], None] = lambda _line: None) -> int | None:
    """Return the length of the next body after reading its whole header; ``None`` if the stream ends."""
    length = None
    while line := stream.readline(_MAX_HEADER_BYTES):
        found = _parse_length(line)
        if found is not None:
            length = found
        elif length is not None and not line.strip():
            return length
        elif length is None:
            on_junk(line)
    return None


def _parse_length(line: bytes) -> int | None:
    """Return the number in a Content-Length line; ``None`` for any other line."""
    name, digits = line[: len(_NAME)], line[len(_NAME) :].strip()
    return int(digits) if name.lower() == _NAME and digits.isdigit() and digits.isascii() else None


def _refuse_junk(_line: bytes) -> None:
    msg = "expected a Content-Length header"
    raise FrameError(msg)
