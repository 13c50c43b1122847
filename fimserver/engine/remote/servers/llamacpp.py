"""Ask a llama.cpp server, which runs elsewhere or in fimserver's own process.

Where the server's tokenizer has the tokens of a known family, the prompt is fimserver's own, sent to ``/completion`` as
token ids and texts by turns; llama.cpp would read the name of a token in a text as that token, so such names are cut in
two texts. Other models get ``/infill``, for which the server writes the prompt. What a tokenizer would not have split
before the cursor is taken off the prompt, and a grammar makes the answer begin with it (token healing).

Knows:   the server's requests and answers.  Never: HTTP.
Source:  tools/server/README.md of ggml-org/llama.cpp.
"""

import math
from dataclasses import replace
from typing import Any

from fimserver.checkpoints.metadata import Healing
from fimserver.datatypes import Capabilities, FimContext, Sampling
from fimserver.engine.remote.answers import CodeReader, Piece
from fimserver.engine.remote.connection import Connection, Event
from fimserver.engine.remote.prompts import split_names, split_parts, to_pieces
from fimserver.engine.remote.servers.server import (
    DEFAULT_CONTEXT_TOKENS,
    LONGEST_USUAL_TOKENS,
    Request,
    ServerModel,
    count_tokens,
    to_number,
    verify_family,
)
from fimserver.errors import RemoteError

_FINISH = {"eos": "end", "word": "end", "limit": "length"}
_INFILL_ENDS = ("<|endoftext|>", "<|file_sep|>", "<|repo_name|>", "<|fim_pad|>", "<|im_end|>")
_PROBE_FUNCTIONS = 12  # about 150 tokens
_PROMPT_S, _LEAST_USUAL_TOKENS = 1.0, 256


class LlamaCpp:
    """llama.cpp's own server."""

    name = "llamacpp-server"
    capabilities = Capabilities(suffix=True, healing=True, token_ids=True, probabilities=True)

    def __init__(self) -> None:
        self._usual_tokens: dict[str, int] = {}  # measured, by model

    async def look(self, connection: Connection, wanted: str) -> ServerModel:
        """Return the server's model: it serves one."""
        props = await connection.get("/props")
        settings = props.get("default_generation_settings", {}) if isinstance(props, dict) else {}
        path = str(props.get("model_alias") or props.get("model_path") or wanted) if isinstance(props, dict) else wanted
        name = path.replace("\\", "/").rpartition("/")[2] or wanted or "unnamed"
        tokens = to_number(settings.get("n_ctx"), DEFAULT_CONTEXT_TOKENS) if isinstance(settings, dict) else 0

        async def tokenize(text: str, *, with_begin: bool = False) -> list[int]:
            body = {"content": text, "parse_special": True, "add_special": with_begin}
            return _ids_of(await connection.post("/tokenize", body))

        begin = tuple(await tokenize("", with_begin=True))
        found = await verify_family(name, tokenize)
        family, ids = found or (None, {})
        context_tokens = tokens or DEFAULT_CONTEXT_TOKENS
        return ServerModel(name, context_tokens, family=family, token_ids=ids, begin_ids=begin)

    async def prepare(self, connection: Connection, model: ServerModel) -> ServerModel:
        """Measure how long a prompt the server encodes in a second, once for each model."""
        usual = self._usual_tokens.get(model.name) or await _measure_prompt(connection)
        self._usual_tokens[model.name] = usual
        return replace(model, usual_tokens=usual)

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context."""
        healing = model.family.healing if model.family is not None else Healing.WORD
        parts = split_parts(context, model.prompt_characters, healing)
        body: dict[str, Any] = {
            "n_predict": count_tokens(context, sampling),
            "temperature": sampling.temperature or 0.0,
            "cache_prompt": True,
            "n_probs": 1,
            "stream": True,
        }
        if context.hole.max_lines == 1 and "\n" not in parts.healed:
            body["stop"] = ["\n"]
        if sampling.seed is not None:
            body["seed"] = sampling.seed % 2**32
        if sampling.max_latency_ms is not None:
            body["t_max_predict_ms"] = sampling.max_latency_ms
        if parts.healed:
            body["grammar"] = to_grammar(parts.healed)
        if model.family is not None:
            pieces = to_pieces(parts, model.family)
            written: list[int | str] = [*model.begin_ids]
            for is_token, text in pieces:
                written += [model.token_ids[text]] if is_token else split_names(text, model.family)
            body["prompt"] = written
            return Request("/completion", body, CodeReader(context, parts.healed, model.family.control_tokens))
        body |= {"input_prefix": parts.prefix, "input_suffix": parts.suffix}
        body["input_extra"] = [{"filename": name, "text": text} for name, text in parts.snippets]
        return Request("/infill", body, CodeReader(context, parts.healed, _INFILL_ENDS))

    def read(self, event: Event) -> Piece:
        """Return the part of an answer in an event."""
        found = event.get("completion_probabilities") or []
        probabilities = tuple((str(one["token"]), float(one["logprob"])) for one in found)
        is_last = bool(event.get("stop"))
        finish = _FINISH.get(str(event.get("stop_type")), "length") if is_last else None
        return Piece(str(event["content"]), probabilities, finish)


async def _measure_prompt(connection: Connection) -> int:
    """Return the tokens of a prompt that the server encodes in a second, by a text that is no user's."""
    text = "".join(f"def value_{i}():\n    return {i}\n" for i in range(_PROBE_FUNCTIONS))
    body = {"prompt": text, "n_predict": 1, "cache_prompt": False, "stream": False}
    try:
        answer = await connection.post("/completion", body)
    except RemoteError as error:
        if error.is_lasting:
            raise
        return _LEAST_USUAL_TOKENS  # slow, or busy
    timings = answer.get("timings", {}) if isinstance(answer, dict) else {}
    speed = timings.get("prompt_per_second") if isinstance(timings, dict) else None
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not math.isfinite(speed):
        return LONGEST_USUAL_TOKENS
    return int(min(max(speed * _PROMPT_S, _LEAST_USUAL_TOKENS), LONGEST_USUAL_TOKENS))


def to_grammar(healed: str) -> str:
    """Return a grammar (GBNF) of all texts that begin with a word."""
    escaped = "".join(_ESCAPES.get(c, c) for c in healed)
    return f'root ::= "{escaped}" [^\\x00]*'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _ids_of(answer: Any) -> list[int]:
    tokens = answer.get("tokens", []) if isinstance(answer, dict) else []
    return [token for token in tokens if isinstance(token, int)] if isinstance(tokens, list) else []
