"""Every setting, in one place: its name, type, default, range and meaning.

``Settings`` is the table; docs/settings.md is written from it (``python -m fimserver.settings``) and a test
compares the two. Names are the same word everywhere: ``fimserver.maxLines`` in an editor, ``maxLines`` on the
wire, ``max_lines`` in Python.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fimserver.errors import SettingsError
from fimserver.types import Mode, Sampling

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def _setting(  # noqa: PLR0913  the columns of the table
    default: Any,
    doc: str,
    *,
    low: int | None = None,
    high: int | None = None,
    choices: tuple[str, ...] = (),
    pattern: re.Pattern[str] | None = None,
) -> Any:
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "pattern": pattern}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person may choose. Every default works with none of them set."""

    enabled: bool = _setting(default=True, doc="Offer completions at all.")
    comments: bool = _setting(default=False, doc="Complete inside comments.")
    docstrings: bool = _setting(default=False, doc="Complete inside docstrings.")
    strings: bool = _setting(default=True, doc="Complete inside other strings.")
    max_lines: int = _setting(default=8, doc="Longest completion, in lines.", low=1, high=200)
    mode: str = _setting(
        default="auto",
        doc="How the middle is decoded: in parallel, left to right, or what the model is better at.",
        choices=tuple(m.value for m in Mode),
    )
    max_denoising_steps: int | None = _setting(
        default=None,
        doc="Most denoising steps for one canvas; null means the model's own number.",
        low=1,
        high=256,
    )
    seed: int | None = _setting(
        default=None,
        doc="Seed of the canvas noise: the same text then gives the same answer. null draws a new one each time.",
        low=0,
        high=2**63 - 1,
    )
    debounce_ms: int = _setting(
        default=40, doc="Pause in typing before an automatic request is computed.", low=0, high=2000
    )
    max_latency_ms: int = _setting(
        default=1500, doc="Longest model time; then the best draft is the answer.", low=50, high=60000
    )
    model: str = _setting(default="tiny", doc="The shipped model's name, or the folder of a DiffusionGemma checkpoint.")
    device: str = _setting(default="auto", doc="auto, cpu, cuda, cuda:N or mps (torch's names).", pattern=_DEVICE)
    threads: int = _setting(
        default=0, doc="CPU threads of the model; 0 means physical cores less one.", low=0, high=1024
    )
    log_level: str = _setting(
        default="warning",
        doc="What is written to the log (stderr). Code never is.",
        choices=("error", "warning", "info", "debug"),
    )


def to_wire_name(name: str) -> str:
    """``max_lines`` as ``maxLines``."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


BY_WIRE_NAME = {to_wire_name(f.name): f for f in fields(Settings)}


def allowed_values(setting: "dataclasses.Field[Any]") -> str:
    """What a setting may be, in words: for errors and for the table."""
    m = setting.metadata
    null = " or null" if "None" in str(setting.type) else ""
    if m["choices"]:
        return " | ".join(m["choices"])
    if m["pattern"]:
        return "auto | cpu | cuda | cuda:N | mps"
    if m["low"] is not None:
        return f"whole number {m['low']} to {m['high']}{null}"
    return "true | false" if setting.type is bool else "text"


def _check(wire_name: str, value: Any) -> None:
    setting = BY_WIRE_NAME[wire_name]
    m = setting.metadata
    if value is None:
        good = setting.default is None
    elif setting.type is bool:
        good = isinstance(value, bool)
    elif m["low"] is not None:
        good = isinstance(value, int) and not isinstance(value, bool) and m["low"] <= value <= m["high"]
    elif m["choices"]:
        good = value in m["choices"]
    else:
        good = isinstance(value, str) and bool(value)
        good = good and (m["pattern"] is None or m["pattern"].fullmatch(value) is not None)
    if not good:
        msg = f"fimserver.{wire_name} is {value!r}; it may be: {allowed_values(setting)}"
        raise SettingsError(msg)


def parse_settings(values: Mapping[str, Any], base: Settings | None = None) -> Settings:
    """Settings from wire names over ``base``.

    Raises ``SettingsError`` that names key, value and allowed range.
    """
    changes = {}
    for wire_name, value in values.items():
        if wire_name not in BY_WIRE_NAME:
            msg = f"fimserver.{wire_name} is not a setting; there are: {', '.join(BY_WIRE_NAME)}"
            raise SettingsError(msg)
        _check(wire_name, value)
        changes[BY_WIRE_NAME[wire_name].name] = value
    return dataclasses.replace(base or Settings(), **changes)


def read_settings(values: Mapping[str, Any], base: Settings | None = None) -> tuple[Settings, list[str]]:
    """Settings, and one sentence for each value that was wrong and left at ``base``."""
    settings, problems = base or Settings(), []
    for wire_name, value in values.items():
        try:
            settings = parse_settings({wire_name: value}, settings)
        except SettingsError as error:
            problems.append(str(error))
    return settings, problems


def to_sampling(settings: Settings, *, min_tokens: int, trace: bool = False) -> Sampling:
    """How the engine is to decode under these settings."""
    return Sampling(
        mode=Mode(settings.mode),
        seed=settings.seed,
        max_denoising_steps=settings.max_denoising_steps,
        max_latency_ms=settings.max_latency_ms,
        min_tokens=min_tokens,
        trace=trace,
    )


def to_markdown() -> str:
    """The table of docs/settings.md."""
    rows = ["| setting | default | may be | meaning |", "|---|---|---|---|"]
    for wire_name, setting in BY_WIRE_NAME.items():
        default = json.dumps(setting.default).strip('"')
        may_be = allowed_values(setting).replace("|", "\\|")
        rows.append(f"| `{wire_name}` | `{default}` | {may_be} | {setting.metadata['doc']} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")  # noqa: T201  its output is the table
