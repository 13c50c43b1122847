"""Define every value passed between packages: frozen, slotted, plain data.

    Snapshot -> find_hole -> Hole -> build_context -> FimContext             lsp/ and context/
    FimContext + Sampling -> engine -> PartialAnswer ... Generation          engine/
    Generation -> to_completion -> Completion | NoCompletion                 context/

Offsets are code points of ``Snapshot.text``, ends exclusive.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fimserver.errors import FrameError

T = typing.TypeVar("T")


class HoleKind(StrEnum):
    """The kind of text to fill at the cursor."""

    REST_OF_LINE = "rest_of_line"
    EXPRESSION = "expression"
    STATEMENT = "statement"
    BLOCK = "block"
    DOCSTRING = "docstring"
    COMMENT = "comment"
    STRING = "string"
    SPAN = "span"  # any text: holes made by an evaluation


class PromptLayout(StrEnum):
    """How an instruction-tuned model is asked; ``AUTO`` is what its metadata says.

    ``CONTINUE``: the model's turn repeats the prefix, and the answer continues it. ``DESCRIBE``: the user's turn shows
    the code with a mark in place of the hole. ``PINNED``: as ``CONTINUE``, and the suffix's first tokens stand at the
    end of the canvas.
    """

    AUTO = "auto"
    CONTINUE = "continue"
    DESCRIBE = "describe"
    PINNED = "pinned"


class Mode(StrEnum):
    """How the middle is decoded; ``AUTO`` uses the model's preferred mode.

    ``SPECULATIVE`` drafts tokens and verifies them: the text of ``AUTOREGRESSIVE`` in fewer passes.
    """

    AUTO = "auto"
    DIFFUSION = "diffusion"
    SPECULATIVE = "speculative"
    AUTOREGRESSIVE = "autoregressive"

    @classmethod
    def _missing_(cls, value: object) -> "Mode | None":
        return cls.SPECULATIVE if value == "verified" else None  # an alias, in settings and model folders


class Verdict(StrEnum):
    """A language's verdict on text that would continue an answer.

    ``END``: the answer is complete before it, since the text after the cursor continues with the same.
    """

    ALLOWED = "allowed"
    FORBIDDEN = "forbidden"
    END = "end"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One document at the moment a request arrived; ``cursor`` is an offset into ``text``."""

    uri: str
    version: int
    language_id: str
    text: str
    cursor: int


@dataclass(frozen=True, slots=True)
class Hole:
    """The place to fill: at most ``max_lines`` lines, including the cursor's own.

    ``replaceable`` is the number of characters after the cursor that an editor typed to close brackets or quotes of the
    line: an answer may replace them.
    """

    kind: HoleKind
    max_lines: int
    estimated_tokens: int
    replaceable: int = 0


@dataclass(frozen=True, slots=True)
class NoCompletion:
    """The reason why nothing is offered: a short machine-readable word and a sentence for the user."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of another file that may help."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Match:
    """A text for the middle that followed the same code elsewhere.

    ``match_length`` characters of code before the cursor also precede it there (spaces do not count), ``agreement``
    characters after it equal the text after the cursor; it was found ``count`` times, first in the source number
    ``source`` (0 is the document itself).
    """

    text: str
    match_length: int
    agreement: int
    count: int = 1
    source: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Return a key that sorts the best match first."""
        likely = self.match_length + 2 * min(self.agreement, 12) + 3 * min(self.count, 5)
        return -likely, self.source


@dataclass(frozen=True, slots=True)
class FimContext:
    r"""The engine's input; line ends are ``\n``, budgets are in characters.

    ``head`` has whole lines of the file above ``prefix``: imports, headers of open scopes.
    """

    prefix: str
    suffix: str
    path: str
    language_id: str
    hole: Hole
    head: str = ""
    snippets: tuple[Snippet, ...] = ()
    matches: tuple[Match, ...] = ()


