"""A hub of a few calls: what huggingface_hub asks of a server to make a repository, and to send and fetch files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory.

    Attributes:
        commits: By the name of a repository, its commits in order: (revision, files by name).
        address: Of the server.
        instead: What is sent in the place of the answers "model" and "tree".
        headers: By the path of a file, headers that are sent with it, in the place of others of their names.
        requests: The method and path of every request.
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.address = ""
        self.instead: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}

    def commit(self, name: str, changed: dict[str, bytes]) -> str:
        """Add a commit with these files changed; returns its revision."""
        past = self.commits.setdefault(name, [])
        files = {**(past[-1][1] if past else {}), **changed}
        revision = hashlib.sha1(repr((len(past), sorted(files.items()))).encode()).hexdigest()
        past.append((revision, files))
        return revision

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit; "main" is the last one."""
        past = self.commits.get(name, [])
        return next((one for one in reversed(past) if revision in ("main", one[0])), None)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub on this machine, as long as the context is open."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _parts(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _missing(self) -> None:
        self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        match self._parts(), self._body():
            case ["api", "repos", "create"], body:
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                self.hub.commits.setdefault(name, [])
                self._json({"url": f"{self.hub.address}/{name}", "name": name})
            case ["api", "validate-yaml"], body:
                card = json.loads(body)["content"]
                valid = card.startswith("---\n") and "\n---\n" in card
                self._json({"errors": [] if valid else [{"message": "no front matter"}], "warnings": []})
            case ["api", "models", owner, name, "preupload", "main"], body:
                # the real hub sends large files to another storage, whose protocol is not spoken here
                listed = [one["path"] for one in json.loads(body)["files"]]
                files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in listed]
                self._json({"files": files})
            case ["api", "models", owner, name, "commit", "main"], body:
                changed = {}
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        changed[value["path"]] = base64.b64decode(value["content"])
                revision = self.hub.commit(f"{owner}/{name}", changed)
                url = f"{self.hub.address}/{owner}/{name}/commit/{revision}"
                self._json({"success": True, "commitOid": revision, "commitUrl": url})
            case _:
                self._missing()

    def do_GET(self) -> None:
        match self._parts():
            case ["api", "models", owner, name, *rest]:
                found = self.hub.find(f"{owner}/{name}", rest[1] if rest else "main")
                if found is None:
                    return self._missing()
                asked = "tree" if rest and rest[0] == "tree" else "model"
                if asked in self.hub.instead:
                    return self._send(200, self.hub.instead[asked], Content_Type="application/json")
                if asked == "tree":
                    listed = [
                        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in found[1].items()
                    ]
                    return self._json(listed)
                files = [{"rfilename": path} for path in found[1]]
                self._json({"id": f"{owner}/{name}", "sha": found[0], "siblings": files, "private": False, "tags": []})
            case [owner, name, "resolve", revision, *path]:
                found = self.hub.find(f"{owner}/{name}", revision)
                content = None if found is None else found[1].get("/".join(path))
                if content is None:
                    return self._missing()
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                headers = {"ETag": etag, "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
                self._send(200, content, **headers | self.hub.headers.get("/".join(path), {}))
            case _:
                self._missing()

    do_HEAD = do_GET  # noqa: N815
