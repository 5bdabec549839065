"""A small Hugging Face Hub on 127.0.0.1: the endpoints that publishing and loading call, with git-like state.

``fail_at``: the number of the write request (counted from 0) that is answered with an error; with ``fail_after`` it
takes effect first, as when an answer is lost on the way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """State of one repository, and the server in front of it."""

    def __init__(self) -> None:
        self.repo: str | None = None
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}
        self.writes: list[str] = []
        self.uploaded = 0
        self.fail_at: int | None = None
        self.fail_after = False
        self.corrupt: str | None = None
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        return commit if commit in self.commits else None

    def commit(self, files: dict[str, bytes], parent: str) -> str:
        listing = "".join(f"{name} {_git(data)}\n" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{parent}\n{listing}".encode()).hexdigest()
        self.commits[sha] = files
        return sha


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet per answer
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _reply(self, status: int, value=None, body: bytes | None = None, headers=()):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, item in [("Content-Length", str(len(body))), ("Content-Type", "application/json"), *headers]:
            self.send_header(key, item)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self):
        hub, path = self.state, unquote(urlsplit(self.path).path)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b""
        if not size and self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        writes = self.command in ("POST", "PUT", "DELETE") and "validate-yaml" not in path
        index = len(hub.writes)
        if writes:
            hub.writes.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
                return self._reply(401, {"error": "bad token"})
            if index == hub.fail_at and not hub.fail_after:
                return self._reply(403, {"error": "refused"})
        status, value, *rest = self._answer(path, body)
        if writes and index == hub.fail_at:
            return self._reply(422, {"error": "answer lost"})
        return self._reply(status, value, *rest)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, path: str, body: bytes):
        hub = self.state
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization')}/{wanted['name']}"
            if hub.repo:
                return 409, {"error": "exists", "url": f"{hub.url}/{name}"}
            hub.repo = name
            hub.branches["main"] = hub.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "")
            return 200, {"url": f"{hub.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            data = body if hashlib.sha256(body).hexdigest() == path[5:] else b""
            hub.lfs[path[5:]] = data
            hub.uploaded += len(data)
            return 200, {}
        if hub.repo is None or hub.repo not in path:
            return 404, {"error": "Repository not found"}, b"{}", [("X-Error-Code", "RepoNotFound")]
        kind, _, rest = path.split(hub.repo, 1)[1].lstrip("/.").partition("/")
        if not kind:
            return self._revision("main", body)
        return getattr(self, f"_{kind.replace('-', '_')}")(rest, body)

    def _refs(self, rest, body):
        hub = self.state
        shown = [
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in sorted(refs.items())]
            for kind, refs in (("heads", hub.branches), ("tags", hub.tags))
        ]
        return 200, {"branches": shown[0], "tags": shown[1], "converts": []}

    def _branch(self, name, body):
        hub = self.state
        if self.command == "DELETE":
            return (200, {}) if hub.branches.pop(name, None) else (404, {"error": "no branch"})
        if name in hub.branches:
            return 409, {"error": "Reference already exists"}
        commit = hub.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
        if commit is None:
            return 404, {"error": "Revision not found"}
        hub.branches[name] = commit
        return 200, {}

    def _tag(self, rest, body):
        hub = self.state
        if self.command == "DELETE":
            return (200, {}) if hub.tags.pop(rest, None) else (404, {"error": "no tag"})
        tag = json.loads(body)["tag"]
        if tag in hub.tags:
            return 409, {"error": "Tag already exists"}
        hub.tags[tag] = hub.resolve(rest)
        return 200, {}

    def _tree(self, revision, body):
        commit = self.state.resolve(revision)
        if commit is None:
            return 404, {"error": "Revision not found"}, b"{}", [("X-Error-Code", "RevisionNotFound")]
        entries = []
        for name, data in sorted(self.state.commits[commit].items()):
            entry = {"type": "file", "path": name, "oid": _git(data), "size": len(data)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return 200, entries

    def _preupload(self, revision, body):
        held = self.state.commits[self.state.resolve(revision)]
        files = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(".safetensors") else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False})
            if name in held:
                files[-1]["oid"] = _git(held[name])
        return 200, {"files": files}

    def _git(self, rest, body):  # .git/info/lfs/objects/batch
        objects = []
        for item in json.loads(body)["objects"]:
            action = {} if item["oid"] in self.state.lfs else {
                "actions": {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}}
            }  # fmt: skip
            objects.append({**item, **action})
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, branch, body):
        hub = self.state
        head = hub.branches.get(branch)
        if head is None:
            return 404, {"error": "Revision not found"}
        files = dict(hub.commits[head])
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", head) != head:
                return 412, {"error": "A commit has happened since"}
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        if hub.corrupt in files:
            files[hub.corrupt] = files[hub.corrupt][:-1] + b"?"
        hub.branches[branch] = sha = hub.commit(files, head)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{hub.repo}/commit/{sha}"}

    def _resolve(self, rest, body):
        revision, _, name = rest.partition("/")
        commit = self.state.resolve(revision)
        if commit is None:
            return 404, {}, b"", [("X-Error-Code", "RevisionNotFound")]
        data = self.state.commits[commit].get(name)
        if data is None:
            return 404, {}, b"", [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", commit)]
        return 200, None, data, [("ETag", f'"{_git(data)}"'), ("X-Repo-Commit", commit)]

    def _revision(self, revision, body):
        commit = self.state.resolve(revision)
        if commit is None:
            return 404, {}, b"{}", [("X-Error-Code", "RevisionNotFound")]
        files = [{"rfilename": name} for name in sorted(self.state.commits[commit])]
        return 200, {"id": self.state.repo, "sha": commit, "siblings": files, "private": False, "tags": []}
