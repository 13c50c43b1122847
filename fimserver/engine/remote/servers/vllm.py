"""Ask a vLLM server; one that serves DiffusionGemma fills a canvas that fimserver lays out.

A canvas request gives the ids of fimserver's own prompt, and a canvas of as many tokens as the hole may need: what was
typed of the first word, pinned; then the last answer, if the text still begins with it; then random tokens. vLLM
denoises it for a few steps and returns what the model would write at every position, the pinned ones included. There
the model writes the whole word that it would take for the pinned part, which is token healing. If that does not begin
with what was typed, a second canvas has the likeliest token pinned that does; without one, the answer is not used. It
ends at the first token that is not text.

That needs the same tokenizer on both sides, which is asked of the server once with a word of fimserver's own, and
vLLM's request fields for canvases, which are tried once; their answers also say how long a canvas may be. A server
without them gets the ids alone; one with another tokenizer gets a prompt as text, or a question in words
(``openai.py``), without the temperature that vLLM refuses for diffusion models.

Knows:   the server's requests and answers, the tokenizer of ``fimserver.model``.  Never: HTTP.
Source:  vllm/utils/diffusion.py and vllm/model_executor/models/diffusion_gemma.py of vllm-project/vllm 0.32.
"""

import math
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fimserver.checkpoints.folder import read_json
from fimserver.checkpoints.installed import find_added
from fimserver.checkpoints.known import SHIPPED_MODELS, shipped_names
from fimserver.checkpoints.metadata import Canvas, ModelMetadata, limit_context, read_metadata
from fimserver.datatypes import Capabilities, FimContext, Sampling
from fimserver.engine.prompt import Prompt, build_prompt
from fimserver.engine.remote.answers import CodeReader, Piece
from fimserver.engine.remote.connection import Connection, Event
from fimserver.engine.remote.servers.openai import CHAT, RAW, SUFFIX, OpenAi, to_path
from fimserver.engine.remote.servers.server import (
    TOKENS_A_LINE,
    Request,
    ServerModel,
    count_tokens,
    verify_family,
)
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import RemoteError, WeightsError

CANVAS, IDS = "canvas", "ids"  # layouts
_PROBE = "def probe(value):\n    return value + 1  # a line of fimserver's own\n"
# One long word, since transformers' class for Gemma's tokenizers splits spaces off in its own way.
_WORD = "defreturnimportclassself_functionconstpublicstruct"
_STEPS = 8  # of denoising: later ones change little
_MOST_TOPS = 20  # likeliest tokens that a server reports by default
_MOST_WORDS = 32  # whose probabilities are asked for by name, at every position: a server allows 128
_ID_PREFIX = "token_id:"
_LEAST_CANVAS = 8
_PROBE_CANVAS = 8
_REFUSED = ("temperature", "seed")  # by vLLM, in requests to diffusion models


@dataclass(frozen=True, slots=True)
class Own:
    """What fimserver knows of the model itself: its record, its tokenizer, the length of its canvas."""

    metadata: ModelMetadata
    vocabulary: Vocabulary
    canvas_length: int


def find_own(name: str) -> Own | None:
    """Return what this machine knows of a model that a server names.

    It may be a shipped one, one that was added, or one whose config and tokenizer are in the Hugging Face cache.
    ``None`` for any other, for one without a canvas of random tokens, and for one that cannot be read.
    """
    folder = SHIPPED_MODELS / name if name in shipped_names() else find_added(name, needs_weights=False)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        metadata = read_metadata(folder)
        length = metadata.canvas_length or read_json(folder / "config.json").get("canvas_length")
        if metadata.canvas is not Canvas.UNIFORM or not isinstance(length, int):
            return None
        return Own(metadata, Vocabulary.load(folder / "tokenizer.json", metadata.special_ids), length)
    except WeightsError:
        return None


