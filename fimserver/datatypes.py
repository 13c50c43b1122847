"""Every value that crosses a room's wall: frozen, slotted, plain data.

    Snapshot -> find_hole -> Hole -> build_context -> FimContext     lsp/ and context/
    FimContext + Sampling -> engine -> Draft ... Generation          engine/
    Generation -> to_completion -> Completion | NoCompletion         context/

Offsets are code points of ``Snapshot.text``, ends exclusive.
"""

from dataclasses import dataclass
from enum import StrEnum


class HoleKind(StrEnum):
    """What may be filled at the cursor."""

    REST_OF_LINE = "rest_of_line"
    EXPRESSION = "expression"
    STATEMENT = "statement"
    BLOCK = "block"
    DOCSTRING = "docstring"
    COMMENT = "comment"
    STRING = "string"
    SPAN = "span"  # any text at all: holes cut by an evaluation


class Mode(StrEnum):
    """How the middle is decoded; ``AUTO`` leaves it to the model's own metadata.

    ``VERIFIED`` drafts ahead and verifies from left to right: the text of ``AUTOREGRESSIVE`` in fewer passes.
    """

    AUTO = "auto"
    DIFFUSION = "diffusion"
    SPECULATIVE = "speculative"
    AUTOREGRESSIVE = "autoregressive"


class Verdict(StrEnum):
    """What a language's rules say of a text that would go on with an answer.

    ``END``: the answer is whole before it, since the text behind the cursor goes on with the same.
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
    """What may be filled: at most ``max_lines`` lines, the cursor's own line counted.

    ``replaceable`` is how many characters behind the cursor an editor typed to close what the line opened: an
    answer may replace them.
    """

    kind: HoleKind
    max_lines: int
    estimated_tokens: int
    replaceable: int = 0


@dataclass(frozen=True, slots=True)
class NoCompletion:
    """Nothing is offered, and why: a short machine word and a sentence for the person."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of another file that may help."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Match:
    """One text for the middle.

    ``match_length`` characters of code before the cursor are the same where it was found (blanks do not count),
    ``agreement`` characters behind it are what stands behind the cursor; it was found ``count`` times, the first
    time in the source number ``source`` (0 is the document itself).
    """

    text: str
    match_length: int
    agreement: int
    count: int = 1
    source: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the best guess first."""
        likely = self.match_length + 2 * min(self.agreement, 12) + 3 * min(self.count, 5)
        return -likely, self.source


@dataclass(frozen=True, slots=True)
class FimContext:
    r"""Everything the engine is told; line ends are ``\n``, budgets are in characters.

    ``head`` has whole lines of the file that stand somewhere above ``prefix``: imports, headers of open scopes.
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
    "matches": "what followed the same text elsewhere: as drafts, and as answers where they are likelier",
    "lookup": "drafts from the prompt's own repetitions",
    "canvases": "drafts from canvases in the verifying pass",
    "cut": "cutting a canvas behind its end",
    "top": "self-conditioning on the likeliest tokens instead of all",
    "earlier": "drafts from earlier answers",
    "grammar": "refusing tokens that the language does not allow",
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode. ``None`` means what the model's own metadata says.

    ``max_latency_ms`` ends a completion at its best draft; an answer has at least ``min_tokens`` (0 or 1)
    tokens; ``trace`` adds every canvas to drafts; ``temperature`` 0 takes the likeliest tokens; of
    ``num_candidates`` distinct answers that are written the best is the answer and the others are its alternatives, as
    are guesses that were looked at on the way. ``without`` names parts of the decoder to leave out, for measurements
    (``PARTS``).
    """

    mode: Mode = Mode.AUTO
    seed: int | None = None
    max_denoising_steps: int | None = None
    max_latency_ms: int | None = None
    min_tokens: int = 0
    trace: bool = False
    temperature: float | None = None
    num_candidates: int = 1
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CanvasToken:
    """One canvas position in a trace: its text and whether the sampler kept it."""

    text: str
    accepted: bool
    entropy: float


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """The best answer after one step; ``canvas`` is filled only when a trace was asked for.

    The first ``num_settled`` characters stay as they are whatever comes: who shows them need not take them back.
    """

    step: int
    text: str
    num_settled: int = 0
    canvas: tuple[CanvasToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another answer to the same request."""

    text: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine answers: raw text of the middle and what it cost.

    ``finish``: ``end`` the answer ended by itself, ``length`` canvas or token budget full,
    ``steps`` denoising steps spent, ``latency`` time spent.
    ``timings_ms`` has prompt, encode, decode and total; ``confidence`` is the probability that the answer is right,
    or, of a model that is not calibrated, the geometric mean of the probabilities of its own tokens. ``is_match``: the
    text is a guess of the context that was found likelier than what the model wrote.
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


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine says of its model once it is loaded; budgets are in tokens."""

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
    languages: tuple[str, ...] = ()  # that the model was trained on; none named means any
    kernels: str = ""  # that multiply by weights in 4 bits, and what was found of others
    row_cost: float | None = None  # of one more row in a pass, in passes over one row; None where it was not probed


@dataclass(frozen=True, slots=True)
class Completion:
    """Text to offer: ``middle`` replaces ``[replace_start, replace_end)`` of the snapshot."""

    id: str
    middle: str
    replace_start: int
    replace_end: int
