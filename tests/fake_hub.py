"""The part of the hub's HTTP interface that an upload speaks to, on this machine."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Repositories in memory.

    Attributes:
        url: Where it listens.
        repos: Name -> {"visibility": ..., "files": {path: bytes}}.
        token: The only one that may write.
        commits: Number of commits.
    """

    token = "hf_right"

    def __init__(self):
        self.url, self.repos, self.commits = "", {}, 0

    def answer(self, path, body, token):
        """Return (status, JSON)."""
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name = "/".join(path.split("/")[3:5])
        if path == f"/api/models/{name}/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert path == f"/api/models/{name}/commit/main", path
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "stranger":
            return 403, {"error": "You don't have the rights to create a model under stranger"}
        url = {"url": f"{self.url}/{name}"}
        if name in self.repos:
            return 409, {"error": "You already created this model repo", **url}
        self.repos[name] = {"visibility": asked.get("visibility", "public"), "files": {}}
        return 200, url

    def _commit(self, name, lines):
        assert {line["key"] for line in lines} == {"header", "file"}  # nothing is deleted
        for line in lines[1:]:
            value = line["value"]
            assert value["encoding"] == "base64"
            self.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
        self.commits += 1
        oid = f"{self.commits:040x}"
        return 200, {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


@contextmanager
def serve():
    """Yield a hub that listens on loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, answer = hub.answer(self.path, body, self.headers["Authorization"])
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
