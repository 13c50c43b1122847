"""Define every setting: its name, type, default, range and meaning.

``Settings`` is the table; docs/reference/settings.md is written from it (``python -m fimserver.settings``) and a test
compares the two. A setting has the same name everywhere: ``fimserver.maxLines`` in an editor, ``maxLines`` on the wire,
``max_lines`` in Python.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fimserver.datatypes import Mode, NoCompletion, PromptLayout, Sampling
from fimserver.errors import SettingsError
from fimserver.paths import read_bytes

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_API_KEY = re.compile(r"(?:[A-Z_][A-Z0-9_]{0,99}|keyring:[\w.-]{1,100})?")
ENGINES = ("local", "vllm", "llamacpp", "llamacpp-server", "ollama", "openai", "mistral", "inception")
WORD_STARTS = ("ghostText", "menu")
IN_PROCESS = ("local", "llamacpp")  # engines without a server
MODES = {
    "auto": Mode.AUTO,
    "diffusion": Mode.DIFFUSION,
    "speculative": Mode.SPECULATIVE,
    "verified": Mode.SPECULATIVE,  # an alias
    "autoregressive": Mode.AUTOREGRESSIVE,
}
ANY_LANGUAGE = "*"
AUTOMATIC_CONFIDENCE = 0.23  # most offers are right and nearly half of the places get one: docs/explanation/quality.md


def _setting(  # noqa: PLR0913  the columns of the table
    default: Any,
    doc: str,
    *,
    low: int | None = None,
    high: int | None = None,
    choices: tuple[str, ...] = (),
    pattern: re.Pattern[str] | None = None,
    written: str = "",
    secret: bool = False,
    engine: bool = False,
) -> Any:
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "pattern": pattern, "engine": engine}
    return field(default=default, metadata={**metadata, "written": written, "secret": secret})


@dataclass(frozen=True, slots=True)
class Remote:
    """Where an engine that is not ``local`` answers. An empty text leaves the choice to the engine."""

    url: str = _setting(
        default="",
        doc="Address of the engine's server, such as http://127.0.0.1:8080; empty means the engine's usual one.",
        pattern=re.compile(r"(?:https?://[^\s/?#]+[^\s]*)?"),
        written="http://... | https://... | empty",
        engine=True,
    )
    model: str = _setting(
        default="",
        doc="Name of the model on that server; empty means the first that it lists.",
        pattern=re.compile(r"[^\x00-\x1f]{0,300}"),
        written="text",
        engine=True,
    )
    api_key: str = _setting(
        default="",
        doc="Where the server's key is found, never the key itself: the name of an environment variable, or "
        "keyring:NAME for the entry NAME of the service fimserver in the system's keyring.",
        pattern=_API_KEY,
        written="NAME_OF_A_VARIABLE | keyring:NAME | empty",
        secret=True,
        engine=True,
    )
    timeout_ms: int = _setting(
        default=3000,
        doc="Longest wait for a connection, for the first part of an answer, and between two parts. An engine that "
        "takes longer counts as failed (fallback).",
        low=50,
        high=60000,
        engine=True,
    )


NO_REMOTE = Remote()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a user. Every default works with none of them set."""

    enabled: bool = _setting(default=True, doc="Offer completions at all.")
    languages: tuple[tuple[str, bool], ...] = _setting(
        default=(),
        doc='Languages to complete in or not, by the editor\'s language id; "*" is every other. All are on, except '
        "that in prose (plaintext, markdown and others, but not fenced code) only your own requests are answered.",
    )
    word_start: str = _setting(
        default="ghostText",
        doc="What comes first at the beginning of a word: ghost text (ghostText), or the editor's own list of names "
        "(menu). An editor may hide its list while there is ghost text; with menu, nothing is offered automatically "
        "until a word has three characters.",
        choices=WORD_STARTS,
    )
    comments: bool = _setting(default=False, doc="Complete inside comments.")
    docstrings: bool = _setting(default=False, doc="Complete inside docstrings.")
    strings: bool = _setting(default=True, doc="Complete inside other strings.")
    complete_ignored: bool = _setting(
        default=False,
        doc="Complete in files that .gitignore names. Files that .fimserverignore names are never read.",
    )
    max_lines: int = _setting(default=8, doc="Longest completion, in lines.", low=1, high=200)
    mode: str = _setting(
        default="auto",
        doc="How the middle is decoded: many tokens at once (diffusion), one token after the other "
        "(autoregressive), the autoregressive text in fewer passes by draft tokens that are verified "
        "(speculative), or what the model is better at (auto). verified is an older name of speculative.",
        choices=tuple(MODES),
    )
    prompt_layout: str = _setting(
        default="auto",
        doc="How fimserver's own engine asks an instruction-tuned model: its answer continues the code before the "
        "cursor (continue), it is shown the code with a mark at the cursor (describe), or as continue, with the "
        "beginning of the code after the cursor held at the end of its canvas (pinned). auto is what the model's "
        "metadata says. Other models ignore it. fimserver eval layouts compares the three.",
        choices=tuple(PromptLayout),
    )
    max_denoising_steps: int | None = _setting(
        default=None,
        doc="Most denoising steps for one canvas; null means the model's own number.",
        low=1,
        high=256,
    )
    temperature: float | None = _setting(
        default=None,
        doc="How freely tokens are drawn; 0 takes the most likely. null is the model's own: the most likely "
        "token, or the model's schedule in diffusion.",
        low=0,
        high=2,
    )
    seed: int | None = _setting(
        default=None,
        doc="Seed of all random draws. With a seed the text alone decides, so an editor gets no matches from "
        "elsewhere and no early first lines, and your own counts are not used. null draws a new seed each "
        "time.",
        low=0,
        high=2**63 - 1,
    )
    min_confidence: float | None = _setting(
        default=None,
        doc=f"How likely an answer or a match has to be right to be offered. null: {AUTOMATIC_CONFIDENCE:g} for "
        "automatic requests, and no limit for your own; a number counts for both, and 0 offers everything. For "
        "automatic requests your own counts (learnFromUse) correct the confidence. Above 0 no first line comes early "
        "(firstLineMs).",
        low=0,
        high=1,
    )
    learn_from_use: bool = _setting(
        default=True,
        doc="Count what is offered, accepted and rejected, on this machine only: to judge which confidence is "
        "enough, and for fimserver stats.",
    )
    candidates: int = _setting(
        default=2,
        doc="Most completions that are offered side by side when you request them; automatic requests have one.",
        low=1,
        high=3,
    )
    first_line_ms: int | None = _setting(
        default=150,
        doc="After this wait the first line of a longer completion is offered, once it is certain; the rest comes"
        " with the next request. null, or more than maxLatencyMs, always waits for the whole completion.",
        low=0,
        high=60000,
    )
    debounce_ms: int | None = _setting(
        default=None,
        doc="Pause in typing before an automatic request is computed; null adapts it (up to 250) to how fast the "
        "model answers and how fast you type.",
        low=0,
        high=2000,
    )
    max_latency_ms: int = _setting(
        default=1500,
        doc="Longest model time, the wait for other editors' requests included; then the part of the answer "
        "that is settled is used. An automatic request gets nothing after three times as long.",
        low=50,
        high=60000,
    )
    completion_items: str = _setting(
        default="auto",
        doc="Offer completions in the editor's completion menu (textDocument/completion); auto does so if the "
        "editor has no inline completion.",
        choices=("auto", "on", "off"),
    )
    engine: str = _setting(
        default="local",
        doc="What answers: fimserver's own engine with a model on this machine (local), llama.cpp in fimserver's own "
        "process with a GGUF file (llamacpp), or a server that runs already, here or elsewhere. Code goes to another "
        "machine only after you agreed.",
        choices=ENGINES,
        engine=True,
    )
    remote: Remote = _setting(  # noqa: RUF009  as for all others, a field
        default=NO_REMOTE,
        doc="Where an engine that is not local answers.",
        engine=True,
    )
    fallback: str = _setting(
        default="local",
        doc="What answers while an engine that is not local fails: fimserver's own engine with fimserver.model, or "
        "nothing.",
        choices=("local", "none"),
        engine=True,
    )
    model: str = _setting(
        default="tiny",
        doc="The shipped model's name, the name of a model that was added, or the folder of a checkpoint.",
        engine=True,
    )
    device: str = _setting(
        default="auto",
        doc="auto, cpu, cuda, cuda:N or mps (torch's names); auto takes a GPU that torch can use, else the CPU.",
        pattern=_DEVICE,
        engine=True,
    )
    threads: int = _setting(
        default=0,
        doc="CPU threads of the model; 0 means all physical cores for a model of more than 200 MB, else one less.",
        low=0,
        high=1024,
        engine=True,
    )
    context_tokens: int | None = _setting(
        default=None,
        doc="Longest prompt in tokens, never more than the model supports; null means the model's usual length, on a "
        "CPU at most what it encodes in a second.",
        low=64,
        high=262144,
        engine=True,
    )
    fp4_activations: bool = _setting(
        default=False,
        doc="Experimental, for GPUs that multiply 4-bit numbers (RTX 50xx) and models in NVFP4, if flashinfer is "
        "installed: activations are rounded to 4 bits too, which makes answers worse, if a trial at start "
        "finds it faster.",
        engine=True,
    )
    cuda_graphs: str = _setting(
        default="auto",
        doc="Whether denoising steps are captured as CUDA graphs, which saves the time of launching each kernel: auto "
        "does without them where a capture fails or differs, on makes that an error, off never captures.",
        choices=("auto", "on", "off"),
        engine=True,
    )
    idle_unload_minutes: float = _setting(
        default=30.0,
        doc="The model's memory is released after this time without a request or an edit; the next one loads it "
        "again. 0 means never.",
        low=0,
        high=1440,
        engine=True,
    )
    log_level: str = _setting(
        default="warning",
        doc="What is written to the log, by the daemon for all editors: the most verbose editor decides. Code "
        "never is.",
        choices=("error", "warning", "info", "debug"),
    )

    def threshold(self, *, invoked: bool) -> float:
        """Return how likely an offer has to be right."""
        if self.min_confidence is not None:
            return self.min_confidence
        return 0.0 if invoked else AUTOMATIC_CONFIDENCE

    def allows(self, *names: str, default: bool = True) -> bool:
        """Return whether completions are wanted in a language, by the first of its names that has an entry.

        Without any, the entry of ``*`` decides; without that, the ``default``.
        """
        languages = dict(self.languages)
        return next((languages[name] for name in (*names, ANY_LANGUAGE) if name in languages), default)


