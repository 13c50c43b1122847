"""Ask a server with OpenAI's requests, or one of the hosted services for fill-in-the-middle that are like it.

    OpenAi      /v1/completions with a known family's prompt; else /v1/chat/completions with a question in words. If the
                address itself ends in /completions, the texts before and after the cursor are sent there (DeepSeek).
    Mistral     Codestral's /v1/fim/completions
    Inception   Mercury's /v1/fim/completions

Knows:   requests and answers.  Never: HTTP.
Source:  OpenAI's reference of completions and chat completions; docs.mistral.ai and docs.inceptionlabs.ai for theirs.
"""

from typing import Any

from fimserver.datatypes import Capabilities, FimContext, Sampling
from fimserver.engine.remote.answers import ChatReader, CodeReader, Piece
from fimserver.engine.remote.connection import Connection, Event
from fimserver.engine.remote.families import find_family
from fimserver.engine.remote.prompts import split_parts, to_raw, to_turn, undefuse
from fimserver.engine.remote.servers.server import (
    DEFAULT_CONTEXT_TOKENS,
    Request,
    ServerModel,
    choose_model,
    count_tokens,
    to_number,
)

_LINE_TOKENS = 256  # for the cursor's line, which a chat model writes again
_MOST_STOPS = 4
_HOSTED_CONTEXT_TOKENS = 8192  # of prompts to a service: more costs time and money
RAW, CHAT, SUFFIX = "raw", "chat", "suffix"


class OpenAi:
    """A server with OpenAI's requests."""

    name = "openai"
    capabilities = Capabilities(suffix=True, probabilities=True)

    async def look(self, connection: Connection, wanted: str) -> ServerModel:
        """Return the wanted model, or the first that the server lists."""
        base = connection.address.path
        if base.endswith("/completions"):
            layout = CHAT if base.endswith("/chat/completions") else SUFFIX
            return ServerModel(wanted, layout=layout, base=base)
        listed = await connection.get(to_path(base, "models"))
        models = listed.get("data", []) if isinstance(listed, dict) else []
        found = {str(model["id"]): model for model in models if isinstance(model, dict) and "id" in model}
        name = choose_model(list(found), wanted, connection.name)
        tokens = to_number(found.get(name, {}).get("max_model_len"), DEFAULT_CONTEXT_TOKENS)
        family = find_family(name)
        return ServerModel(name, tokens, family=family, layout=CHAT if family is None else RAW, base=base)

    async def prepare(self, connection: Connection, model: ServerModel) -> ServerModel:
        """Return the model: there is nothing to prepare."""
        del connection
        return model

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context."""
        parts = split_parts(context, model.prompt_characters)
        body: dict[str, Any] = {
            "max_tokens": count_tokens(context, sampling),
            "temperature": sampling.temperature or 0.0,
            "stream": True,
        }
        if model.name:
            body["model"] = model.name
        if sampling.seed is not None:
            body["seed"] = sampling.seed % 2**31
        if model.layout == CHAT:
            body["messages"] = [{"role": "user", "content": to_turn(context, parts)}]
            body["max_tokens"] += _LINE_TOKENS
            return Request(to_path(model.base, "chat/completions"), body, ChatReader(context))
        stop = ["\n"] if context.hole.max_lines == 1 else []
        if model.family is not None:
            body |= {"prompt": to_raw(parts, model.family), "logprobs": 1}
            stop += model.family.ends
        else:
            body |= {"prompt": parts.prefix, "suffix": parts.suffix}
        if stop:
            body["stop"] = stop[:_MOST_STOPS]
        ends = model.family.control_tokens if model.family is not None else ()
        return Request(to_path(model.base, "completions"), body, CodeReader(context, ends=ends, undo=undefuse))

    def read(self, event: Event) -> Piece:
        """Return the part of an answer in an event."""
        choices = event.get("choices") or []
        if not choices:
            return Piece()  # the last event may hold statistics only
        choice = choices[0]
        message = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text")
        text = message.get("content") if text is None else text
        finish = choice.get("finish_reason")
        return Piece(_to_text(text), _probabilities_of(choice), _FINISH.get(finish, "length") if finish else None)


_FINISH = {"stop": "end", "eos": "end", "eos_token": "end"}  # anything else has cut the answer


class Mistral(OpenAi):
    """Mistral's service for fill-in-the-middle."""

    name = "mistral"
    capabilities = Capabilities(suffix=True)
    model = "codestral-latest"

    async def look(self, connection: Connection, wanted: str) -> ServerModel:
        """Return the wanted model, or the service's usual one; nothing is sent."""
        name, base = wanted or self.model, connection.address.path
        return ServerModel(name, _HOSTED_CONTEXT_TOKENS, layout=SUFFIX, base=base)

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context."""
        request = super().write(model, context, sampling)
        body = dict(request.body)
        if "seed" in body:
            body["random_seed"] = body.pop("seed")
        return Request(to_path(model.base, "fim/completions"), body, request.reader)


class Inception(Mistral):
    """Inception's service: the diffusion model Mercury."""

    name = "inception"
    model = "mercury-edit-2"

    def write(self, model: ServerModel, context: FimContext, sampling: Sampling) -> Request:
        """Return the request for a context; the service has no seed."""
        request = super().write(model, context, sampling)
        return Request(request.path, {k: v for k, v in request.body.items() if k != "random_seed"}, request.reader)


def to_path(base: str, end: str) -> str:
    """Return the path of a request; nothing if the address is a whole one."""
    return "" if base.endswith("/completions") else f"/v1/{end}"


def _to_text(value: Any) -> str:
    """Return a text, or the texts of a list of parts."""
    if isinstance(value, list):
        return "".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
    return "" if value is None else str(value)


def _probabilities_of(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Return tokens with log-probabilities, in the form of completions."""
    found = choice.get("logprobs") or {}
    tokens, values = found.get("tokens") or [], found.get("token_logprobs") or []
    return tuple((str(t), float(v)) for t, v in zip(tokens, values, strict=False) if v is not None)
