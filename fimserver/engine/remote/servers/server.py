"""Define what fimserver asks of one kind of server, and what it finds out about a server before the first request.

    Server       the protocol: look at the server, prepare it, write a request, read a part of its answer
    ServerModel  the model that a server serves
    Request      what is sent, and how the answer is read
    verify_family   the family of a model, confirmed by the server's own tokenizer

Knows:  contexts, connections.  Never: settings, LSP.
"""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fimserver.datatypes import Capabilities, FimContext, Sampling
from fimserver.engine.remote.answers import CodeReader, Piece
from fimserver.engine.remote.connection import Connection, Event
from fimserver.engine.remote.families import FAMILIES, Family, find_family
from fimserver.errors import RemoteError

DEFAULT_CONTEXT_TOKENS = 4096  # of a server that does not say
LONGEST_USUAL_TOKENS = 8192  # what lies further from the cursor helps little
TOKENS_A_LINE = 24  # token limit of an answer per line of its hole, as for fimserver's own engine
_MOST_TOKENS = 512
_HEALED_TOKENS = 16
_CHARACTERS_PER_TOKEN, _FEWEST_CHARACTERS_PER_TOKEN = 3.5, 2.5  # of code
_LEAST_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class ServerModel:
    """A server's model: ``token_ids`` are those of the family's tokens, ``begin_ids`` of what begins every prompt.

    ``context_tokens`` are for prompt and answer; ``usual_tokens`` for a prompt that is encoded in about a second.
    ``layout`` says how a prompt is written, where a server takes several kinds; ``base`` is the address's own path.
    """

    name: str
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    usual_tokens: int = LONGEST_USUAL_TOKENS
    family: Family | None = None
    token_ids: Mapping[str, int] = field(default_factory=dict)
    begin_ids: tuple[int, ...] = ()
    layout: str = ""
    base: str = ""

    @property
    def prompt_characters(self) -> int:
        """Return the length of prompts: surely within the context, and usually within the time."""
        most = (self.context_tokens - _MOST_TOKENS) * _FEWEST_CHARACTERS_PER_TOKEN
        return max(_LEAST_CHARACTERS, int(min(most, self.usual_tokens * _CHARACTERS_PER_TOKEN)))


@dataclass(frozen=True, slots=True)
class Request:
    """A request: ``path`` is appended to the server's address.

    ``retry`` returns a second request if the first one's answer, which is in its reader, cannot be used.
    """

    path: str
    body: Mapping[str, Any]
    reader: CodeReader
    retry: "Callable[[], Request | None]" = lambda: None


class Server(Protocol):
    """One kind of server."""

    name: str
    capabilities: Capabilities

    async def look(self, connection: Connection, wanted: str) -> ServerModel:
        """Return the model to use; ``wanted`` is its name or empty. Sends no code. Raises ``RemoteError``."""

    async def prepare(self, connection: Connection, model: ServerModel) -> ServerModel:
        """Make the server ready for requests, and return what that showed of the model. Sends no code.

        May take longer than an answer. Raises ``RemoteError``.
        """

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context."""

    def read(self, event: Event) -> Piece:
        """Return the part of an answer in an event. Raises ``LookupError``, ``TypeError`` or ``ValueError``."""


def count_tokens(context: FimContext, sampling: Sampling) -> int:
    """Return the longest answer in tokens."""
    wanted = TOKENS_A_LINE * context.hole.max_lines
    return min(wanted, sampling.max_tokens or _MOST_TOKENS, _MOST_TOKENS) + _HEALED_TOKENS


def to_number(value: Any, default: int) -> int:
    """Return a positive whole number that a server reports, or the default."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


Tokenize = Callable[[str], Coroutine[Any, Any, list[int]]]


async def verify_family(model: str, tokenize: Tokenize) -> tuple[Family, dict[str, int]] | None:
    """Return the first family whose tokens are one token each, with their ids; the one named like the model first."""
    named = find_family(model)
    rest = (family for family in FAMILIES if family is not named)
    for family in (*((named,) if named else ()), *rest):
        ids: dict[str, int] = {}
        for token in (*family.tokens, family.repository, family.file_separator):
            found = await tokenize(token) if token else []
            if len(found) == 1:
                ids[token] = found[0]
            elif token:
                break
        else:
            if len(set(ids.values())) == len(ids):
                return family, ids
    return None


def choose_model(listed: list[str], wanted: str, server: str) -> str:
    """Return the wanted one of a server's models, or the first. Raises ``RemoteError`` that lists them."""
    if wanted and (wanted in listed or not listed):
        return wanted
    if wanted or not listed:
        names = ", ".join(listed[:10]) or "no model at all"
        wish = f"not {wanted}, but {names}" if wanted else names
        msg = f"the server at {server} offers {wish}; set fimserver.remote.model to one that it has"
        raise RemoteError(msg, is_lasting=True)
    return listed[0]