def to_wire_name(name: str) -> str:
    """Return ``max_lines`` as ``maxLines``."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


BY_WIRE_NAME = {to_wire_name(f.name): f for f in fields(Settings)}
REMOTE_BY_WIRE_NAME = {to_wire_name(f.name): f for f in fields(Remote)}
ENGINE_SETTINGS = tuple(name for name, f in BY_WIRE_NAME.items() if f.metadata["engine"])


def to_wire_value(value: Any) -> Any:
    """Return a setting's value as it is written in JSON or TOML."""
    if isinstance(value, tuple):
        return dict(value)
    if isinstance(value, Remote):
        values = {name: getattr(value, f.name) for name, f in REMOTE_BY_WIRE_NAME.items()}
        return {name: own for name, own in values.items() if own != REMOTE_BY_WIRE_NAME[name].default}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_fraction(setting: "dataclasses.Field[Any]") -> bool:
    return "float" in str(setting.type)


def allowed_values(setting: "dataclasses.Field[Any]") -> str:
    """Return the allowed values of a setting in words: for errors and for the table."""
    m = setting.metadata
    null = " or null" if "None" in str(setting.type) else ""
    if m["choices"]:
        return " | ".join(m["choices"])
    if m["pattern"]:
        return m["written"] or "auto | cpu | cuda | cuda:N | mps"
    if isinstance(setting.default, Remote):
        return f"an object with {', '.join(REMOTE_BY_WIRE_NAME)}"
    if m["low"] is not None:
        number = "number" if _is_fraction(setting) else "whole number"
        return f"{number} {m['low']} to {m['high']}{null}"
    if isinstance(setting.default, tuple):
        return 'language ids or "*", each true | false'
    return "true | false" if setting.type is bool else "text"


