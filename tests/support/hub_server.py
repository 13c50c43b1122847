"""A hub on this machine: the routes that huggingface_hub uses, and a journal of its requests.

Repositories are folders. A commit is made of a folder's files, large ones (safetensors, tokenizers) are named by their
SHA-256, others by git's id. ``break_at`` drops the connection after so many bytes of the next large answer; with
``stays_down`` every later request is answered with 503, as if the hub were down.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", "tokenizer.json", ".bin")
_INFO = re.compile(r"^/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?$")
_TREE = re.compile(r"^/api/models/([^/]+/[^/]+)/tree/([^/]+)$")
_FILE = re.compile(r"^/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    folder: Path
    licence: str = "apache-2.0"
    gated: bool = False
    announced: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # what is announced of a file instead, by its name
    extra: list[dict[str, Any]] = field(default_factory=list)  # files that are announced and not there
    contents: dict[str, bytes] = field(default_factory=dict)  # sent instead of a file's own
    info: dict[str, Any] = field(default_factory=dict)  # keys of the description
    etags: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return sorted(f for f in self.folder.rglob("*") if f.is_file())

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(f.name.encode() + f.read_bytes() for f in self.files)).hexdigest()  # noqa: S324

    def name_of(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def is_large(file: Path) -> bool:
    return file.name.endswith(_LARGE)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324  as git does


def etag_of(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest() if is_large(file) else git_id(content)


@dataclass
class Hub:
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    journal: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    sent_bytes: int = 0
    break_at: int | None = None
    stays_down: bool = False
    is_down: bool = False
    damages: bool = False
    redirects: bool = False  # large files to storage under another host's name, as the hub does

    def fetched(self, method: str = "GET") -> list[str]:
        """Return the names of the requested files."""
        return [m[3] for how, path, _ in self.journal if how == method and (m := _FILE.match(path))]

    def ranges(self) -> dict[str, str]:
        return {path.rsplit("/", 1)[1]: h["range"] for how, path, h in self.journal if how == "GET" and "range" in h}

    def forget(self) -> None:
        self.journal.clear()
        self.sent_bytes = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that breaks off
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_arguments: Any) -> None: ...

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.journal.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if self.hub.is_down:
            self._send(503, {}, b"")
        elif match := _INFO.match(path) or _TREE.match(path):
            self._answer_api(match[1], match[2], is_tree=match.re is _TREE)
        elif match := _FILE.match(path):
            self._answer_file(*match.groups())
        else:
            self._send(404, {}, b"")

    def _find(self, name: str, revision: str | None) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"")
        elif revision not in {None, "main", repository.commit}:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"")
        else:
            return repository
        return None

    def _answer_api(self, name: str, revision: str | None, *, is_tree: bool) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        listed = []
        for file in repository.files:
            size, path = file.stat().st_size, repository.name_of(file)
            git, sha256 = git_id(file.read_bytes()), hashlib.sha256(file.read_bytes()).hexdigest()
            if is_tree:
                entry = {"type": "file", "path": path, "size": size, "oid": git}
                lfs = {"oid": sha256, "size": size, "pointerSize": 134}
            else:
                entry = {"rfilename": path, "size": size, "blobId": git}
                lfs = {"sha256": sha256, "size": size, "pointerSize": 134}
            whole = {**entry, "lfs": lfs} if is_large(file) else entry
            listed.append({**whole, **repository.announced.get(path, {})})
        listed += repository.extra
        info = {
            "_id": "0",
            "id": name,
            "sha": repository.commit,
            "lastModified": "2026-06-01T12:00:00.000Z",
            "private": False,
            "gated": "manual" if repository.gated else False,
            "tags": [f"license:{repository.licence}"],
            "cardData": {"license": repository.licence},
            "siblings": listed,
            **repository.info,
        }
        content = json.dumps(listed if is_tree else info).encode()
        self._send(200, {"Content-Type": "application/json", "X-Repo-Commit": repository.commit}, content)

    def _answer_file(self, name: str, revision: str, path: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        in_storage = self.headers.get("Host", "").startswith("localhost")
        if repository.gated and not in_storage and self.headers.get("Authorization") != "Bearer hf_accepted":
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted"}, b"")
            return
        file = repository.folder / path
        if not file.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"")
            return
        content = repository.contents.get(path, file.read_bytes())
        headers = {
            "ETag": f'"{repository.etags.get(path, etag_of(file))}"',
            "X-Repo-Commit": repository.commit,
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if self.hub.redirects and is_large(file) and not in_storage:
            headers["X-Linked-ETag"] = headers["ETag"]
            headers["Location"] = self.hub.endpoint.replace("127.0.0.1", "localhost") + self.path
            self._send(302, headers, b"")
            return
        status = 200
        if match := re.match(r"bytes=(\d+)-$", self.headers.get("Range", "")):
            first, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
        if self.hub.damages and is_large(file) and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._send(status, headers, content)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        at = self.hub.break_at
        breaks = at is not None and len(content) > at
        part = content[:at] if breaks else content
        if breaks:  # before it is seen
            self.hub.break_at, self.hub.is_down = None, self.hub.stays_down
        self.wfile.write(part)
        self.hub.sent_bytes += len(part)
        if breaks:
            self.close_connection = True


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
