"""A stand-in for the Hugging Face Hub on loopback, with the part of its protocol that downloads and commits use.

    with contextlib.closing(HubServer()) as hub:
        commit = hub.commit("org/name", {"config.json": b"{}", "model.safetensors": b"..."})
        ...  # a client with HF_ENDPOINT=hub.url
        assert hub.requests == []

Small files are sent directly. Files named *.safetensors are treated like large files on the Hub: the answer to a
look-up has the file's hash and size and redirects to a storage server on another host. (It is the same machine under
another name, since some versions of the client tell storage from the Hub by host name without port.) They are uploaded
the same way: to storage first, as by git-lfs, and then the commit refers to them by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass(frozen=True)
class Request:
    """A request, with header names in lower case. `storage`: it went to the storage server."""

    method: str
    path: str
    headers: dict[str, str]
    storage: bool
    body: bytes = b""


@dataclass
class _Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # one per commit, in order
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class _Fault:
    """A fault in a file's answers: a status instead of the file, or a body that ends at byte `cut_at`."""

    filename: str
    method: str | None
    times: float
    status: int | None = None
    cut_at: int | None = None
    announced: bool = True

    def take(self, method: str, filename: str) -> bool:
        """Return True and count down if the fault applies to this request."""
        if self.filename != filename or self.method not in (None, method) or self.times <= 0:
            return False
        self.times -= 1
        return True


