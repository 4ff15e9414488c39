"""A Hub on the loopback interface that the real huggingface_hub client can push to, and that fails on demand.

It is as nasty as a server can be with tokens: every error and a warning header of every answer quote the one that came.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ, FINE, EXPIRED = "hf_alice_may_write", "hf_alice_may_read", "hf_alice_may_a_little", "hf_alice_no_longer"
ROLES = {WRITE: "write", READ: "read", FINE: "fineGrained"}
Route = tuple[str, Callable[..., Any]]  # method and path, as a pattern; what answers
LARGE = (".safetensors", ".npz", ".png", ".onnx", ".onnx_data", ".model")


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str = "refused", code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What happens to the next `times` requests that match: an error `status`, silence for `hang` seconds, or a cut line.

    With `late`, the request is carried out and its answer lost.
    """

    method: str
    path: str
    status: int | None = None
    message: str = "injected"
    hang: float = 0
    late: bool = False
    times: int = 1


@dataclass
class Repository:
    """Refs, and of every commit the files: path -> (content, kept as LFS)."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, ref: str, files: dict[str, tuple[bytes, bool]]) -> str:
        sha = hashlib.sha1(f"{ref}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "no such revision", "RevisionNotFound")
        return sha


@dataclass
class Hub:
    """The server's state, for tests to prepare and to look into."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    corrupted: str | None = None  # a path that is kept with a flipped bit
    received: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes of the body
    storage: dict[str, bytes] = field(default_factory=dict)  # what hub_xet keeps

    def add(self, repo_id: str, folder: Path | None = None, **settings: Any) -> str:
        """A repository with the files of a folder; returns its commit."""
        files = {} if folder is None else {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        repository = self.repositories[repo_id] = Repository(**settings)
        kept = {path: (data, path.endswith(LARGE)) for path, data in files.items()}
        repository.objects = {digest(data): data for data, large in kept.values() if large}
        return repository.commit("main", {".gitattributes": (b"", False), **kept})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return {path: data for path, (data, _) in repository.commits[repository.find(revision)].items()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def listed(path: str, data: bytes, large: bool) -> dict[str, Any]:
    """A file as the Hub lists it."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if large:
        entry |= {"lfs": {"oid": digest(data), "size": len(data), "pointerSize": 130}, "xetHash": digest(b"xet" + data)}
    return entry


@contextmanager
def serve(more: Sequence[Route] = ()) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub, "routes": [*ROUTES, *more]}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets: the second would wait 40 ms for the first to be acknowledged
    hub: Hub
    routes: Sequence[Route]

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        self.where, self.query = unquote(address.path), parse_qs(address.query)
        fault = next((f for f in self.hub.faults if f.times and f.method == self.command and re.search(f.path, self.where)), None)
        if fault:
            fault.times -= 1
            time.sleep(fault.hang)
        if fault and fault.status is None and not fault.late:
            return self.cut()
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.received.append((self.command, self.where, len(self.body)))
        try:
            if fault and fault.status is not None:
                raise Refusal(fault.status, fault.message)
            answer = self.route()
        except Refusal as refusal:
            quoted = f"{refusal.message}; you sent {self.headers.get('Authorization')}"
            extra = {"X-Error-Message": quoted, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            return self.answer(
                json.dumps({"error": quoted, "url": f"{self.hub.url}/alice/that"}).encode(), refusal.status, **extra
            )
        if fault:
            return self.cut()
        if not isinstance(answer, tuple):
            answer = json.dumps(answer).encode(), {}
        return self.answer(answer[0], **answer[1])

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-HF-Warning", f"{self.where}; you sent {self.headers.get('Authorization')}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self) -> Any:
        for pattern, run in self.routes:
            found = re.fullmatch(pattern, f"{self.command} {self.where}")
            if found:
                return run(self, *found.groups())
        raise Refusal(404, "no such page")

    def json(self) -> Any:
        return json.loads(self.body)

    # who may do what

    def role(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in ROLES:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return ROLES[header.removeprefix("Bearer ")]

    def repository(self, repo_id: str, write: bool = False, read: bool = False) -> Repository:
        role, repository = self.role(), self.hub.repositories.get(repo_id)
        mine = role is not None and repo_id.startswith("alice/")
        if repository is None or (repository.private and not mine):
            raise Refusal(404 if role else 401, "not found", "RepoNotFound")
        if (read or write) and repository.gated and not mine:
            raise Refusal(403, "ask for access", "GatedRepo")
        if write and not (mine and role == "write"):
            raise Refusal(403, "you may not write here")
        return repository

    def whoami(self) -> Any:
        role = self.role()
        if role is None:
            raise Refusal(401, "who are you?")
        orgs = [{"name": "readers", "roleInOrg": "read"}]
        return {"type": "user", "name": "alice", "orgs": orgs, "auth": {"accessToken": {"role": role}}}

    def create(self) -> Any:
        asked = self.json()
        repo_id = f"{asked.get('organization') or 'alice'}/{asked['name']}"
        if self.role() != "write" or not repo_id.startswith("alice/"):
            raise Refusal(403, "you may not create this")
        if repo_id in self.hub.repositories:
            raise Refusal(409, "exists")
        self.hub.add(repo_id, private=asked.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{repo_id}"}

    def auth_check(self, repo_id: str, write: str | None) -> Any:
        self.repository(repo_id, write=bool(write), read=True)
        return {}

    # looking

    def info(self, repo_id: str, revision: str | None) -> Any:
        repository = self.repository(repo_id)
        sha = repository.find(revision or "main")
        card = repository.commits[sha].get("README.md", (b"", False))[0].decode()
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        settings = {"private": repository.private, "gated": "manual" if repository.gated else False}
        return {"_id": "1", "id": repo_id, "sha": sha, "siblings": siblings, "tags": [], "cardData": data, **settings}

    def tree(self, repo_id: str, revision: str) -> Any:
        repository = self.repository(repo_id)
        return [listed(path, *kept) for path, kept in repository.commits[repository.find(revision)].items()]

    def paths(self, repo_id: str, revision: str) -> Any:
        asked = self.json()["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode()).get("paths", [])
        return [entry for entry in self.tree(repo_id, revision) if entry["path"] in asked]

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        repository = self.repository(repo_id, read=True)
        sha = repository.find(revision)
        if path not in repository.commits[sha]:
            raise Refusal(404, "no such file", "EntryNotFound")
        data = repository.commits[sha][path][0]
        return data, {"ETag": f'"{digest(data)}"', "X_Repo_Commit": sha}

    # changing

    def branch(self, repo_id: str, name: str) -> Any:
        repository = self.repository(repo_id, write=True)
        if name in repository.refs:
            raise Refusal(409, "exists")
        repository.refs[name] = repository.refs["main"]
        return {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        self.repository(repo_id, write=True).find(revision)
        modes = {f["path"]: "lfs" if f["path"].endswith(LARGE) else "regular" for f in self.json()["files"]}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def batch(self, repo_id: str) -> Any:
        repository = self.repository(repo_id, write=True)
        objects = self.json()["objects"]
        for o in objects:
            if o["oid"] not in repository.objects:
                o["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{repo_id}/{o['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def put(self, repo_id: str, oid: str) -> Any:
        if digest(self.body) != oid:
            raise Refusal(400, "other content than announced")
        self.hub.repositories[repo_id].objects[oid] = self.body
        return {}

    def duplicate(self, repo_id: str) -> Any:
        source, asked = self.repository(repo_id, read=True), self.json()
        target = self.repository(asked["target"]["name"], write=True)
        target.objects |= {f["sha256"]: source.objects[f["sha256"]] for f in asked["files"]}
        return {"failed": []}

    def commit(self, repo_id: str, revision: str) -> Any:
        repository = self.repository(repo_id, write=True)
        head = repository.find(revision)
        header, *lines = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit") != head:
            raise Refusal(412, "a commit has happened since")
        files = dict(repository.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif value["oid"] not in repository.objects:
                raise Refusal(400, f"{value['path']} was never sent")
            else:
                files[value["path"]] = repository.objects[value["oid"]], True
        if self.hub.corrupted in files:
            data, large = files[self.hub.corrupted]
            files[self.hub.corrupted] = data[:-1] + bytes([data[-1] ^ 1]), large
        proposed = "create_pr" in self.query
        sha = repository.commit("refs/pr/1" if proposed else revision, files)
        answer = {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"} if proposed else {})


REPO = "([^/]+/[^/]+)"
API = f"/api/models/{REPO}"
ROUTES: list[Route] = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", lambda handler: {"errors": [], "warnings": []}),
    (f"GET {API}/auth-check(/write)?", Handler.auth_check),
    (f"GET {API}(?:/revision/(.+))?", Handler.info),
    (f"GET {API}/tree/([^/]+)", Handler.tree),
    (f"POST {API}/paths-info/([^/]+)", Handler.paths),
    (f"POST {API}/branch/(.+)", Handler.branch),
    (f"POST {API}/preupload/(.+)", Handler.preupload),
    (f"POST {API}/lfs-files/duplicate", Handler.duplicate),
    (f"POST {API}/commit/(.+)", Handler.commit),
    (f"POST /{REPO}.git/info/lfs/objects/batch", Handler.batch),
    (f"PUT /_lfs/{REPO}/(.+)", Handler.put),
    (f"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]