def _is_allowed(setting: "dataclasses.Field[Any]", value: Any) -> bool:
    m = setting.metadata
    if value is None:
        return "None" in str(setting.type)
    if setting.type is bool:
        return isinstance(value, bool)
    if m["low"] is not None:
        number = int | float if _is_fraction(setting) else int
        return isinstance(value, number) and not isinstance(value, bool) and bool(m["low"] <= value <= m["high"])
    if m["choices"]:
        return value in m["choices"]
    if isinstance(setting.default, tuple):
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and k and isinstance(v, bool) for k, v in value.items()
        )
    is_good = m["pattern"].fullmatch if m["pattern"] else bool
    return isinstance(value, str) and bool(is_good(value))


def _parse(wire_name: str, value: Any) -> Any:
    setting = BY_WIRE_NAME[wire_name]
    if isinstance(setting.default, Remote):
        return _parse_remote(wire_name, value)
    _check(wire_name, setting, value)
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    return float(value) if _is_fraction(setting) and value is not None else value


def _check(name: str, setting: "dataclasses.Field[Any]", value: Any) -> None:
    """Raise ``SettingsError`` for a value that is not allowed; one that may be a key is not repeated."""
    if not _is_allowed(setting, value):
        shown = "not the name of a place" if setting.metadata["secret"] else repr(value)
        msg = f"fimserver.{name} is {shown}; allowed: {allowed_values(setting)}"
        raise SettingsError(msg)


