"""Messages between the server and the engine worker: JSON behind a Content-Length header.

Standard library only, because both sides import it. Values are the dataclasses of ``fimserver.datatypes``.
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
_LONGEST_HEADER = 4096


def write_frame(stream: BinaryIO, message: Mapping[str, Any]) -> None:
    """Write one message and flush."""
    body = json.dumps(message, separators=(",", ":")).encode("utf-8")
    stream.write(_HEADER + str(len(body)).encode() + b"\r\n\r\n" + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message; ``None`` at the end of the stream. Raises ``FrameError``."""
    header = stream.readline(_LONGEST_HEADER)
    if not header:
        return None
    digits = header.removeprefix(_HEADER).strip()
    if not header.startswith(_HEADER) or not digits.isdigit() or int(digits) > _MAX_FRAME_BYTES:
        msg = "expected a Content-Length header"
        raise FrameError(msg)
    stream.readline(_LONGEST_HEADER)
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
    """A dataclass from JSON values; the inverse of ``to_plain``. Raises for values of other types."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _revive(hints[name], value) for name, value in values.items()})


def _revive(hint: Any, value: Any) -> Any:  # noqa: PLR0911  one for each kind of hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _revive(next(a for a in arguments if a is not type(None)), value)
    if hint is Any:
        return value
    if value is None or (origin is tuple and not isinstance(value, list | tuple)):
        msg = f"a {type(value).__name__} in the place of a {hint}"
        raise FrameError(msg)
    if origin is tuple:
        return tuple(_revive(arguments[0], item) for item in value)
    if origin is dict:
        return {_revive(arguments[0], key): _revive(arguments[1], item) for key, item in dict(value).items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    if origin is None and isinstance(hint, type):
        return hint(value)
    return value
