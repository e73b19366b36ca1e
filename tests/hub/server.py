"""A model hub on 127.0.0.1: the routes that `huggingface_hub` asks to create, commit to, list and download from.

Every file travels inside the commit ("regular" upload mode), one branch, nothing is checked. A commit is a whole
snapshot.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """Repositories by name: a list of commits, each (sha, message, files)."""

    def __init__(self):
        self.repositories, self.lock, self.unknown = {}, threading.Lock(), []

    def create(self, name):
        self.repositories[name] = [("0" * 40, "created", {})]

    def commit(self, name, message, added, deleted):
        with self.lock:
            files = {**self.repositories[name][-1][2], **added}
            for path in deleted:
                files.pop(path, None)
            sha = hashlib.sha1(f"{name}{len(self.repositories[name])}".encode()).hexdigest()
            self.repositories[name].append((sha, message, files))
            return sha

    def files(self, name, revision="main"):
        for sha, _, files in reversed(self.repositories[name]):
            if revision in ("main", sha):
                return sha, files
        raise KeyError(revision)


class Routes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        told = {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self.body()
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'someone'}/{given['name']}"
            known = name in self.hub.repositories
            if not known:
                self.hub.create(name)
            url = f"http://{self.headers['Host']}/{name}"
            self.answer({"url": url, "name": name, "id": name}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self.answer({"files": told})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            values = [line["value"] for line in lines if line["key"] == "file"]
            added = {value["path"]: base64.b64decode(value["content"]) for value in values}
            deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
            sha = self.hub.commit(found[1], message, added, deleted)
            url = f"http://{self.headers['Host']}/{found[1]}/commit/{sha}"
            self.answer({"success": True, "commitOid": sha, "commitUrl": url})
        else:
            self.hub.unknown.append(f"POST {path}")
            self.missing("RepoNotFound")

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "someone", "fullname": "Someone", "orgs": [], "auth": {}})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if found[1] not in self.hub.repositories:
                return self.missing("RepoNotFound")
            sha, files = self.hub.files(found[1], found[2] or "main")
            siblings = [{"rfilename": name} for name in sorted(files)]
            told = {"_id": "1", "id": found[1], "modelId": found[1], "sha": sha, "siblings": siblings, "tags": []}
            self.answer({**told, "private": False, "downloads": 0, "likes": 0})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            if found[1] not in self.hub.repositories:
                return self.missing("RepoNotFound")
            _, files = self.hub.files(found[1], found[2])
            told = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(files.items())
                if name.startswith(found[3] or "")
            ]
            self.answer(told)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found[1] not in self.hub.repositories:
                return self.missing("RepoNotFound")
            sha, files = self.hub.files(found[1], found[2])
            if found[3] not in files:
                return self.missing("EntryNotFound")
            data = files[found[3]]
            self.answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})
        else:
            self.hub.unknown.append(f"{self.command} {path}")
            self.missing("RepoNotFound")

    do_HEAD = do_GET


@contextmanager
def serve():
    """(hub, its address), while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Routes,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
