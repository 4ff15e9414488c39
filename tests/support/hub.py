"""A read-only Hub on the loopback interface, spoken to by the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entry(folder: Path, path: Path) -> dict[str, object]:
    """A file or directory as the Hub lists it."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()}


@contextmanager
def serve(
    repositories: dict[str, Path], gated: frozenset[str] = frozenset(), lies: dict[str, dict[str, object]] | None = None
) -> Iterator[str]:
    """URL of a server of `repositories`: owner/name or datasets/owner/name -> folder, which is COMMIT on `main`.

    What stands under id@tag is an own commit with that tag. `lies` replaces parts of what is said about a repository.
    """
    revisions = {}
    for key, folder in repositories.items():
        name, _, tag = key.partition("@")
        commit = hashlib.sha1(key.encode()).hexdigest() if tag else COMMIT
        revisions[name, tag or "main"] = revisions[name, commit] = (folder, commit)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # as in hub_write.py

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def error(self, status, code):
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            path = unquote(urlsplit(self.path).path)
            api = re.fullmatch(
                r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?", path
            )
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if api:
                kind, name, request, revision, below = api.groups()
            elif file:
                (kind, name, revision, below), request = file.groups(), "resolve"
            else:
                return self.error(404, "RepoNotFound")
            name = (kind or "") + name
            if name not in repositories:
                return self.error(401, "RepoNotFound")
            if (name, revision or "main") not in revisions:
                return self.error(404, "RevisionNotFound")
            if name in gated and request == "resolve":
                return self.error(403, "GatedRepo")
            folder, commit = revisions[name, revision or "main"]
            if request == "resolve":
                return self.file(folder / below, commit)
            if request == "paths-info":
                asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
                return self.json([entry(folder, folder / p) for p in asked if (folder / p).exists()])
            if request == "tree":
                start = folder / (below or "")
                if not start.is_dir():
                    return self.error(404, "EntryNotFound")
                deep = "recursive=true" in urlsplit(self.path).query.lower()
                lie = (lies or {}).get(name, {}).get("tree")
                return self.json(lie or [entry(folder, p) for p in sorted(start.rglob("*") if deep else start.iterdir())])
            siblings = [{"rfilename": str(f.relative_to(folder))} for f in sorted(folder.rglob("*")) if f.is_file()]
            said = {"_id": "1", "id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings, "tags": []}
            return self.json({**said, **(lies or {}).get(name, {})})

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def file(self, path, commit):
            if not path.is_file() and "evil" not in path.name:
                return self.error(404, "EntryNotFound")
            data = path.read_bytes() if path.is_file() else b"{}"
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.answer(200, data, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