class Vllm(OpenAi):
    """A vLLM server. ``find`` returns what is known here of a model by its name on the server.

    ``salt`` keeps the server's cache of prompts apart from that of its other users, who could otherwise find out by the
    time of an answer that somebody's prompt begins like theirs.
    """

    name = "vllm"
    capabilities = Capabilities(canvas=True, suffix=True, token_ids=True, probabilities=True)

    def __init__(self, find: Callable[[str], Own | None] = lambda _name: None, salt: str = "") -> None:
        self._find = find
        self._is_plain = False  # takes no temperature and no seed
        self._salt = salt or secrets.token_hex(16)
        self._own: Own | None = None
        self.capabilities = replace(type(self).capabilities, canvas=False, token_ids=False)
        self._last: tuple[str, str] = ("", "")  # prefix and answer of the last request
        self._random = random.Random()  # noqa: S311  noise for a canvas

    async def look(self, connection: Connection, wanted: str) -> ServerModel:
        """Return the model, and how prompts are written for it."""
        model = await super().look(connection, wanted)
        if model.layout == SUFFIX:
            return model
        self._own = self._find(model.name)
        if self._own is not None and await self._has_own_tokens(connection, model, self._own):
            length = await self._find_canvas_length(connection, model, self._own)
            layout = CANVAS if length else IDS
            self._own = replace(self._own, canvas_length=length or self._own.canvas_length)
            self.capabilities = replace(self.capabilities, canvas=layout == CANVAS, token_ids=True)
            return replace(model, layout=layout, family=None)

        async def tokenize(text: str) -> list[int]:
            return await _tokenize(connection, model, text)

        if model.family is None:
            return model
        try:
            found = await verify_family(model.name, tokenize)
        except RemoteError as error:
            if error.is_lasting:  # a server without such requests: the name has to do
                return model
            raise
        family, ids = found or (None, {})
        return replace(model, family=family, token_ids=ids, layout=RAW if found else CHAT)

    async def prepare(self, connection: Connection, model: ServerModel) -> ServerModel:
        """Find out whether the model takes a temperature: vLLM refuses it for diffusion models."""
        self._is_plain = False
        if model.layout == CHAT:
            body = {"model": model.name, "messages": [{"role": "user", "content": _PROBE}], "max_tokens": 1}
            path = to_path(model.base, "chat/completions")
            try:
                await connection.post(path, {**body, "temperature": 0.0})
            except RemoteError as error:
                if not error.is_lasting:
                    raise
                await connection.post(path, body)
                self._is_plain = True
        return model

    async def _has_own_tokens(self, connection: Connection, model: ServerModel, own: Own) -> bool:
        try:
            return await _tokenize(connection, model, _WORD) == own.vocabulary.encode(_WORD)
        except RemoteError as error:
            if error.is_lasting:  # a server without such requests
                return False
            raise

    async def _find_canvas_length(self, connection: Connection, model: ServerModel, own: Own) -> int:
        """Return how long a canvas may be on the server; 0 if it ignores or refuses the fields for canvases.

        A server may be started with a shorter canvas than the model's, and refuses longer ones.
        """
        ids = own.vocabulary.encode(_PROBE)
        body = _body(model, [own.metadata.special_tokens["bos"], *ids])

        async def count(fields: dict[str, Any]) -> int:
            answer = await connection.post(to_path(model.base, "completions"), {**body, **fields})
            return len(answer["choices"][0].get("token_ids") or [])

        try:
            if await count(_canvas_fields([ids[0]] * _PROBE_CANVAS, [], 1)) != _PROBE_CANVAS:
                return 0
            whole = {"diffusion_max_steps": 1, "diffusion_read_only": True}  # as long as the server has it
            return min(own.canvas_length, await count({"max_tokens": own.canvas_length, "vllm_xargs": whole}))
        except RemoteError as error:
            if error.is_lasting:
                return 0
            raise

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context."""
        if model.layout in {CANVAS, IDS} and self._own is not None:
            return self._write_ids(model, context, sampling, self._own)
        request = super().write(model, context, sampling)
        refused = _REFUSED if self._is_plain else ()
        body = {name: value for name, value in request.body.items() if name not in refused}
        return replace(request, body={**body, "cache_salt": self._salt})

    def _write_ids(self, model: ServerModel, context: FimContext, sampling: Sampling, own: Own) -> Request:
        metadata = limit_context(own.metadata, min(model.usual_tokens, model.context_tokens - own.canvas_length))
        prompt = build_prompt(context, own.vocabulary, metadata)
        body = {**_body(model, list(prompt.token_ids)), "cache_salt": self._salt}
        path = to_path(model.base, "completions")
        if model.layout == IDS:
            body["max_tokens"] = count_tokens(context, sampling)
            return Request(path, body, IdsReader(context, prompt, own))
        return self._write_canvas(path, body, context, sampling, prompt, own)

    def _write_canvas(  # noqa: PLR0913, PLR0917  what a canvas is made of
        self, path: str, body: dict[str, Any], context: FimContext, sampling: Sampling, prompt: Prompt, own: Own
    ) -> Request:
        """Return the request for a canvas, with a second one for an answer that does not begin with what was typed."""
        vocabulary, metadata = own.vocabulary, own.metadata
        healed = vocabulary.encode(prompt.healed)
        length = min(own.canvas_length, max(_LEAST_CANVAS, len(healed) + TOKENS_A_LINE * context.hole.max_lines))
        chance = self._random if sampling.seed is None else random.Random(sampling.seed)  # noqa: S311
        steps = min(sampling.max_denoising_steps or _STEPS, metadata.max_denoising_steps)

        def lay_out(start: list[int], pinned: int) -> dict[str, Any]:
            noise = (chance.randrange(metadata.num_special_tokens, vocabulary.size) for _ in range(length))
            canvas = [*start[:length], *noise][:length]
            return {**body, **_canvas_fields(canvas, list(range(min(pinned, length))), steps)}

        def remember(text: str) -> None:
            self._last = context.prefix, text

        def retry() -> Request | None:
            found = reader.find_whole_word(knows_all="logprob_token_ids" in named)
            if found is None:
                return None
            return Request(path, lay_out([found[0]], 1), IdsReader(context, prompt, own, remember, held=found))

        reader = IdsReader(context, prompt, own, remember)
        start = healed + (self._warm_start(context, own) if sampling.seed is None else [])
        if not prompt.healed.strip():
            return Request(path, lay_out(start, 0), reader)
        whole = lay_out(start, len(healed))
        typed = prompt.healed.encode()
        if not (words := vocabulary.starting_with(typed)):
            return Request(path, whole, reader)
        words += vocabulary.beginning_of(typed)
        named = {"logprob_token_ids": words} if len(words) <= _MOST_WORDS else {"logprobs": _MOST_TOPS}
        return Request(path, {**whole, **named, "return_tokens_as_token_ids": True}, reader, retry)

    def _warm_start(self, context: FimContext, own: Own) -> list[int]:
        """Return the rest of the last answer, if what was typed since is its beginning."""
        prefix, text = self._last
        typed = context.prefix.removeprefix(prefix)
        if not prefix or typed == context.prefix or not text.startswith(typed) or typed == text:
            return []
        return [*own.vocabulary.encode(text[len(typed) :]), own.metadata.special_tokens["eos"]]

    def read(self, event: Event) -> Piece:
        """Return the part of an answer in an event; ids are kept for the reader."""
        piece = super().read(event)
        choice = (event.get("choices") or [{}])[0]
        ids = choice.get("token_ids")
        if ids is None:
            return piece
        tops = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
        named = ((name.removeprefix(_ID_PREFIX), float(value)) for name, value in (tops[0] or {}).items())
        first = tuple(
            (int(number), value)
            for number, value in named
            if number.isascii() and number.isdigit() and math.isfinite(value)
        )
        return replace(piece, token_ids=tuple(int(i) for i in ids), first_ids=first)


class IdsReader(CodeReader):
    """Reads an answer in token ids: of a canvas, or of an answer that is written in order.

    ``remember`` gets the text of a whole canvas. ``held`` is the id that was pinned at its beginning, with its
    log-probability: it is the answer's, whatever the server writes there.
    """

    def __init__(
        self,
        context: FimContext,
        prompt: Prompt,
        own: Own,
        remember: Callable[[str], None] = lambda _text: None,
        held: tuple[int, float] | None = None,
    ) -> None:
        super().__init__(context, prompt.healed)
        self._prompt, self._own, self._remember, self._held = prompt, own, remember, held
        self._ids: list[int] = []
        self._first_ids: tuple[tuple[int, float], ...] = ()

    def add(self, piece: Piece) -> None:
        """Take the next ids. Raises ``ValueError`` for ids that the tokenizer does not have."""
        if piece.token_ids is None:
            super().add(replace(piece, text=""))
            return
        vocabulary, ids = self._own.vocabulary, list(piece.token_ids)
        if any(not 0 <= i < vocabulary.size for i in ids):
            msg = "the answer has token ids that the tokenizer does not have"
            raise ValueError(msg)
        given = piece.log_probabilities
        if not self._ids:
            self._first_ids = tuple(pair for pair in piece.first_ids if 0 <= pair[0] < vocabulary.size)
            if self._held is not None:
                ids[:1], given = self._held[:1], (("", self._held[1]), *given[1:])
        end = next((i for i, token_id in enumerate(ids) if not vocabulary.is_text(token_id)), None)
        whole = self._ids + (ids if end is None else ids[:end])
        before = vocabulary.decode(self._ids)
        self._ids = whole
        text = vocabulary.decode(whole)
        probabilities = _align(vocabulary, ids[:end], given)
        finish = "end" if end is not None else piece.finish
        super().add(Piece(text.removeprefix(before), probabilities, finish))
        is_over = piece.finish is not None or end is not None
        if is_over and text.startswith(self._prompt.healed):
            self._remember(text[len(self._prompt.healed) :])

    def find_whole_word(self, *, knows_all: bool) -> tuple[int, float] | None:
        """Return the likeliest token that begins with what was typed of the first word, among those that are known.

        If all tokens are known that what was typed may begin with, its log-probability is that among them, because
        what was typed is certain.
        """
        typed, texts = self._prompt.healed.encode(), self._own.vocabulary.token_bytes
        whole = [(value, i) for i, value in self._first_ids if texts[i].startswith(typed)]
        if not whole:
            return None
        best, token = max(whole)
        parts = [(value, i) for i, value in self._first_ids if texts[i] and typed.startswith(texts[i])]
        others = sum(math.exp(value - best) for value, i in {*whole, *parts} if i != token)
        return token, -math.log1p(others) if knows_all else best


def _align(
    vocabulary: Vocabulary, ids: list[int], given: tuple[tuple[str, float], ...]
) -> tuple[tuple[str, float], ...]:
    """Return the log-probabilities with the tokens' own texts: a server may write them in another way."""
    pairs = zip(ids, given, strict=False)
    return tuple((vocabulary.token_bytes[i].decode("utf-8", "replace"), value) for i, (_, value) in pairs)


def _body(model: ServerModel, prompt: list[int]) -> dict[str, Any]:
    """Return the part that all requests with ids share. vLLM refuses a temperature for diffusion models."""
    return {"model": model.name, "prompt": prompt, "logprobs": 1, "return_token_ids": True, "stream": False}


def _canvas_fields(canvas: list[int], pinned: list[int], steps: int) -> dict[str, Any]:
    fields = {
        "diffusion_canvas_length": len(canvas),
        "diffusion_seed_canvas": canvas,
        "diffusion_pinned": pinned,
        "diffusion_max_steps": steps,
        "diffusion_read_only": True,
    }
    return {"max_tokens": len(canvas), "vllm_xargs": fields}


async def _tokenize(connection: Connection, model: ServerModel, text: str) -> list[int]:
    body = {"model": model.name, "prompt": text, "add_special_tokens": False}
    answer = await connection.post("/tokenize", body)
    tokens = answer.get("tokens", []) if isinstance(answer, dict) else []
    return [token for token in tokens if isinstance(token, int)]
