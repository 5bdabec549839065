"""A small Hub of datasets on 127.0.0.1: the endpoints that pinning and reading call, with failures on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_PAGE = 3  # entries of a tree in one answer


class FakeDatasets:
    """Datasets by id, each a commit and its files. ``lfs`` says of which files the Hub knows the sha256.

    ``failing`` requests are answered 503 before any other is served; ``cut`` names files of which half is sent, that
    many times; ``refused`` maps an id to (status, X-Error-Code).
    """

    def __init__(self) -> None:
        self.datasets: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.failing = 0
        self.cut: dict[str, int] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, dataset: str, files: dict[str, bytes]) -> str:
        """Put a dataset in the place of what was there; returns the new commit."""
        listing = json.dumps([dataset, {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}])
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.datasets[dataset] = commit, files
        return commit

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeDatasets
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _reply(self, status, value=None, body=None, headers=()):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, item in [("Content-Length", str(len(body))), *headers]:
            self.send_header(key, item)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, split = self.state, urlsplit(self.path)
        path = unquote(split.path)
        hub.asked.append(path)
        found = re.fullmatch(r"/(api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        if hub.failing:
            hub.failing -= 1
            return self._reply(503, {"error": "try later"})
        if not found or found[2] not in hub.datasets:
            return self._reply(401, {"error": "no such repository"}, headers=[("X-Error-Code", "RepoNotFound")])
        dataset, kind, revision, rest = found[2], found[3], found[4], found[5]
        commit, files = hub.datasets[dataset]
        if dataset in hub.refused:
            status, code = hub.refused[dataset]
            return self._reply(status, {"error": "refused"}, headers=[("X-Error-Code", code)])
        if revision not in (None, "main", commit):
            return self._reply(404, {"error": "no such revision"}, headers=[("X-Error-Code", "RevisionNotFound")])
        if kind == "tree":
            return self._tree(commit, files, dataset, parse_qs(split.query))
        if kind == "resolve":
            return self._file(commit, files, rest)
        return self._reply(200, {"id": dataset, "sha": commit, "siblings": [], "tags": [], "private": False})

    do_HEAD = do_GET

    def _tree(self, commit, files, dataset, query):
        start = int(query.get("cursor", ["0"])[0])
        names = sorted(files)[start : start + _PAGE]
        entries = [
            {
                "type": "file",
                "path": name,
                "size": len(files[name]),
                "oid": hashlib.sha1(files[name]).hexdigest(),
                **({} if name.endswith(".jsonl") else {"lfs": self._lfs(files[name])}),
            }
            for name in names
        ]
        headers = []
        if start + _PAGE < len(files):
            more = f"{self.state.url}/api/datasets/{dataset}/tree/{commit}?recursive=true&cursor={start + _PAGE}"
            headers = [("Link", f'<{more}>; rel="next"')]
        self._reply(200, entries, headers=headers)

    @staticmethod
    def _lfs(data):
        return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}

    def _file(self, commit, files, name):
        if name not in files:
            return self._reply(404, {"error": "no such file"}, headers=[("X-Error-Code", "EntryNotFound")])
        data = files[name]
        headers = [("ETag", f'"{hashlib.sha256(data).hexdigest()}"'), ("X-Repo-Commit", commit)]
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if self.command == "GET" and self.state.cut.get(name, 0):
            self.state.cut[name] -= 1
            self.send_response(200)
            for key, item in [("Content-Length", str(len(data))), *headers]:
                self.send_header(key, item)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        if begin:
            headers.append(("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}"))
        return self._reply(206 if begin else 200, body=data[begin:], headers=headers)
