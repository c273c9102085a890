"""A hub and an object store on loopback, for the real clients; and what can go wrong with them."""

import contextlib
import hashlib
import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _lfs(content):
    digest = hashlib.sha256(content).hexdigest()
    return {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 1}}


@dataclass
class Remote:
    """Serves `files` as hf://moe/docs and in the bucket `models` under docs/.

    faults: by file name (or "list"), what happens to its next requests, one after the other: a number is a
    status, ("cut", n) closes the connection after n bytes, ("stall", n) goes silent there, ("more", n) sends
    n bytes more than were asked for. stated: sizes that are listed instead of the true ones. token: what
    requests must bear.
    """

    files: dict[str, bytes]
    faults: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    stated: dict[str, int] = field(default_factory=dict)
    token: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, file and range of each request."""
    silent: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def downloads(self, name):
        return [span for method, file, span in self.requests if (method, file) == ("GET", name)]

    def listing(self):
        siblings = [
            {
                "rfilename": name,
                "size": self.stated.get(name, len(content)),
                "blobId": git_sha1(content),
                **(
                    {
                        "lfs": {
                            "sha256": hashlib.sha256(content).hexdigest(),
                            "size": len(content),
                            "pointerSize": 1,
                        }
                    }
                    if name.endswith(".safetensors")
                    else {}
                ),
            }
            for name, content in self.files.items()
        ]
        return json.dumps({"id": "moe/docs", "sha": COMMIT, "siblings": siblings}).encode()

    def bucket(self, prefix):
        contents = "".join(
            f"<Contents><Key>{escape(prefix + name)}</Key>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{git_sha1(content)}&quot;</ETag>"
            f"<Size>{self.stated.get(name, len(content))}</Size></Contents>"
            for name, content in self.files.items()
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    remote: Remote

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        parts, remote = urlsplit(self.path), self.remote
        name = unquote(parts.path).rpartition("/")[2]
        listing = "/api/models/" in parts.path or "list-type" in parts.query
        what = "list" if listing else name
        span = self.headers.get("Range", "")
        remote.requests.append((self.command, what, span))
        fault = remote.faults[what].pop(0) if body and remote.faults[what] else None
        if isinstance(fault, int):
            return self._send(fault, b"", {"Retry-After": "0"})
        if remote.token and self.headers.get("Authorization") != f"Bearer {remote.token}":
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if "/api/models/" in parts.path:
            return self._send(200, remote.listing(), {"Content-Type": "application/json"}, fault)
        if listing:
            prefix = parse_qs(parts.query).get("prefix", [""])[0]
            return self._send(200, remote.bucket(prefix), {"Content-Type": "application/xml"}, fault)
        if name not in remote.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._file(remote.files[name], span, fault, body)

    def _file(self, content, span, fault, body):
        headers = {"ETag": f'"{git_sha1(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["Last-Modified"] = "Thu, 01 Jan 2026 00:00:00 GMT"
        status = 200
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            if int(first) >= len(content):
                return self._send(416, b"", {})
            status, content = 206, content[int(first) : end]
        return self._send(status, content, headers, fault, body)

    def _send(self, status, content, headers, fault=None, body=True):
        if fault is not None and fault[0] == "more":
            content, fault = content + bytes(fault[1]), None
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content if fault is None else content[: fault[1]])
            if fault is not None:
                self.wfile.flush()
                if fault[0] == "stall":
                    self.remote.silent.wait(30)
                self.close_connection = True


@contextlib.contextmanager
def serving(remote):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"remote": remote}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    remote.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield remote
    finally:
        remote.silent.set()
        server.shutdown()
        server.server_close()
