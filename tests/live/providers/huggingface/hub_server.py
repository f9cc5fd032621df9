"""A local server with the part of the Hub's protocol that huggingface_hub uses. It records the requests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<name>[^/]+(?:/[^/]+)?)/(?P<what>revision|tree|refs)(?:/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class Asked:
    """A request: its method and path, the requested range of bytes, its token, and the bytes of the answer."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int

    @property
    def file(self) -> str | None:
        """The requested file of a repository; None for other requests."""
        found = _FILE.fullmatch(self.path)
        return None if found is None else found["file"]


@dataclass
class Repository:
    """The files of each commit, and the commits that branches and tags mean."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch. Returns its hash."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[branch] = digest
        return digest


@dataclass
class Hub:
    """The server. `token` opens gated and private repositories; `status` and `delay` make it fail."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    token: str = "hf_right"
    status: int | None = None
    delay: float = 0
    #: Wrong sizes that the server reports for files.
    stated_sizes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, files: dict[str, bytes] | Path, **flags: bool) -> str:
        """Add a repository with these files, or with those of a folder. Returns the commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        repository = self.repositories.setdefault(name, Repository(**flags))
        return repository.commit(files)

    def forget(self) -> None:
        """Forget the requests so far."""
        self.asked.clear()

    def of_file(self, name: str) -> list[Asked]:
        """Return the requests for a file."""
        return [asked for asked in self.asked if asked.file == name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        time.sleep(self.hub.delay)
        status, headers, body = self._response(urlsplit(self.path).path)
        is_head = self.command == "HEAD"
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        path, sent = unquote(urlsplit(self.path).path), 0 if is_head else len(body)
        if path != "/api/agent-harnesses":  # huggingface_hub requests this once a day
            self.hub.asked.append(Asked(self.command, path, self.headers.get("range"), token, sent))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

    def _response(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.hub.status is not None:
            return self.hub.status, {}, b""
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        parts = {} if match is None else {key: unquote(part or "") for key, part in match.groupdict().items()}
        repository = self.hub.repositories.get(parts.get("name", ""))
        may_see = self.headers.get("authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not may_see):
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        what = parts.get("what")
        if what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            return _json({"branches": refs, "tags": [], "converts": []})
        commit = repository.refs.get(parts["revision"], parts["revision"])
        if commit not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = repository.commits[commit]
        sizes = {name: self.hub.stated_sizes.get(name, len(data)) for name, data in files.items()}
        if what == "revision":
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            return _json({"id": parts["name"], "sha": commit, "siblings": siblings, "tags": []})
        if what == "tree":
            tree = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()]
            return _json(tree)
        if repository.gated and not may_see:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if (data := files.get(parts["file"])) is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}"
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return 200, headers | {"Content-Length": str(sizes[parts["file"]])}, b""
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")) is not None:
            data = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
            return 206, headers, data
        return 200, headers, data


def _json(document: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run the server on a free port of this machine."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
