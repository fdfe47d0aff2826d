"""A Hub on this machine: as much of its HTTP interface as it takes to upload a model, and to download one.

* Large files go the way of Git LFS: stored by their SHA-256 before a commit names them, and not asked for if they are there.
  Or they go the way of Xet, where `hf_xet` stores what a file is made of: its own store in a folder stands for the Hub's.
* What is private, gated or not there is refused as the Hub does it: with status and headers by which its library tells these apart.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


OWNER, TOKEN = "me", "hf_of_the_owner"
OTHER = "hf_of_somebody_else"  # a token that is valid, and may read what is public


@dataclass
class Repository:
    """A model: its files, a bytes object or what LFS says of it (SHA-256 and size), and what commits did."""

    files: dict = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: list = field(default_factory=list)

    @property
    def sha(self):
        return f"{len(self.commits):040x}"


@dataclass
class Hub:
    """What the server knows and does; tests look at it and change it."""

    url: str = ""
    repositories: dict = field(default_factory=dict)
    stored: dict = field(default_factory=dict)  # large files by SHA-256
    received: list = field(default_factory=list)  # SHA-256 of those that came whole, and once more if they came again
    came: threading.Event = field(default_factory=threading.Event)  # set when one has
    xet: str = ""  # the folder that stands for Xet's store
    xet_hashes: dict = field(default_factory=dict)  # of its files, by SHA-256
    half_way: object = (
        None  # called with SHA-256 and size of a file, half of which is there; if it returns true, the connection ends
    )
    refuse_commits: bool = False

    def add(self, name, folder, **options):
        """Put the files of a folder in a new repository."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(files, commits=[[*files]], **options)


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is a class attribute."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def answer(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, message, code=None):
        self.read()  # or the connection could not be used again
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer(status, {"error": message}, **headers)

    def read(self, size=None):
        size = int(self.headers.get("Content-Length", 0)) if size is None else size
        return self.rfile.read(size)

    def respond(self):
        path = unquote(urlsplit(self.path).path)
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command.replace("HEAD", "GET"):
                act(self, *found.groups())
                return
        self.refuse(404, f"no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = respond

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repository(self, name, revision="main", *, files=True, write=False):
        """A repository, if this request may have it: to write, to read its files, or only to know of it. Else it is refused."""
        found = self.hub.repositories.get(name)
        owner = self.token == TOKEN and name.startswith(f"{OWNER}/")
        if self.token not in (TOKEN, OTHER, ""):
            self.refuse(401, "Invalid credentials in Authorization header")
        elif found is None or (found.private and not owner):
            self.refuse(*(404, "Repository not found") if self.token else (401, "Invalid username or password."), "RepoNotFound")
        elif files and found.gated and not owner:
            self.refuse(403 if self.token else 401, f"Access to model {name} is restricted.", "GatedRepo")
        elif write and not owner:
            self.refuse(403, "you must use a token with write access to this repo")
        elif revision not in (None, "main", found.sha):
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
        else:
            return found
        return None

    def create(self):
        asked = json.loads(self.read())
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        there = {"url": f"{self.hub.url}/{name}"}
        if self.token not in (TOKEN, OTHER):
            self.answer(401, {"error": "Invalid username or password."})
        elif self.token != TOKEN or not name.startswith(f"{OWNER}/"):
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo"} | there)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=bool(private))
            self.answer(200, there)

    def validate_yaml(self):
        self.read()
        self.answer(200, {"errors": [], "warnings": []})

    def information(self, name, revision=None):
        if (found := self.repository(name, revision, files=False)) is not None:
            siblings = [{"rfilename": path} for path in found.files]
            self.answer(200, {"id": name, "modelId": name, "sha": found.sha, "private": found.private, "siblings": siblings})

    def tree(self, name, revision, folder):
        if (found := self.repository(name, revision)) is None:
            return
        inside = [self.entry(path, content) for path, content in found.files.items() if f"/{path}".startswith(f"{folder or ''}/")]
        if inside:
            self.answer(200, inside)
        else:
            self.refuse(404, f"{folder} does not exist", "EntryNotFound")

    def entry(self, path, content):
        if isinstance(content, bytes):
            return {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        sha, size = content
        entry = {"type": "file", "path": path, "size": size, "oid": lfs_oid(sha, size)}
        entry["lfs"] = {"oid": sha, "size": size, "pointerSize": len(pointer(sha, size))}
        return entry | ({"xetHash": self.hub.xet_hashes[sha]} if sha in self.hub.xet_hashes else {})

    def preupload(self, name, _revision):
        if (found := self.repository(name, write=True)) is None:
            return
        files = []
        for file in json.loads(self.read())["files"]:
            large = b"\0" in base64.b64decode(file["sample"])
            there = found.files.get(file["path"])
            oid = git_oid(there) if isinstance(there, bytes) else there and there[0]
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, name):
        if self.repository(name, write=True) is None:
            return
        objects = json.loads(self.read())["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.stored:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, sha):
        size = int(self.headers["Content-Length"])
        data = self.read(size // 2)
        if self.hub.half_way is not None and self.hub.half_way(sha, size):
            self.close_connection = True
            return
        data += self.read(size - size // 2)
        assert hashlib.sha256(data).hexdigest() == sha
        self.hub.stored[sha] = data
        self.hub.received.append(sha)
        self.hub.came.set()
        self.answer(200)

    def commit(self, name, _revision):
        if (found := self.repository(name, write=True)) is None:
            return
        if self.hub.refuse_commits:
            self.refuse(400, "out of order")
            return
        lines = [json.loads(line) for line in self.read().splitlines()]
        files = [line["value"] for line in lines if line["key"] in ("file", "lfsFile")]
        for file in files:
            large = "oid" in file
            assert not large or self.hub.xet or file["oid"] in self.hub.stored
            found.files[file["path"]] = (file["oid"], file["size"]) if large else base64.b64decode(file["content"])
        found.commits.append([file["path"] for file in files])
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{found.sha}", "commitOid": found.sha})

    def resolve(self, name, revision, path):
        if (found := self.repository(name, revision)) is None:
            return
        if path not in found.files:
            self.refuse(404, "Entry not found", "EntryNotFound")
            return
        content = found.files[path]
        headers = {"X_Repo_Commit": found.sha, "ETag": f'"{self.entry(path, content)["oid"]}"'}
        if not isinstance(content, bytes):
            sha, size = content
            headers |= {"X_Linked_ETag": f'"{sha}"', "X_Linked_Size": size}
            if sha in self.hub.xet_hashes:  # without `hf_xet`, it could not be had
                route = f"{self.hub.url}/api/models/{name}/xet-read-token/main"
                headers |= {"X_Xet_Hash": self.hub.xet_hashes[sha], "X_Xet_Refresh_Route": route}
            content = self.hub.stored.get(sha, b"")
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], **headers)
        else:
            self.answer(200, content, **headers)

    def xet_token(self, name, kind):
        if self.repository(name, write=kind == "write") is None:
            return
        if not self.hub.xet:
            self.refuse(404, "no Xet here")
            return
        address = f"local://{self.hub.xet}"
        token = {"X_Xet_Cas_Url": address, "X_Xet_Access_Token": "token", "X_Xet_Token_Expiration": 1 << 32}
        self.answer(200, {"casUrl": address, "accessToken": "token", "exp": 1 << 32}, **token)


ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", "/api/models/([^/]+/[^/]+)/xet-(read|write)-token/.+", Handler.xet_token),
    ("GET", "/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.+)?", Handler.tree),
    ("GET", "/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", Handler.information),
    ("POST", "/api/models/([^/]+/[^/]+)/preupload/(.+)", Handler.preupload),
    ("POST", "/api/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
    ("POST", "/([^/]+/[^/]+)[.]git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(.+)", Handler.store),
    ("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


def git_oid(content):
    """The name that Git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha, size):
    """What Git has of a file that LFS holds."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()


def lfs_oid(sha, size):
    return git_oid(pointer(sha, size))


@contextmanager
def running_hub():
    """A `Hub` that answers at its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
