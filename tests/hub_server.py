"""A server on loopback that answers like the Hugging Face hub when models are sent to it.

What it does is what huggingface_hub asks for: a repository is made, each file is announced, large ones are
sent by git-lfs's batches, and a commit in lines of JSON has the small ones. Who has no token gets 401.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_0123456789abcdefghijklmnopqrstuvw"
LFS = (".safetensors", ".gguf", ".bin")


@dataclass
class Hub:
    """The models of a hub, and what was asked.

    Args:
        models: By name the files of each.
        private: By name whether a model is private.
        requests: Each request's method and path.
        fails: The part of a path whose requests are answered with 500, which repeats the token.
    """

    address: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: str | None = None


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_PUT(self) -> None:
        oid, data = self.path.removeprefix("/lfs/"), self._body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.state.objects[oid] = data
        self._answer({})

    def do_GET(self) -> None:
        self.state.requests.append(f"GET {self.path}")
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        hub, body = self.state, self._body()
        hub.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid user token."}, 401)
        elif hub.fails and hub.fails in self.path:
            self._answer({"error": f"{self.headers['Authorization']} may not write here\n" + "x" * 999}, 403)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(LFS) else "regular" for file in files]
            told = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(files, modes, strict=True)
            ]
            self._answer({"files": told})
        elif self.path.endswith("/info/lfs/objects/batch"):
            actions = [
                one | {"actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer({"error": "not found"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.state.models:
            self._answer({"error": "it is there", "url": f"{self.state.address}/{name}"}, 409)
            return
        self.state.models[name] = {}
        self.state.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
        self._answer({"url": f"{self.state.address}/{name}", "name": name})

    def _commit(self, body: bytes) -> None:
        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.state.models[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.state.models[name][value["path"]] = self.state.objects[value["oid"]]
        url = f"{self.state.address}/{name}/commit/{'a' * 40}"
        self._answer({"success": True, "commitOid": "a" * 40, "commitUrl": url})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
