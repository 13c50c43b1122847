"""A server of completions on this machine: llama.cpp, Ollama or OpenAI in form, and with faults on request."""

import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

TOKENS = {"<|fim_prefix|>": 11, "<|fim_suffix|>": 12, "<|fim_middle|>": 13, "<|repo_name|>": 14, "<|file_sep|>": 15}
ANSWER = "first + second"


@dataclass
class Asked:
    """One request as the server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class CompletionServer:
    """What is served, and how; ``fault`` is the name of one of ``FAULTS``, or empty."""

    kind: str = "llamacpp"
    fault: str = ""
    pieces: tuple[str, ...] = ("first", " +", " second")
    pieces_of: Callable[[Any], tuple[str, ...]] | None = None  # of a request's body
    pause_s: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    num_closed: int = 0  # by the client, in the middle of an answer
    num_connections: int = 0
    port: int = 0
    models: tuple[str, ...] = ("qwen2.5-coder-0.5b",)
    tls: ssl.SSLContext | None = None
    retry_after: str = ""
    has_family: bool = True
    prompt_per_second: Any = 5000.0
    refused: Callable[[Any], bool] | None = None  # bodies that get the fault; without it, all that contain code
    encode: Callable[[str], list[int]] | None = None
    answer_ids: Callable[[Any], list[int]] | None = None  # to prompts of token ids
    tops: list[dict[str, float] | None] = field(default_factory=list)  # the likeliest ids of such an answer's tokens
    replay: Callable[[Asked], tuple[int, str]] | None = None  # status and body of every answer, in place of the above

    def draw_fault(self, chance: random.Random) -> None:
        """Fail in one of all ways, or in half of the cases not."""
        self.fault = chance.choice([*FAULTS, *SLOW, "dead"]) if chance.random() < 0.5 else ""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[Asked]:
        """The requests that contain code."""
        ends = ("/completion", "/completions", "/infill", "/api/generate")
        return [asked for asked in self.asked if asked.path.endswith(ends) and asked.body.get("stream")]

    # The answers of each kind

    def look(self, path: str, body: Any) -> Any:
        """Return the answer to a question about the model; None for any other."""
        if path == "/api/generate" and "prompt" not in body:
            return {"response": "", "done": True}
        if path == "/completion" and not body["stream"]:
            return {"content": "x", "timings": {"prompt_per_second": self.prompt_per_second}}
        if path.endswith("/chat/completions") and not body.get("stream"):
            return {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
        if isinstance(body, dict) and isinstance(body.get("prompt"), list) and self.answer_ids is not None:
            ids = self.answer_ids(body)
            logprobs = {"tokens": ["?"] * len(ids), "token_logprobs": [-0.5] * len(ids), "top_logprobs": self.tops}
            return {"choices": [{"text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": "length"}]}
        if path == "/tokenize":
            return {"tokens": self.tokenize(body.get("content", body.get("prompt")))}
        return {
            "/props": {"default_generation_settings": {"n_ctx": 2048}, "model_alias": "".join(self.models[:1])},
            "/v1/models": {"data": [{"id": name, "max_model_len": 2048} for name in self.models]},
            "/api/tags": {"models": [{"name": name} for name in self.models]},
            "/api/show": {"capabilities": ["completion", "insert"], "model_info": {"qwen2.context_length": 32768}},
        }.get(path)

    def tokenize(self, text: str) -> list[int]:
        if not text:
            return [7] if self.kind == "begins" else []
        if self.encode is not None:
            return self.encode(text)
        return [TOKENS[text]] if self.has_family and text in TOKENS else [1, 2, 3]

    def events(self, path: str, body: Any) -> Iterator[bytes]:
        for text in self.pieces if self.pieces_of is None else self.pieces_of(body):
            if path.endswith("/api/generate"):
                yield json.dumps({"response": text, "done": False}).encode() + b"\n"
            elif path.endswith("/chat/completions"):
                yield _sse({"choices": [{"delta": {"content": text}}]})
            elif path.endswith("/fim/completions"):
                yield _sse({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
            elif path.endswith("/completions"):
                logprobs = {"tokens": [text], "token_logprobs": [-0.5]}
                yield _sse({"choices": [{"text": text, "logprobs": logprobs, "finish_reason": None}]})
            else:
                probability = {"token": text, "logprob": -0.5}
                yield _sse({"content": text, "stop": False, "completion_probabilities": [probability]})
        if path.endswith("/api/generate"):
            yield json.dumps({"response": "", "done": True, "done_reason": "stop"}).encode() + b"\n"
        elif path.endswith("/completions"):
            yield _sse({"choices": [{"text": "", "delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
        else:
            yield _sse({"content": "", "stop": True, "stop_type": "eos"})


def _sse(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


class _HangError(Exception):
    """Keep the connection, and say nothing more."""


def _status(code: int, headers: str = "", body: str = "{}", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {code} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body.encode())}\r\n{headers}\r\n"
    return (head + body).encode()


_SSE = "text/event-stream"
FAULTS: dict[str, Callable[[CompletionServer], bytes]] = {
    "garbage": lambda _s: _status(200, body="data: \x00\x01{]\n\n", kind=_SSE),
    "other_form": lambda _s: _status(200, body='data: {"surprise": 1}\n\n', kind=_SSE),
    "a_list": lambda _s: _status(200, body="data: [1]\n\n", kind=_SSE),
    "not_http": lambda _s: b"\x16\x03\x01 what is this\r\n\r\n",
    "html": lambda _s: _status(200, body="<html>x = SECRET</html>", kind="text/html"),
    "compressed": lambda _s: _status(200, "Content-Encoding: gzip\r\n", body="x"),
    "error_event": lambda _s: _status(200, body='data: {"error": {"message": "SECRET"}}\n\n', kind=_SSE),
    "half_json": lambda _s: b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    "no_end": lambda _s: _status(200, body=_sse({"content": " first", "stop": False}).decode(), kind=_SSE),
    "400": lambda _s: _status(400, body='{"error": {"message": "bad SECRET"}}'),
    "401": lambda _s: _status(401),
    "403": lambda _s: _status(403),
    "404": lambda _s: _status(404),
    "429": lambda s: _status(429, f"Retry-After: {s.retry_after}\r\n" if s.retry_after else ""),
    "500": lambda _s: _status(500, body="SECRET"),
    "503": lambda _s: _status(503, body='{"error": {"message": "Loading model"}}'),
    "redirect": lambda _s: _status(307, "Location: http://elsewhere.example/completion\r\n"),
    "huge_line": lambda _s: b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\n\r\ndata: " + b"a" * 2**22,
    "huge": lambda _s: b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\n\r\n" + b": ping\n\n" * 2**21,
    "surrogate": lambda _s: _status(200, body='data: {"content": "\\ud800", "stop": false}\n\n', kind=_SSE),
    "no_fim": lambda _s: _status(501, body='{"error": {"message": "Infill is not supported by this model: SECRET"}}'),
}
SLOW = ("slow_first_byte", "drip", "pings_only", "half", "reset")


@contextmanager
def serve(**options: Any) -> Iterator[CompletionServer]:
    server = CompletionServer(**options)
    listener = socket.create_server(("127.0.0.1", server.port))
    server.port = listener.getsockname()[1]
    is_over = threading.Event()
    open_sockets: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            open_sockets.append(peer)
            server.num_connections += 1
            threading.Thread(target=_answer, args=(server, peer, is_over, open_sockets), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        is_over.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for peer in open_sockets:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()


def _answer(
    server: CompletionServer, peer: socket.socket, is_over: threading.Event, open_sockets: list[socket.socket]
) -> None:
    with suppress(OSError, _HangError):
        if server.tls is not None:
            peer = server.tls.wrap_socket(peer, server_side=True)
            open_sockets.append(peer)
        stream = peer.makefile("rb")
        while line := stream.readline():
            method, path, _ = line.decode().split(" ", 2)
            if path.startswith("http://"):  # through a proxy
                path = "/" + path.split("/", 3)[3]
            headers = {}
            while header := stream.readline().decode().strip():
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            length = int(headers.get("content-length", 0))
            content = stream.read(length)
            if len(content) < length:
                raise _HangError  # the client has closed the request
            if path == "/health":
                peer.sendall(_status(503 if server.fault == "unhealthy" else 200))
                continue
            body = json.loads(content or "null")
            server.asked.append(Asked(method, path, headers, body))
            if server.replay is not None:
                status, answer = server.replay(server.asked[-1])
                peer.sendall(_status(status, body=answer))
                continue
            _respond(server, peer, path, body, is_over)


def _respond(server: CompletionServer, peer: socket.socket, path: str, body: Any, is_over: threading.Event) -> None:
    found, fault = server.look(path, body), server.fault
    if server.refused is not None:
        found, fault = (None, fault) if server.refused(body) else (found, "")
    if found is not None and fault != "dead":
        peer.sendall(_status(200, body=json.dumps(found)))
        return
    if fault in FAULTS or fault == "reset":
        peer.sendall(FAULTS[fault](server) if fault in FAULTS else b"")
        peer.shutdown(socket.SHUT_RDWR)
        raise _HangError
    if fault in {"slow_first_byte", "dead"}:
        is_over.wait(30)
        raise _HangError
    _stream(server, peer, path, body, fault, is_over)


def _stream(
    server: CompletionServer, peer: socket.socket, path: str, body: Any, fault: str, is_over: threading.Event
) -> None:
    kind = "application/x-ndjson" if path.endswith("/api/generate") else _SSE
    peer.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    if fault in {"pings_only", "drip"}:
        while not is_over.wait(0.05):
            _send_chunk(peer, b": ping\n\n" if fault == "pings_only" else b"d")
    try:
        for number, event in enumerate(server.events(path, body)):
            time.sleep(server.pause_s)
            _send_chunk(peer, event)
            if fault == "half" and number == 0:
                peer.shutdown(socket.SHUT_RDWR)
                raise _HangError
        peer.sendall(b"0\r\n\r\n")
    except OSError:
        server.num_closed += 1
        raise


def _send_chunk(peer: socket.socket, data: bytes) -> None:
    peer.sendall(b"%x\r\n%s\r\n" % (len(data), data))
