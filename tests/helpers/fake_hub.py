"""A model hub on 127.0.0.1 that refuses, loses and cuts off what it is asked for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALWAYS = 10**6


@dataclass
class Repository:
    """Files of one model, and what is wrong with it."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    """What every request for a file is answered."""
    api_status: int = 200
    code: str = ""
    """The hub's ``X-Error-Code`` header."""
    message: str = ""
    """The hub's ``X-Error-Message`` header."""
    cuts: int = 0
    """How many downloads of the weights end in the middle."""
    claimed_size: int = 0
    """A size of the weights that the file list claims."""


class FakeHub:
    """The repositories, and what was asked of them."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.downloads: Counter[str] = Counter()
        self.authorizations: set[str] = set()
        self.endpoint = ""


def repository(folder: Path, **settings: Any) -> Repository:
    """A repository with the files of ``folder``."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Repository(files, **settings)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    """Run the hub in a thread for the length of the block."""
    hub = FakeHub(repositories)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    timeout = 10

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.state.authorizations.add(self.headers.get("Authorization", ""))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3], body=body)
        else:
            self._refuse(404, "EntryNotFound")

    def _info(self, name: str, revision: str | None) -> None:
        found = self.state.repositories.get(name)
        if found is None:
            return self._refuse(404, "RepoNotFound")
        if found.api_status != 200:
            return self._refuse(found.api_status, found.code, found.message)
        if revision not in (None, "main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        siblings = [
            {
                "rfilename": file,
                "size": (found.claimed_size if file == "model.safetensors" else 0) or len(content),
            }
            for file, content in found.files.items()
        ]
        content = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        self._send(200, content, {"Content-Type": "application/json"})
        return None

    def _file(self, name: str, revision: str, file: str, *, body: bool) -> None:
        found = self.state.repositories.get(name)
        if found is None:
            return self._refuse(404, "RepoNotFound")
        if found.status != 200:
            return self._refuse(found.status, found.code, found.message)
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        content = found.files.get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        cut = False
        if body:
            self.state.downloads[f"{name}/{file}"] += 1
            cut = file == "model.safetensors" and found.cuts > 0
            found.cuts -= cut
        self._send(200, content, headers, body=body, cut=cut)
        return None

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Repo-Commit": COMMIT} if code == "EntryNotFound" else {}
        if code:
            headers["X-Error-Code"] = code
        if message:
            headers["X-Error-Message"] = message
        self._send(status, b"", headers)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        *,
        body: bool = True,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = True
