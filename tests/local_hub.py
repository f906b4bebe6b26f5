"""A hub on this machine for huggingface-hub's real client: the API, the files, and a CDN on a port of its own.

Like the real one: a revision is asked for first, then the list of its files; a small file (Git's) comes through a
redirect on the hub itself, a large one (LFS) through one to the CDN, with its hash in X-Linked-Etag; ranges are
answered. `Fault`s say what goes wrong; `LocalHub.requests` has what was asked.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0" * 39 + "1"
MESSAGES = {
    "GatedRepo": "Access to this resource is restricted.",
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}


@dataclass
class Fault:
    """What goes wrong with requests such as "GET hub /api/models/some/model/revision/main" or "GET cdn /a1b2".

    Attributes:
        where: regular expression that such a line matches.
        times: how often, before the hub works again.
        status: answered in place of what was asked for.
        headers: that go with the status.
        content: that goes with the status.
        cut: bytes of the body after which the connection is closed.
        is_reset: it is reset, not closed.
        is_damaging: one bit of the body differs.
    """

    where: str
    times: float = float("inf")
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b"{}"
    cut: int | None = None
    is_reset: bool = False
    is_damaging: bool = False


@dataclass(frozen=True)
class Request:
    """What the client asked for.

    Attributes:
        line: method, "hub" or "cdn", and path.
        token: value of Authorization.
        range: value of Range.
    """

    line: str
    token: str | None
    range: str | None


class LocalHub:
    """Models and data sets of the same files, `some/thing` and the gated `some/gated`, served at `endpoint`.

    Args:
        files: content by name.
        large: names of those that the hub keeps in LFS.
        prefix: path below which a mirror has its hub.
    """

    def __init__(self, files: dict[str, bytes], large: set[str], prefix: str = ""):
        self.files, self.large, self.prefix = files, large, prefix
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.token: str | None = None  # the only one that is accepted, where it is set
        self._lock = threading.Lock()
        self._servers = [self._serve("hub"), self._serve("cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self.endpoint += prefix

    def _serve(self, role: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "role": role})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def lines(self, pattern: str = "") -> list[str]:
        """The requests so far that hold `pattern`, as lines, without what follows a question mark."""
        return [request.line for request in self.requests if re.search(pattern, request.line)]

    def digest(self, name: str) -> str:
        """What the hub names a file's content by: SHA-256 in LFS, otherwise Git's hash of a blob."""
        content = self.files[name]
        if name in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def take_fault(self, line: str) -> Fault | None:
        """The fault that a request meets, counted."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return None

    def describe(self, name: str, is_tree: bool) -> dict[str, Any]:
        """A file's entry in the list of files, or in a revision's description."""
        size, digest = len(self.files[name]), self.digest(name)
        lfs = {"size": size, "pointerSize": 134}
        blob = hashlib.sha1(name.encode()).hexdigest() if name in self.large else digest  # of the pointer file
        if is_tree:
            large = {"lfs": {"oid": digest, **lfs}} if name in self.large else {}
            return {"type": "file", "path": name, "size": size, "oid": blob, **large}
        large = {"lfs": {"sha256": digest, **lfs}} if name in self.large else {}
        return {"rfilename": name, "size": size, "blobId": blob, **large}


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    role: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(self.path.partition("?")[0])
        line = f"{self.command} {self.role} {path.removeprefix(hub.prefix)}"
        token = self.headers["Authorization"]
        with hub._lock:
            hub.requests.append(Request(line, token, self.headers["Range"]))
        fault = hub.take_fault(line)
        if fault is not None and fault.status is not None:
            self.answer(fault.status, fault.content, fault.headers)
        elif self.role == "cdn":
            names = [name for name in hub.large if hub.digest(name) == path.removeprefix("/")]
            self.send_file(names[0], fault)
        elif not path.startswith(hub.prefix + "/"):
            self.answer(404, b"nothing here", {})
        elif hub.token is not None and token not in (None, f"Bearer {hub.token}"):
            self.refuse(401, None, "Invalid credentials in Authorization header")
        else:
            self.route(path.removeprefix(hub.prefix), token, fault)

    def route(self, path: str, token: str | None, fault: Fault | None) -> None:
        hub = self.hub
        cached = re.fullmatch(r"/api/resolve-cache/(?P<file>.+)", path)
        found = re.fullmatch(
            r"(/api/models|/api/datasets|/datasets|)/some/(?P<name>thing|gated)"
            r"(/(?P<what>tree|revision|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?",
            path,
        )
        if cached:
            self.send_file(cached["file"], fault)
        elif not found:
            self.refuse(404 if token else 401, "RepoNotFound")
        elif found["revision"] not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif found["what"] != "resolve":
            is_tree = found["what"] == "tree"
            entries = [hub.describe(name, is_tree) for name in hub.files]
            content = entries if is_tree else {"id": f"some/{found['name']}", "sha": COMMIT, "siblings": entries}
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        elif found["name"] == "gated":
            self.refuse(403 if token else 401, "GatedRepo")
        elif found["file"] not in hub.files:
            self.refuse(404, "EntryNotFound")
        else:
            name = found["file"]
            location = f"{hub.cdn}/{hub.digest(name)}?X-Amz-Signature=1"
            if name not in hub.large:
                location = f"{hub.prefix}/api/resolve-cache/{name}"
            headers = {"Location": location, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(hub.files[name]))}
            headers["X-Linked-Etag"] = f'"{hub.digest(name)}"'
            self.answer(302, b"", headers)

    def refuse(self, status: int, code: str | None, message: str = "") -> None:
        headers = {"X-Error-Message": message or MESSAGES.get(code or "", "")}
        self.answer(status, b"{}", {**headers, **({} if code is None else {"X-Error-Code": code})})

    def send_file(self, name: str, fault: Fault | None) -> None:
        content, status = self.hub.files[name], 200
        headers = {"ETag": f'"{self.hub.digest(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if fault is not None and fault.is_damaging:
            content = bytes([content[0] ^ 1]) + content[1:]
        found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if found:
            start, size, status = int(found[1]), len(content), 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            content = content[start:]
        self.answer(status, content, headers, fault)

    def answer(self, status: int, content: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.cut is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[: fault.cut])
        self.close_connection = True
        if fault.is_reset:
            time.sleep(0.3)  # until the client has read what came
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