PARTS = {
    "matches": "n-gram matches: as drafts, and as answers if they are more likely",
    "lookup": "drafts from the prompt's own repetitions",
    "canvases": "drafts from canvases in the verification pass",
    "cut": "shortening a canvas to the answer's end",
    "top": "self-conditioning on the most likely tokens instead of all",
    "earlier": "drafts from earlier answers",
    "grammar": "rejecting tokens that the language does not allow",
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decoding options of a request. ``None`` means the default in the model's metadata.

    ``max_latency_ms`` ends a completion with its best partial answer; an answer has at least ``min_tokens`` (0 or 1)
    tokens, and at most ``max_tokens`` after what was typed of its first word; ``trace`` adds every canvas to partial
    answers; ``temperature`` 0 is greedy. Of ``num_candidates`` distinct answers the best is returned and the others are
    its alternatives, as are the matches that were scored. ``without`` names parts of the decoder to leave out, for
    measurements (``PARTS``). ``prompt_layout`` only concerns instruction-tuned models.
    """

    mode: Mode = Mode.AUTO
    seed: int | None = None
    max_denoising_steps: int | None = None
    max_latency_ms: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    trace: bool = False
    temperature: float | None = None
    num_candidates: int = 1
    without: tuple[str, ...] = ()
    prompt_layout: PromptLayout = PromptLayout.AUTO


@dataclass(frozen=True, slots=True)
class CanvasToken:
    """One canvas position in a trace: its text and whether the sampler kept it."""

    text: str
    accepted: bool
    entropy: float


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """The best answer after one step; ``canvas`` is filled only if ``trace`` is set.

    The first ``num_settled`` characters are final, so a client can show them without retracting any.
    """

    step: int
    text: str
    num_settled: int = 0
    canvas: tuple[CanvasToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another answer to the same request; ``is_whole`` and ``is_match`` are those of ``Generation``."""

    text: str
    confidence: float
    is_whole: bool = True
    is_match: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """The engine's output: raw text of the middle and its costs.

    ``finish``: ``end`` the answer ended, ``length`` canvas or token budget full,
    ``steps`` denoising steps spent, ``latency`` time spent.
    ``timings_ms`` has prompt, encode, decode and total; ``confidence`` is the probability that the answer is right, or,
    for a model that is not calibrated, the geometric mean of its tokens' probabilities. ``is_match``: the text is an
    n-gram match that is more likely than the model's own answer. ``is_whole``: no limit ended the text. ``engine``,
    ``server`` and ``sent_bytes`` say what answered, and how much of the request left this process.
    """

    text: str
    mode: Mode
    finish: str
    num_tokens: int
    denoising_steps: int
    forward_passes: int
    cached_tokens: int
    prompt_tokens: int
    timings_ms: dict[str, float]
    prompt_text: str = ""
    confidence: float = 1.0
    alternatives: tuple[Alternative, ...] = ()
    is_match: bool = False
    is_whole: bool = True
    engine: str = "local"
    server: str = ""
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do other than complete a text.

    ``canvas``: parallel decoding of a canvas that may be given. ``suffix``: it reads the text after the cursor.
    ``healing``: the word before the cursor may be spelled again. ``token_ids``: prompts may be ids.
    ``probabilities``: it reports those of its tokens, so that answers have a confidence.
    """

    canvas: bool = False
    suffix: bool = True
    healing: bool = False
    token_ids: bool = False
    probabilities: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Description of the loaded model; budgets are in tokens.

    ``server`` is the address of an engine that is not in fimserver's own process; empty for the others.
    """

    name: str
    device: str
    dtype: str
    num_parameters: int
    max_prompt_tokens: int
    canvas_length: int
    preferred_mode: Mode
    load_ms: float
    num_threads: int
    reads_snippets: bool = False
    languages: tuple[str, ...] = ()  # of the training data; empty means any
    kernels: str = ""  # the matmul backend for 4-bit weights, and the result for every other one
    graphs: str = ""  # on a GPU: which passes are CUDA graphs, or why none is
    row_cost: float | None = None  # of one more row in a pass, in passes over one row; None if not measured
    engine: str = "local"
    server: str = ""
    capabilities: Capabilities = Capabilities()


@dataclass(frozen=True, slots=True)
class Completion:
    """Text to offer: ``middle`` replaces ``[replace_start, replace_end)`` of the snapshot."""

    id: str
    middle: str
    replace_start: int
    replace_end: int


def to_plain(value: Any) -> dict[str, Any]:
    """Convert a dataclass to JSON values."""
    return dataclasses.asdict(value)


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from JSON values; the inverse of ``to_plain``. Raises for values of other types."""
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
        msg = f"a {type(value).__name__} was found in place of a {hint}"
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
