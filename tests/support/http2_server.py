"""A server of HTTP/2 that begins an answer and says when the client has left it."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events

EVENT = b'data: {"choices": [{"text": "first", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"text": " + second", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
MODELS = b'{"data": [{"id": "qwen2.5-coder-7b"}]}'


@dataclass
class Http2Server:
    """What is served: completions end only if ``ends``; with ``begins`` unset there is no answer at all."""

    url: str = ""
    ends: bool = True
    begins: bool = True
    begun: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    num_connections: int = 0


@contextmanager
def serve_http2(certificate: Path) -> Iterator[Http2Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols(["h2"])
    listener = socket.create_server(("127.0.0.1", 0))
    server = Http2Server(f"https://127.0.0.1:{listener.getsockname()[1]}")

    def accept() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                threading.Thread(target=_answer, args=(server, context, peer), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _answer(server: Http2Server, context: ssl.SSLContext, peer: socket.socket) -> None:
    open_streams: set[int] = set()
    paths: dict[int, str] = {}
    with suppress(OSError), context.wrap_socket(peer, server_side=True) as stream:
        server.num_connections += 1
        state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        state.initiate_connection()
        stream.sendall(state.data_to_send())
        while data := stream.recv(65536):
            for event in state.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    headers = {bytes(name): bytes(value) for name, value in event.headers}
                    paths[event.stream_id] = headers[b":path"].decode()
                elif isinstance(event, h2.events.StreamReset):
                    open_streams.discard(event.stream_id)
                    server.left.set()
                if isinstance(event, h2.events.StreamEnded):
                    _respond(server, state, event.stream_id, paths[event.stream_id], open_streams)
            stream.sendall(state.data_to_send())
    if open_streams:
        server.left.set()


def _respond(
    server: Http2Server, state: h2.connection.H2Connection, number: int, path: str, open_streams: set[int]
) -> None:
    if path == "/v1/models":
        state.send_headers(number, [(":status", "200"), ("content-type", "application/json")])
        state.send_data(number, MODELS, end_stream=True)
        return
    if not path.endswith("/completions"):
        state.send_headers(number, [(":status", "404")], end_stream=True)
        return
    open_streams.add(number)
    server.begun.set()
    if not server.begins:
        return
    state.send_headers(number, [(":status", "200"), ("content-type", "text/event-stream")])
    state.send_data(number, EVENT)
    if server.ends:
        state.send_data(number, LAST, end_stream=True)
        open_streams.discard(number)
