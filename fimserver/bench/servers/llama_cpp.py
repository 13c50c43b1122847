"""Ask a llama.cpp server to fill in the middle, as its editor plugins do.

Knows:   HTTP, one request after another.  Never: our engine.
Source:  ``POST /infill`` in llama.cpp's tools/server/README.md.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from fimserver.errors import FimserverError

_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Reply:
    """A middle, the milliseconds until it was there, and the tokens of the prompt that were encoded for it."""

    text: str
    ms: float
    encoded_tokens: int


class LlamaCpp:
    """A llama.cpp server with a model that has tokens for fill-in-the-middle."""

    def __init__(self, url: str) -> None:
        """Take the server's address, such as ``http://127.0.0.1:8080``. Raises ``FimserverError``."""
        if urlsplit(url).scheme not in {"http", "https"}:
            msg = f"{url!r} is not an address; write for example http://127.0.0.1:8080"
            raise FimserverError(msg)
        self.url = url.rstrip("/")

    def infill(self, prefix: str, suffix: str, *, max_tokens: int, stop: Sequence[str] = ()) -> Reply:
        """Return the most likely middle, greedily. Raises ``FimserverError``."""
        values = {
            "input_prefix": prefix,
            "input_suffix": suffix,
            "n_predict": max_tokens,
            "stop": list(stop),
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "cache_prompt": True,
            "stream": False,
        }
        body = json.dumps(values).encode()
        request = Request(f"{self.url}/infill", body, {"Content-Type": "application/json"})  # noqa: S310  http or https
        begin = time.perf_counter()
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310  http or https
                found = json.load(response)
            text, timings = str(found["content"]), found.get("timings", {})
        except (URLError, OSError, ValueError, KeyError, TypeError) as error:
            msg = (
                f"{self.url}/infill does not answer as a llama.cpp server ({error}); start llama-server with the model"
            )
            raise FimserverError(msg) from error
        return Reply(text, (time.perf_counter() - begin) * 1e3, int(timings.get("prompt_n", 0)))
