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

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """URL of a server of `repositories` (id -> folder), each with one commit on `main`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def error(self, status, code):
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self):
            api = re.fullmatch(r"/api/models/([^/?]+/[^/?]+)(?:/(?:revision|tree)/([^/?]+))?(?:\?.*)?", self.path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
            name, revision = (api or file).groups()[:2] if api or file else (None, None)
            if name not in repositories:
                return self.error(401, "RepoNotFound")
            if (revision or "main") not in ("main", COMMIT):
                return self.error(404, "RevisionNotFound")
            if name in gated and file:
                return self.error(403, "GatedRepo")
            folder = repositories[name]
            if api:
                files = [(str(f.relative_to(folder)), f.stat().st_size) for f in sorted(folder.rglob("*")) if f.is_file()]
                info = {"_id": "1", "id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f, _ in files], "tags": []}
                tree = [{"type": "file", "path": f, "size": size, "oid": "0" * 40} for f, size in files]
                return self.answer(200, json.dumps(tree if "/tree/" in self.path else info).encode())
            path = folder / file[3]
            if not path.is_file():
                return self.error(404, "EntryNotFound")
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
