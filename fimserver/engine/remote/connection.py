"""Talk to an engine's server over HTTP: JSON requests, and answers that arrive in parts.

    Connection.get, post   one JSON answer
    Connection.stream      the events of an answer, as they arrive; leaving it closes the request
    read_to_end            what a finished answer still sends, so that its connection is kept

Rules that hold for every server:

- Nothing is sent to an address of this machine through a proxy. Elsewhere the usual variables count: HTTPS_PROXY,
  HTTP_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR.
- A redirect is never followed: the key and the code would go to another server than the user agreed to.
- An answer is bounded in size, and each of its events in time; it is not compressed, so that no small one grows.
- A request is sent once more only if a kept connection was closed before any answer came.
- A request that is left before its end ends on the server too. Over HTTP/1.1 that closes its connection; over HTTP/2
  the library tells the server nothing (httpcore #943), so that the connection is closed, once no other request uses it.
- An error's message has no text of the request, nor of the answer to one that contained code.

Knows:   HTTP, JSON.  Never: prompts, models, settings.
Raises:  ``RemoteError``.
"""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2

from fimserver import __version__
from fimserver.engine.remote.address import Address, parse_address
from fimserver.errors import RemoteError, SettingsError

_MOST_BYTES = 8 * 2**20  # of one answer
_MOST_LINE_BYTES = 2**20  # of one event
_LONGEST_REASON = 200
_LONGEST_WAIT_S = 3600.0  # that a server may ask for
_KEEP_ALIVE_S = 60.0
_END_S = 0.1  # for the end of an answer after its last event
_STREAMS = ("text/event-stream", "application/x-ndjson", "application/jsonl")
_HIDDEN = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_EXPLAINED = frozenset({400, 413, 500, 501, 503})
_DONE = "[DONE]"

Event = Mapping[str, Any]


