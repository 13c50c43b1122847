"""Frames of LSP as bytes: a Content-Length header and a body. Standard library only; both ends of the relay use it.

    read_body   the next body; what is no frame is skipped, a frame too large is skipped and reported
    to_frame    a body with its header

Knows:  streams of bytes.  Never: what a message says.
"""

from collections.abc import Callable
from typing import BinaryIO

MAX_BODY_BYTES = 64 * 2**20
_LONGEST_HEADER = 4096
_NAME = b"content-length:"
_CHUNK = 2**16


def to_frame(body: bytes) -> bytes:
    """A body as it goes over a stream."""
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def read_body(
    stream: BinaryIO, on_skipped: Callable[[int, bytes, bytes], None] = lambda _size, _begin, _end: None
) -> bytes | None:
    """The next body; ``None`` where the stream ends, also in the middle of one.

    Lines before a header that are none are skipped. A body of more than 64 MB is read past, and ``on_skipped`` told
    its size, how it begins and how it ends: the stream goes on behind it.
    """
    while True:
        length = _read_length(stream)
        if length is None:
            return None
        if length <= MAX_BODY_BYTES:
            body = stream.read(length)
            return body if len(body) == length else None
        remaining, begin, end = length, b"", b""
        while remaining:
            chunk = stream.read(min(_CHUNK, remaining))
            if not chunk:
                return None
            begin, end = begin or chunk, (end + chunk)[-_CHUNK:]
            remaining -= len(chunk)
        on_skipped(length, begin, end)


def _read_length(stream: BinaryIO) -> int | None:
    """Length of the next body, its header read to the end; ``None`` where the stream ends."""
    length = None
    while line := stream.readline(_LONGEST_HEADER):
        name, digits = line[: len(_NAME)], line[len(_NAME) :].strip()
        if name.lower() == _NAME and digits.isdigit() and digits.isascii():
            length = int(digits)
        elif length is not None and not line.strip():
            return length
    return None
