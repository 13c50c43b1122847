"""Messages between the server and the engine worker: JSON behind a Content-Length header.

Standard library only, because both sides import it. Values are the dataclasses of ``fimserver.types``.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, BinaryIO

from fimserver.errors import FrameError

_HEADER = b"Content-Length: "
T = typing.TypeVar("T")
_MAX_FRAME_BYTES = 64 * 1024 * 1024


def write_frame(stream: BinaryIO, message: Mapping[str, Any]) -> None:
    """Write one message and flush."""
    body = json.dumps(message, separators=(",", ":")).encode("utf-8")
    stream.write(_HEADER + str(len(body)).encode() + b"\r\n\r\n" + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message; ``None`` at the end of the stream. Raises ``FrameError``."""
    header = stream.readline()
    if not header:
        return None
    digits = header.removeprefix(_HEADER).strip()
    if not header.startswith(_HEADER) or not digits.isdigit() or int(digits) > _MAX_FRAME_BYTES:
        msg = "expected a Content-Length header"
        raise FrameError(msg)
    stream.readline()
    body = stream.read(int(digits))
    if len(body) < int(digits):
        return None
    try:
        message = json.loads(body)
    except ValueError as error:
        msg = f"a message of {digits.decode()} bytes is not JSON"
        raise FrameError(msg) from error
    if not isinstance(message, dict):
        msg = f"a message is a {type(message).__name__}, not an object"
        raise FrameError(msg)
    return message


def to_plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    return dataclasses.asdict(value)


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from JSON values; the inverse of ``to_plain``."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _revive(hints[name], value) for name, value in values.items()})


def _revive(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _revive(next(a for a in typing.get_args(hint) if a is not type(None)), value)
    if origin is tuple:
        return tuple(_revive(typing.get_args(hint)[0], item) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    if origin is None and isinstance(hint, type) and hint is not Any:
        return hint(value)
    return value