class _Body:
    """The body of an answer. ``is_whole`` once it was read to its end."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.is_whole = False

    async def parts(self) -> AsyncIterator[bytes]:
        async for part in self.response.aiter_raw():
            yield part
        self.is_whole = True


class Connection:
    """The connections to one server. All methods run in one event loop.

    ``unix_socket`` is the path of a Unix socket that takes the place of host and port. ``timeout_s`` is the longest
    wait for a connection, for the first event, and between two events. ``sent_bytes`` counts the bodies of all
    requests.
    """

    def __init__(self, address: Address, api_key: str, timeout_s: float, unix_socket: Path | None = None) -> None:
        self.address, self.timeout_s = address, timeout_s
        self.sent_bytes = 0
        self._has_key, self._has_answered = bool(api_key), False
        headers = {"User-Agent": f"fimserver/{__version__}", "Accept-Encoding": "identity"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._headers, self._unix_socket = headers, unix_socket
        self._is_http2 = False  # as far as answers have shown
        self._users: Counter[httpx2.AsyncClient] = Counter()  # requests of each client
        try:
            self._certificates = httpx2.create_ssl_context(trust_env=True) if address.is_encrypted else True
            self._client = self._make_client()
        except (ImportError, OSError, ValueError) as error:  # a proxy of an unknown kind, certificates that are missing
            msg = (
                f"{address.origin} cannot be reached with the proxy and the certificates that the environment names "
                f"({type(error).__name__}); check HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            )
            raise RemoteError(msg, is_lasting=True) from error

    def _make_client(self) -> httpx2.AsyncClient:
        transport = httpx2.AsyncHTTPTransport(uds=str(self._unix_socket)) if self._unix_socket is not None else None
        return httpx2.AsyncClient(
            headers=self._headers,
            http2=True,
            verify=self._certificates,
            timeout=httpx2.Timeout(self.timeout_s),
            limits=httpx2.Limits(max_connections=4, keepalive_expiry=_KEEP_ALIVE_S),
            transport=transport,
            trust_env=not self.address.is_loopback,
            follow_redirects=False,
        )

    @property
    def name(self) -> str:
        """Return the server's address for messages."""
        return self.address.origin

    async def get(self, path: str) -> Any:
        """Return the JSON at a path; the request contains no code."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float | None = None) -> Any:
        """Return the JSON answer to a body, which may take ``timeout_s``."""
        return await self._ask("POST", path, body, timeout_s)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None = None) -> Any:
        limit = asyncio.timeout(timeout_s or self.timeout_s)
        try:
            async with limit, self._open(method, path, body, timeout_s) as answer:
                return self._parse(await _read_whole(answer, self.name))
        except TimeoutError as error:
            raise self._late() from error

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[Event]]:
        """Send a body; gives the events of the answer. Leaving the context early closes the request."""
        opened = self._open("POST", path, body)
        try:
            async with asyncio.timeout(self.timeout_s):
                answer = await opened.__aenter__()
        except TimeoutError as error:
            raise self._late() from error
        try:
            yield self._events(answer)
        finally:
            await opened.__aexit__(None, None, None)

    async def _events(self, answer: _Body) -> AsyncIterator[Event]:
        kind = _kind_of(answer.response)
        if kind not in _STREAMS:  # a server that does not stream answers with one object
            try:
                async with asyncio.timeout(self.timeout_s):
                    whole = await _read_whole(answer, self.name)
            except TimeoutError as error:
                raise self._late() from error
            except httpx2.HTTPError as error:
                raise self._broken(error) from error
            yield self._to_event(whole)
            return
        lines = _read_lines(answer, self.name)
        while True:
            try:
                async with asyncio.timeout(self.timeout_s):
                    line = await self._next_data(lines, is_sse=kind == _STREAMS[0])
            except TimeoutError as error:
                raise self._late() from error
            except httpx2.HTTPError as error:
                raise self._broken(error) from error
            if line is None:
                return
            yield self._to_event(line)

    async def _next_data(self, lines: AsyncIterator[bytes], *, is_sse: bool) -> bytes | None:
        """Return the data of the next event, or ``None`` at the end; comments and pings are skipped."""
        async for line in lines:
            if not is_sse:
                if line.strip():
                    return line
                continue
            name, _, value = line.partition(b":")
            if name == b"error" and value:
                raise RemoteError(self._failed(None))
            if name == b"data":
                data = value.strip()
                if data != _DONE.encode():
                    return data
        return None

    def _to_event(self, data: bytes) -> Event:
        value = self._parse(data)
        if not isinstance(value, dict):
            msg = f"the server at {self.name} sent something other than an object; {self._is_it_one()}"
            raise RemoteError(msg)
        if value.get("error"):
            raise RemoteError(self._failed(None))
        return value

    def _parse(self, data: bytes) -> Any:
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            msg = f"the server at {self.name} sent something other than JSON; {self._is_it_one()}"
            raise RemoteError(msg) from error

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None = None
    ) -> AsyncIterator[_Body]:
        """Send a request; gives the answer to it if it is good."""
        content = None if body is None else json.dumps(body).encode()
        client, is_whole = self._client, False
        self._users[client] += 1
        try:
            response = await self._send(client, method, path, content, timeout_s or self.timeout_s)
            answer = _Body(response)
            try:
                await self._check(answer, has_code=body is not None)
                yield answer
            except httpx2.HTTPError as error:
                raise self._broken(error) from error
            finally:
                is_whole = answer.is_whole
                await response.aclose()
        finally:
            await self._leave(client, is_whole=is_whole)

    async def _send(
        self, client: httpx2.AsyncClient, method: str, path: str, content: bytes | None, timeout_s: float
    ) -> httpx2.Response:
        """Return the beginning of an answer; send once more if a kept connection had been closed."""
        url = f"{self.address.origin}{self.address.path}{path}"
        headers = {} if content is None else {"Content-Type": "application/json"}
        limits = httpx2.Timeout(self.timeout_s, read=timeout_s)
        is_repeat = False
        while True:
            request = client.build_request(method, url, content=content, headers=headers, timeout=limits)
            self.sent_bytes += len(content or b"")
            try:
                response = await client.send(request, stream=True)
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError) as error:
                if is_repeat or not self._has_answered:
                    raise self._broken(error) from error
                is_repeat = True
            except httpx2.TimeoutException as error:
                raise self._late() from error
            except (httpx2.HTTPError, OSError) as error:
                raise self._unreachable(error) from error
            else:
                self._has_answered, self._is_http2 = True, response.http_version == "HTTP/2"
                return response

    async def _leave(self, client: httpx2.AsyncClient, *, is_whole: bool) -> None:
        """End a request. Over HTTP/2 one that is not whole has to close its connection, and so its client."""
        self._users[client] -= 1
        if self._is_http2 and not is_whole and client is self._client:
            self._client = self._make_client()
        if client is not self._client and not self._users[client]:
            del self._users[client]
            await client.aclose()

    async def _check(self, answer: _Body, *, has_code: bool) -> None:
        response = answer.response
        status = response.status_code
        if response.is_redirect:
            where = _origin_of(response)
            msg = (
                f"the server at {self.name} redirects to {where}, which is not followed; "
                "if you trust it, set fimserver.remote.url to that address"
            )
            raise RemoteError(msg, is_lasting=True)
        if status == HTTPStatus.OK:
            encoding = response.headers.get("content-encoding", "identity")
            kind = _kind_of(response)
            if encoding != "identity":
                msg = f"the server at {self.name} compresses its answer ({encoding!r}) although asked not to"
                raise RemoteError(msg, is_lasting=True)
            if kind not in {*_STREAMS, "application/json", ""}:
                msg = f"the server at {self.name} answers with {kind!r}; {self._is_it_one()}"
                raise RemoteError(msg, is_lasting=True)
            return
        wait_s = _retry_after(response)
        said = await _read_whole(answer, self.name)
        reason = "" if has_code or status in _HIDDEN else _reason_of(said)
        is_lasting = status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in {
            HTTPStatus.TOO_MANY_REQUESTS,
            HTTPStatus.REQUEST_TIMEOUT,
        }
        msg = (_known_refusal(said) if status in _EXPLAINED else "") or self._failed(
            status, reason, response.request.url.path
        )
        raise RemoteError(msg, is_lasting=is_lasting, retry_after_s=wait_s)

    def _failed(self, status: int | None, reason: str = "", path: str = "") -> str:
        """Return what an error means, by its status."""
        if status in _HIDDEN:
            place = "check the key that fimserver.remote.apiKey names"
            how = place if self._has_key else "name the place of a key in fimserver.remote.apiKey"
            return f"the server at {self.name} refuses the request ({status}); {how}"
        if status == HTTPStatus.NOT_FOUND:
            return (
                f"the server at {self.name} does not know {path} or the model (404){reason}; "
                "check fimserver.engine, fimserver.remote.url and fimserver.remote.model"
            )
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return f"the server at {self.name} wants fewer requests (429){reason}"
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            return f"the server at {self.name} is busy, or still loads its model (503){reason}"
        if status is not None and status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return f"the server at {self.name} refuses the request ({status}){reason}; {self._is_it_one()}"
        shown = "" if status is None else f" ({status}){reason}"
        return f"the server at {self.name} failed{shown}; its own log says why"

    def _is_it_one(self) -> str:
        return "check that fimserver.engine fits this server, and fimserver.remote.url"

    def _late(self) -> RemoteError:
        return RemoteError(
            f"the server at {self.name} did not answer within {self.timeout_s:g} s (fimserver.remote.timeoutMs); "
            "it may be busy, or out of reach"
        )

    def _broken(self, error: Exception) -> RemoteError:
        return RemoteError(f"the server at {self.name} ended in the middle of an answer ({type(error).__name__})")

    def _unreachable(self, error: Exception) -> RemoteError:
        text = str(error)
        why = type(error).__name__
        if "CERTIFICATE" in text.upper():
            msg = (
                f"the certificate of {self.name} cannot be trusted; if it is your own, name the file of its authority "
                "in the environment variable SSL_CERT_FILE"
            )
            return RemoteError(msg, is_lasting=True)
        if isinstance(error, httpx2.ProxyError):
            return RemoteError(f"the proxy on the way to {self.name} refuses; check HTTPS_PROXY and NO_PROXY")
        if isinstance(error, httpx2.ConnectError):
            is_name = isinstance(_first_cause(error), socket.gaierror)
            why = "its name is not known" if is_name else "nothing answers there"
        return RemoteError(
            f"the server at {self.name} cannot be reached: {why}; start it, or correct fimserver.remote.url"
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def read_to_end(events: AsyncIterator[Event]) -> None:
    """Read what a server sends after the last event of an answer; not for long."""
    with suppress(TimeoutError, RemoteError):
        async with asyncio.timeout(_END_S):
            async for _ in events:
                pass


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _known_refusal(data: bytes) -> str:
    """Return a sentence for a known error of a server, which has no code in it; else an empty text."""
    said = data.decode("utf-8", "replace").lower()
    for words, sentence in _KNOWN.items():
        if words in said:
            return sentence
    return ""


_TOO_LONG = "the prompt is longer than the server's context; lengthen that, or set fimserver.contextTokens"
_KNOWN = {
    "infill is not supported by this model": (
        "the model has no tokens for fill-in-the-middle, so it cannot complete between two texts; choose a code model "
        "such as Qwen2.5-Coder"
    ),
    "does not support insert": (
        "the model has no template for fill-in-the-middle; choose a code model such as qwen2.5-coder"
    ),
    "exceeds the available context": _TOO_LONG,
    "maximum context length": _TOO_LONG,
    "loading model": "the server still loads its model",
}


def _kind_of(response: httpx2.Response) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def _origin_of(response: httpx2.Response) -> str:
    target = str(response.headers.get("location", ""))
    try:
        return parse_address(target.partition("?")[0].partition("#")[0]).origin
    except SettingsError:
        return "another path"


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that a server asks to wait; ``None`` if it names none, or a date."""
    try:
        return min(max(float(response.headers["retry-after"]), 0.0), _LONGEST_WAIT_S)
    except (KeyError, ValueError):
        return None


def _reason_of(data: bytes) -> str:
    """Return a server's own words on a request without code, as the end of a sentence."""
    try:
        said = json.loads(data.decode("utf-8"))
        error = said.get("error", said.get("message", said.get("detail", "")))
        words = error.get("message", "") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        return ""
    return f": {words[:_LONGEST_REASON]}" if isinstance(words, str) and words else ""


async def _read_whole(answer: _Body, name: str) -> bytes:
    parts, size = [], 0
    async for part in answer.parts():
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise _too_large(name)
    return b"".join(parts)


async def _read_lines(answer: _Body, name: str) -> AsyncIterator[bytes]:
    rest, size = b"", 0
    async for part in answer.parts():
        size += len(part)
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
        if size > _MOST_BYTES or len(rest) > _MOST_LINE_BYTES:
            raise _too_large(name)
    if rest:
        yield rest


def _too_large(name: str) -> RemoteError:
    return RemoteError(f"the answer of the server at {name} is too large to be a completion; it was not read further")