def _parse_remote(wire_name: str, value: Any) -> Remote:
    if not isinstance(value, Mapping):
        msg = f"fimserver.{wire_name} is {value!r}; allowed: {allowed_values(BY_WIRE_NAME[wire_name])}"
        raise SettingsError(msg)
    chosen = {}
    for key, own in value.items():
        if key not in REMOTE_BY_WIRE_NAME:
            msg = f"fimserver.{wire_name}.{key} is not a setting; the settings are: {', '.join(REMOTE_BY_WIRE_NAME)}"
            raise SettingsError(msg)
        if own is not None:
            _check(f"{wire_name}.{key}", REMOTE_BY_WIRE_NAME[key], own)
            chosen[REMOTE_BY_WIRE_NAME[key].name] = own
    return Remote(**chosen)


def parse_settings(values: Mapping[str, Any], base: Settings | None = None) -> Settings:
    """Return the settings in ``values`` (by wire name) over ``base``.

    Raises ``SettingsError``, which names the key, the value and the allowed range.
    """
    changes = {}
    for wire_name, value in values.items():
        if wire_name not in BY_WIRE_NAME:
            msg = f"fimserver.{wire_name} is not a setting; the settings are: {', '.join(BY_WIRE_NAME)}"
            raise SettingsError(msg)
        changes[BY_WIRE_NAME[wire_name].name] = _parse(wire_name, value)
    return dataclasses.replace(base or Settings(), **changes)


def read_settings(values: Mapping[str, Any], base: Settings | None = None) -> tuple[Settings, list[str]]:
    """Return settings, and one sentence for each wrong value, which is left at ``base``."""
    settings, problems = base or Settings(), []
    for wire_name, value in values.items():
        try:
            settings = parse_settings({wire_name: value}, settings)
        except SettingsError as error:
            problems.append(str(error))
    return settings, problems


def read_config_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the valid values of a ``config.toml``, by wire name, and one sentence for each problem in it.

    A missing or unreadable file has no values.
    """
    try:
        values = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{path} cannot be read ({error.strerror}); make it a readable file or remove it"]
    except UnicodeDecodeError as error:
        return {}, [f"{path} is not UTF-8 (byte {error.start}); convert it, its settings are ignored until then"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return {}, [f"{path} is not TOML ({error}); fix it, its settings are ignored until then"]
    good, problems = {}, []
    for wire_name, value in values.items():
        try:
            parse_settings({wire_name: value})
        except SettingsError as error:
            problems.append(f"{path}: {error}")
        else:
            good[wire_name] = value
    return good, problems


def to_sampling(settings: Settings, *, min_tokens: int, trace: bool = False, num_candidates: int = 1) -> Sampling:
    """Return how the engine decodes under these settings."""
    return Sampling(
        mode=MODES[settings.mode],
        seed=settings.seed,
        max_denoising_steps=settings.max_denoising_steps,
        max_latency_ms=settings.max_latency_ms,
        min_tokens=min_tokens,
        trace=trace,
        temperature=settings.temperature,
        num_candidates=num_candidates,
        prompt_layout=PromptLayout(settings.prompt_layout),
    )


def refuse_unsure(
    confidence: float, settings: Settings, adjusted: float | None = None, *, invoked: bool
) -> NoCompletion | None:
    """Return why an answer or a match is too unsure to be offered, or ``None``.

    ``adjusted`` is the confidence corrected by what the user accepted and rejected before; if given, it decides.
    """
    counts, threshold = confidence if adjusted is None else adjusted, settings.threshold(invoked=invoked)
    if counts >= threshold:
        return None
    own = "" if adjusted is None else f", {adjusted:.2f} after what you accepted before"
    hint = f"lower fimserver.minConfidence ({threshold:g}) to see such answers"
    if settings.min_confidence is None:
        hint = f"set fimserver.minConfidence, which is {threshold:g} for automatic requests, or invoke a completion"
    return NoCompletion("low_confidence", f"its confidence is {confidence:.2f}{own}; {hint}")


def to_markdown() -> str:
    """Return the table of docs/reference/settings.md."""
    rows = ["| setting | default | may be | belongs to | meaning |", "|---|---|---|---|---|"]
    parts = ((f"remote.{name}", setting) for name, setting in REMOTE_BY_WIRE_NAME.items())
    for wire_name, setting in (*BY_WIRE_NAME.items(), *parts):
        default = json.dumps(to_wire_value(setting.default)).strip('"')
        may_be = allowed_values(setting).replace("|", "\\|")
        owner = "engine" if setting.metadata["engine"] else "connection"
        rows.append(f"| `{wire_name}` | `{default}` | {may_be} | {owner} | {setting.metadata['doc']} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parent / "docs" / "reference" / "settings.md"
    text = page.read_text(encoding="utf-8")
    table = re.compile(r"^\| setting \|.*?\n(?!\|)", re.MULTILINE | re.DOTALL)
    page.write_text(table.sub(lambda _old: to_markdown(), text, count=1), encoding="utf-8")
