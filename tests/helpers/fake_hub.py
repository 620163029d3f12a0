"""A model hub on 127.0.0.1 that refuses requests and cuts off downloads; its client.

The hub library reads its settings when it is imported, so the client is a process of its own:
``python fake_hub.py owner/name@revision ...`` prints what happened as JSON.
"""

import hashlib
import io
import json
import logging
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALWAYS = 10**6


@dataclass
class Repository:
    """Files of one model, and what is wrong with it.

    ``status``, ``api_status``: what requests for a file, and for the list of files, are answered;
    ``code``, ``message``: the hub's error headers; ``cuts``: how many downloads of the weights end
    in the middle.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    api_status: int = 200
    code: str = ""
    message: str = ""
    cuts: int = 0


class FakeHub:
    def __init__(self, repositories):
        self.repositories, self.endpoint = repositories, ""
        self.downloads, self.authorizations = Counter(), set()


def repository(folder, **settings):
    return Repository({path.name: path.read_bytes() for path in folder.iterdir()}, **settings)


@contextmanager
def serve(repositories):
    """Run the hub in a thread for the length of the block."""
    hub = FakeHub(repositories)
    handler = type("Handler", (_Handler,), {"state": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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

    def log_message(self, *_arguments):
        """Say nothing."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.state.authorizations.add(self.headers.get("Authorization", ""))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _found(self, name, revision, api):
        """The repository, unless the request is refused."""
        repository = self.state.repositories.get(name)
        status = 404 if repository is None else repository.api_status if api else repository.status
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif status != 200:
            self._refuse(status, repository.code, repository.message)
        elif revision not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _info(self, name, revision):
        if (repository := self._found(name, revision, api=True)) is None:
            return
        siblings = [
            {"rfilename": file, "size": len(data)} for file, data in repository.files.items()
        ]
        content = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        self._send(200, content, {"Content-Type": "application/json"})

    def _file(self, name, revision, file):
        if (repository := self._found(name, revision, api=False)) is None:
            return
        if (content := repository.files.get(file)) is None:
            self._refuse(404, "EntryNotFound")
            return
        cut = False
        if self.command == "GET":
            self.state.downloads[f"{name}/{file}"] += 1
            cut = file == "model.safetensors" and repository.cuts > 0
            repository.cuts -= cut
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": tag}, cut)

    def _refuse(self, status, code="", message=""):
        headers = {"X-Repo-Commit": COMMIT if code == "EntryNotFound" else ""}
        headers |= {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"", {key: value for key, value in headers.items() if value})

    def _send(self, status, content, headers, cut=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = True


class FakeDatasets:
    """Stands in for ``datasets`` and records calls; ``rows`` by call; raises ``error``."""

    def __init__(self):
        self.calls, self.revisions, self.rows, self.read, self.error = [], [], {}, 0, None

    def load_dataset(self, path, name, *, split, streaming, revision=None):
        self.calls.append((path, name, split, streaming))
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        for row in self.rows[self.calls[-1]]:
            self.read += 1
            yield row


def install_datasets(monkeypatch):
    fake = FakeDatasets()
    module = ModuleType("datasets")
    module.load_dataset = fake.load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake


def _attempt(case):
    """Load one model: the error or the facts, what was said, and the seconds it took."""
    import torch

    from dart_llm.errors import LoadError
    from dart_llm.models.checkpoint import checkpoint_facts
    from dart_llm.models.loading import load

    name, _, revision = case.partition("@")
    said = []
    start = time.monotonic()
    answer = {"error": None, "facts": None, "logits": None}
    try:
        model, tokenizer = load(name, revision=revision or None, progress=said.append)
        ids = tokenizer("tiny", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            answer["logits"] = model(ids).logits[0, -1].float().tolist()
        answer["facts"] = checkpoint_facts(model)
    except LoadError as error:
        answer["error"] = str(error)
    return answer | {"said": said, "seconds": time.monotonic() - start}


def _main():
    """The client, with the hub library's waiting shortened to almost nothing."""
    from transformers.utils import logging as transformers_logging

    log, pause = io.StringIO(), time.sleep
    logging.basicConfig(stream=log, level=logging.DEBUG, force=True)
    transformers_logging.enable_propagation()
    time.sleep = lambda seconds: pause(min(seconds, 0.02))
    answers = {case: _attempt(case) for case in sys.argv[1:]}
    json.dump({"answers": answers, "log": log.getvalue()}, sys.stdout)


if __name__ == "__main__":
    _main()