class HubServer:
    """The server. It listens on free ports of 127.0.0.1 until it is closed.

    Attributes:
        requests: all requests so far, in order.
        before_answer: called with each request before it is answered, to change the Hub's state in between.
        supports_ranges: False answers range requests with the whole file.
        misreported_commit: sent instead of the true X-Repo-Commit, as by a broken mirror.
        card_errors: the errors reported for every model card's metadata.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.before_answer: Callable[[Request], None] | None = None
        self.supports_ranges = True
        self.misreported_commit: str | None = None
        self.card_errors: list[str] = []
        self._repos: dict[str, _Repo] = {}
        self._objects: dict[str, bytes] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), self, storage) for storage in (False, True)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.storage_url = f"http://localhost:{self._servers[1].server_port}"
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def commit(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        message: str = "",
    ) -> str:
        """Add a commit with these files to a branch, create the repository if need be, and return the commit's hash."""
        repo = self._repos.setdefault(repo_id, _Repo())
        repo.private, repo.gated = private, gated
        commit = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.messages.append(message)
        self._objects |= {hashlib.sha256(body).hexdigest(): body for body in files.values()}
        repo.branches[branch] = commit
        return commit

    def history(self, repo_id: str) -> list[tuple[str, str, dict[str, bytes]]]:
        """Return each commit's hash, message and files, oldest first; an empty list if there is no such repository."""
        repo = self._repos.get(repo_id, _Repo())
        return [(commit, message, files) for (commit, files), message in zip(repo.commits.items(), repo.messages)]

    def is_private(self, repo_id: str) -> bool:
        return self._repos[repo_id].private

    def fail(self, filename: str, status: int, *, method: str | None = None, times: float = float("inf")) -> None:
        """Answer requests for a file (of one method, or any) with this status, `times` times."""
        self._faults.append(_Fault(filename, method, times, status=status))

    def cut(self, filename: str, at: int, *, announced: bool = True, times: float = float("inf")) -> None:
        """End a file's body at this byte, `times` times.

        Close the connection before the announced length is reached or, if `announced` is False, announce the shorter
        length.
        """
        self._faults.append(_Fault(filename, "GET", times, cut_at=at, announced=announced))

    def mend(self) -> None:
        """Remove all faults."""
        self._faults.clear()

    def answer(self, request: Request) -> _Answer:
        """Return the answer to a request; called by the handler."""
        with self._lock:
            self.requests.append(request)
            if self.before_answer is not None:
                self.before_answer(request)
            path = urlsplit(request.path).path
            filename = unquote(path.rpartition("/")[2])
            for fault in self._faults:
                if fault.status is not None and fault.take(request.method, filename):
                    return _Answer(fault.status, b"out of order")
            answer = self._storage_answer(request, path) if request.storage else self._hub_answer(request, path)
            for fault in self._faults:
                if fault.cut_at is not None and answer.status == 200 and fault.take(request.method, filename):
                    answer.cut_at = fault.cut_at
                    if not fault.announced:
                        answer.body = answer.body[: fault.cut_at]
            return answer

    def _hub_answer(self, request: Request, path: str) -> _Answer:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return self._api_answer(request, path)
        repo_id, revision, filename = match[1], unquote(match[2]), unquote(match[3])
        authorization = request.headers.get("authorization")
        authorized = authorization == f"Bearer {TOKEN}"
        if authorization is not None and not authorized:
            return _error(401, None, "Invalid credentials in Authorization header")
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and not authorized):
            # Without a token, private and missing repositories look the same.
            if authorized:
                return _error(404, "RepoNotFound", "Repository not found")
            return _error(401, "RepoNotFound", "Invalid username or password.")
        if repo.gated:
            return _error(
                403 if authorized else 401, "GatedRepo", f"Access to model {repo_id} is restricted. Ask for access."
            )
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": self.misreported_commit or commit, "Accept-Ranges": "bytes"}
        body = repo.commits[commit].get(filename)
        if body is None:
            return _error(404, "EntryNotFound", "Entry not found", headers)
        if not filename.endswith(".safetensors"):
            return _Answer(200, body, {**headers, "ETag": f'"{_blob(body)}"'})
        sha256 = hashlib.sha256(body).hexdigest()
        location = f"{self.storage_url}/{sha256}/{quote(filename)}?signature=valid"
        linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(body)), "Location": location}
        return _Answer(302, f"Found. Redirecting to {location}".encode(), {**headers, **linked})

    def _api_answer(self, request: Request, path: str) -> _Answer:
        """Answer requests other than for files: the steps of a commit, and a repository's metadata."""
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _error(401, None, "Invalid username or password.")
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in self.card_errors]
            return _json(400 if errors else 200, {"errors": errors, "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(request.body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commits/main", path):
            return _json(200, self._commits(match[1]))
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        match = batch or re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|preupload|commit)/main)?", path)
        if match is None:
            return _Answer(404, b"Not Found")
        repo_id = match[1]
        repo = self._repos.get(repo_id)
        if repo is None:
            return _error(404, "RepoNotFound", "Repository not found")
        tip = repo.commits[repo.branches["main"]]
        if batch:
            return self._batch(json.loads(request.body)["objects"])
        if match[2] == "preupload":
            names = [file["path"] for file in json.loads(request.body)["files"]]
            return _json(200, {"files": [_upload_mode(name, tip.get(name)) for name in names]})
        if match[2] == "commit":
            header, *changes = [json.loads(line) for line in request.body.splitlines()]
            files = {change["value"]["path"]: self._content(change) for change in changes}
            if None in files.values():
                return _error(400, None, "Your push was rejected: an LFS pointer points to a file that does not exist")
            message = header["value"]["summary"]
            commit = self.commit(repo_id, tip | files, private=repo.private, gated=repo.gated, message=message)
            url = f"{self.url}/{repo_id}/commit/{commit}"
            return _json(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        return _json(200, {"id": repo_id, "private": repo.private, "sha": repo.branches["main"], "siblings": []})

    def _commits(self, repo_id: str) -> list[dict[str, Any]]:
        date = "2026-01-01T00:00:00.000Z"
        return [
            {"id": commit, "title": message, "message": "", "date": date, "authors": []}
            for commit, message, _files in reversed(self.history(repo_id))
        ]

    def _create(self, wish: dict[str, Any]) -> _Answer:
        repo_id = f"{wish['organization']}/{wish['name']}"
        exists = repo_id in self._repos
        if not exists:
            private = bool(wish.get("private")) or wish.get("visibility") == "private"  # older or newer clients
            self.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return _json(409 if exists else 200, {"url": f"{self.url}/{repo_id}", "name": repo_id})

    def _batch(self, objects: list[dict[str, Any]]) -> _Answer:
        answers = []
        for wanted in objects:
            upload = {"upload": {"href": f"{self.storage_url}/{wanted['oid']}/upload?signature=valid"}}
            there = wanted["oid"] in self._objects
            answers.append({"oid": wanted["oid"], "size": wanted["size"], **({} if there else {"actions": upload})})
        return _json(200, {"transfer": "basic", "objects": answers})

    def _content(self, change: dict[str, Any]) -> bytes | None:
        """Return a file's content from a change in a commit; None if it should be in storage and is not."""
        if change["key"] == "lfsFile":
            return self._objects.get(change["value"]["oid"])
        assert (change["key"], change["value"]["encoding"]) == ("file", "base64")
        return base64.b64decode(change["value"]["content"])

    def _storage_answer(self, request: Request, path: str) -> _Answer:
        sha256 = path.split("/")[1]
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != sha256:
                return _Answer(400, b"not the announced content")
            self._objects[sha256] = request.body
            return _Answer(200, b"")
        if sha256 not in self._objects:
            return _Answer(404, b"no such object")
        return _Answer(200, self._objects[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


@dataclass
class _Answer:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None


def _error(status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> _Answer:
    codes = {} if code is None else {"X-Error-Code": code}
    return _Answer(status, message.encode(), {**(headers or {}), **codes, "X-Error-Message": message})


def _json(status: int, value: Any) -> _Answer:
    return _Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _blob(body: bytes) -> str:
    """Return the hash that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _upload_mode(name: str, body: bytes | None) -> dict[str, Any]:
    """Tell how to upload a file, and the hash that the repository has under its name."""
    large = name.endswith(".safetensors")
    mode = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    return mode if body is None else {**mode, "oid": hashlib.sha256(body).hexdigest() if large else _blob(body)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: HubServer, storage: bool) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self.storage = storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # tests close connections early


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub = self.server.hub
        answer = hub.answer(Request(self.command, self.path, headers, self.server.storage, self._body(headers)))
        status, body, start = answer.status, answer.body, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        if wanted and status == 200 and hub.supports_ranges:
            start = int(wanted[1])
            if start >= len(body):
                status, answer.headers, body = 416, {"Content-Range": f"bytes */{len(body)}"}, b""
            else:
                status = 206
                answer.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(max(0, len(body) - start)))
        self.end_headers()
        if self.command != "HEAD":
            if answer.cut_at is not None and status in (200, 206):
                self.wfile.write(body[start : max(start, answer.cut_at)])
                self.close_connection = True
            else:
                self.wfile.write(body[start:])

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        pass
