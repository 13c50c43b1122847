"""Ask an Ollama server.

A model of a known family gets fimserver's own prompt (``raw``), another one with a template for fill-in-the-middle the
texts before and after the cursor.

Knows:   the server's requests and answers.  Never: HTTP.
Source:  docs/api.md of ollama/ollama.
"""

from typing import Any

from fimserver.datatypes import Capabilities, FimContext, Sampling
from fimserver.engine.remote.answers import CodeReader, Piece
from fimserver.engine.remote.connection import Connection, Event
from fimserver.engine.remote.families import find_family
from fimserver.engine.remote.prompts import split_parts, to_raw, undefuse
from fimserver.engine.remote.servers.server import Request, ServerModel, choose_model, count_tokens, to_number
from fimserver.errors import RemoteError

_CONTEXT_TOKENS = 4096  # asked for: another number would load the model again
_LOAD_TIMEOUT_S = 180.0  # Ollama stops loading a model when the request that wants it is closed
_RAW, _SUFFIX = "raw", "suffix"


class Ollama:
    """An Ollama server."""

    name = "ollama"
    capabilities = Capabilities(suffix=True, probabilities=True)

    async def look(self, connection: Connection, wanted: str) -> ServerModel:
        """Return the wanted model, or the first that the server has."""
        listed = await connection.get("/api/tags")
        models = listed.get("models", []) if isinstance(listed, dict) else []
        names = [str(model["name"]) for model in models if isinstance(model, dict) and "name" in model]
        if wanted and ":" not in wanted and f"{wanted}:latest" in names:
            wanted = f"{wanted}:latest"
        name = choose_model(names, wanted, connection.name)
        shown = await connection.post("/api/show", {"model": name})
        shown = shown if isinstance(shown, dict) else {}
        info = shown.get("model_info", {})
        lengths = [v for k, v in info.items() if k.endswith(".context_length")] if isinstance(info, dict) else []
        tokens = min(to_number(lengths[0] if lengths else None, _CONTEXT_TOKENS), _CONTEXT_TOKENS)
        family = find_family(name)
        if family is None and "insert" not in (shown.get("capabilities") or []):
            msg = (
                f"the model {name} on the server at {connection.name} has no template for fill-in-the-middle; set "
                "fimserver.remote.model to a code model, for instance qwen2.5-coder:1.5b-base"
            )
            raise RemoteError(msg, is_lasting=True)
        return ServerModel(name, tokens, family=family, layout=_SUFFIX if family is None else _RAW)

    async def prepare(self, connection: Connection, model: ServerModel) -> ServerModel:
        """Load the model into the server's memory, in the length that requests ask for."""
        body = {"model": model.name, "options": {"num_ctx": model.context_tokens}}
        await connection.post("/api/generate", body, _LOAD_TIMEOUT_S)
        return model

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context."""
        parts = split_parts(context, model.prompt_characters)
        options: dict[str, Any] = {
            "num_predict": count_tokens(context, sampling),
            "num_ctx": model.context_tokens,
            "temperature": sampling.temperature or 0.0,
        }
        if sampling.seed is not None:
            options["seed"] = sampling.seed % 2**31
        family = model.family
        ends = family.control_tokens if family is not None else ()
        options["stop"] = [*(["\n"] if context.hole.max_lines == 1 else []), *ends]
        body: dict[str, Any] = {"model": model.name, "options": options, "stream": True, "logprobs": True}
        if family is not None:
            body |= {"prompt": to_raw(parts, family), "raw": True}
        else:
            body |= {"prompt": parts.prefix, "suffix": parts.suffix}
        return Request("/api/generate", body, CodeReader(context, ends=ends, undo=undefuse))

    def read(self, event: Event) -> Piece:
        """Return the part of an answer in an event."""
        found = event.get("logprobs") or []
        probabilities = tuple((str(one["token"]), float(one["logprob"])) for one in found)
        finish = None
        if event.get("done"):
            finish = "length" if event.get("done_reason") == "length" else "end"
        return Piece(str(event["response"]), probabilities, finish)
