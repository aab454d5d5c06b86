"""A local server that answers the hub's upload requests: repositories, large files, commits, and who is allowed to."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_secret_that_is_nobodys_0123456789"


class Hub:
    """What was uploaded, and the server's address."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.address}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return 409, url
        self.repositories[name] = asked
        return 200, url

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        files = self.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}


def _make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _read(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _is_allowed(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            name = "/".join(self.path.split("?")[0].split("/")[3:5])
            if not self._is_allowed():
                self._answer(401, {"error": "Invalid username or password."})
            elif self.path.startswith("/api/models/") and name in hub.repositories:
                siblings = [{"rfilename": path} for path in hub.files.get(name, {})]
                self._answer(200, {"id": name, "sha": "0" * 40, "siblings": siblings, "private": True})
            else:
                self._answer(404, {"error": "Not found"})

        def do_PUT(self) -> None:
            body = self._read()
            hub.objects[hashlib.sha256(body).hexdigest()] = body
            self._answer(200, {})

        def do_POST(self) -> None:
            body = self._read()
            path = self.path.split("?")[0]
            hub.requests.append(f"POST {path}")
            if not self._is_allowed():
                self._answer(401, {"error": "Invalid username or password."})
            elif path == "/api/repos/create":
                self._answer(*hub.create(json.loads(body)))
            elif path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._answer(200, {"files": files})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{hub.address}/put/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self._answer(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                name = "/".join(path.split("/")[3:5])
                self._answer(*hub.commit(name, [json.loads(line) for line in body.splitlines()]))
            else:
                self._answer(404, {"error": "Not found"})

    return Handler
