"""A local server with the HTTP API of the Hub that huggingface_hub uses; it can inject faults.

Repos are stored in memory as commits of whole files. Requests are counted, and faults injected, by endpoint (`ENDPOINTS`).
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

ENDPOINTS = (
    *("whoami", "create", "branch", "info", "tree", "paths", "preupload", "batch", "put", "complete", "verify"),
    *("validate", "commit", "resolve", "refs", "harnesses"),
)
REPO = r"(models|datasets)/([^/]+/[^/]+)"
LARGE = re.compile(r"\.(safetensors|bin|png|parquet|gz|arrow)$")
SIGNATURE = "sig0123456789abcdef"  # in the query of upload URLs, as on the Hub


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next(
            (commit for commits in self.branches.values() for commit in commits if commit.oid == revision), None
        )


@dataclass
class Fault:
    """A fault of an endpoint, which happens `times` times (None: always).

    kind: respond (with `status`), disconnect (after `amount` bytes of the request), slow (`amount` bytes a second), hang
    (after `amount` bytes, 0: after all), lose_response (execute the request without a response), corrupt (store other bytes).
    """

    endpoint: str
    kind: str = "respond"
    status: int = 500
    times: int | None = None
    amount: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    skip: int = 0  # number of requests that succeed first


class Hub:
    """`with Hub() as hub:` serves until the block ends; `hub.address` is the value for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.tokens: dict[str, tuple[str, bool]] = {}  # token -> (user, write access)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None  # larger files are sent in parts of this size
        self.page_size = 1000
        self.requests: list[tuple[str, str, str]] = []  # endpoint, method, path
        self.waiting = threading.Event()  # set once a request hangs
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        """Within this block these faults are injected."""
        self.waiting.clear()
        self._open.clear()
        self._faults = list(faults)
        try:
            yield
        finally:
            self._faults = []
            self._open.set()

    def take(self, endpoint: str) -> Fault | None:
        """Return the fault of the next request to the endpoint, if any."""
        with self._lock:
            for fault in self._faults:
                if fault.endpoint == endpoint and fault.times != 0:
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def hang(self) -> None:
        self.waiting.set()
        self._open.wait(20)

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Return the repo's files; {} if there is no repo."""
        repo = self.repos.get((f"{kind}s", name))
        commit = repo and repo.at(revision)
        return {path: content for path, content in commit.files.items() if path != ".gitattributes"} if commit else {}

    def commits(self, name: str, kind: str = "model") -> int:
        """Count the commits on main after the initial one."""
        repo = self.repos.get((f"{kind}s", name))
        return len(repo.branches["main"]) - 1 if repo else 0

    def count(self, endpoint: str) -> int:
        return sum(name == endpoint for name, _, _ in self.requests)

    def make(self, name: str, kind: str = "models", private: bool = True) -> Repo:
        initial = Commit(
            hashlib.sha1(f"{kind}{name}".encode()).hexdigest(), "initial commit", {".gitattributes": b"*\n"}
        )
        return self.repos.setdefault((kind, name), Repo(private, {"main": [initial]}))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class ErrorResponse(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    """Serve one connection; `Hub` makes a subclass with its `hub`."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    ROUTES: list[tuple[str, str, str, str]] = [
        ("GET", r"/api/whoami-v2", "whoami", "whoami"),
        ("GET", r"/api/agent-harnesses", "harnesses", "harnesses"),
        ("POST", r"/api/repos/create", "create", "create"),
        ("POST", r"/api/validate-yaml", "validate", "validate"),
        ("POST", rf"/api/{REPO}/branch/([^/]+)", "branch", "branch"),
        ("GET", rf"/api/{REPO}/refs", "refs", "refs"),
        ("GET", rf"/api/{REPO}", "info", "info"),
        ("GET", rf"/api/{REPO}/revision/([^/]+)", "info", "info"),
        ("GET", rf"/api/{REPO}/tree/([^/]+)(?:/(.+))?", "tree", "tree"),
        ("POST", rf"/api/{REPO}/paths-info/([^/]+)", "paths", "paths"),
        ("POST", rf"/api/{REPO}/preupload/([^/]+)", "preupload", "preupload"),
        ("POST", rf"/api/{REPO}/commit/([^/]+)", "commit", "commit"),
        ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]+)(?:/(\d+))?", "put", "put"),
        ("POST", r"/lfs/([0-9a-f]+)/complete", "complete", "complete"),
        ("POST", r"/lfs/([0-9a-f]+)/verify", "verify", "verify"),
        ("HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve", "resolve"),
        ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve", "resolve"),
    ]

    def log_message(self, *args: Any) -> None:
        """Log nothing: the hub keeps a list of requests."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}
        for method, pattern, endpoint, handler in self.ROUTES:
            match = re.fullmatch(pattern, split.path)
            if match and method == self.command:
                arguments = [unquote(group or "") for group in match.groups()]
                self._answer(endpoint, getattr(self, f"_{handler}"), arguments)
                return
        self.hub.requests.append(("unknown", self.command, split.path))
        self._read(None)
        self._send(404, {"error": "Not Found"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, endpoint: str, handler: Callable[..., Any], arguments: list[str]) -> None:
        self.hub.requests.append((endpoint, self.command, urlsplit(self.path).path))
        fault = self.hub.take(endpoint)
        self.body = self._read(fault)
        if fault is not None and fault.kind == "respond":
            self._send(fault.status, {"error": fault.text or "injected fault"}, fault.headers)
            return
        if fault is not None and fault.kind == "hang":
            self.hub.hang()
        self.corrupt = fault is not None and fault.kind == "corrupt"
        try:
            with self.hub._lock:
                status, value, headers = handler(*arguments)
        except ErrorResponse as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self._send(error.status, {"error": error.message}, code | {"X-Error-Message": error.message})
            return
        if fault is not None and fault.kind == "lose_response":
            self._reset_connection()
        self._send(status, value, headers)

    # Reading and writing.

    def _read(self, fault: Fault | None) -> bytes:
        """Read the body, as far as the fault lets it arrive."""
        body = bytearray()
        for part in self._parts():
            body += part
            if fault is not None and fault.kind == "slow":
                time.sleep(len(part) / fault.amount)
            if fault is not None and fault.kind in ("disconnect", "hang") and len(body) >= fault.amount > 0:
                if fault.kind == "hang":
                    self.hub.hang()
                self._reset_connection()
        if fault is not None and fault.kind == "disconnect":
            self._reset_connection()
        return bytes(body)

    def _parts(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        remaining = int(self.headers.get("Content-Length") or 0)
        while remaining:
            part = self.rfile.read(min(remaining, 4096))
            if not part:
                raise ConnectionResetError
            remaining -= len(part)
            yield part

    def _reset_connection(self) -> None:
        """Reset the connection, as a broken link does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        content_type = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in ({"Content-Type": content_type, "Content-Length": str(len(content))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Access rights.

    def _user(self) -> tuple[str, bool] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise ErrorResponse(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _require_write_access(self, name: str) -> str:
        user = self._user()
        if user is None:
            raise ErrorResponse(401, message="Invalid username or password.")
        if not user[1] or name.split("/")[0] != user[0]:
            raise ErrorResponse(
                403, message=f"you must use a write token to upload to a repository of {name.split('/')[0]}"
            )
        return user[0]

    def _repo(self, kind: str, name: str) -> Repo:
        user = self._user()
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
            raise ErrorResponse(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit_of(self, kind: str, name: str, revision: str) -> Commit:
        commit = self._repo(kind, name).at(revision or "main")
        if commit is None:
            raise ErrorResponse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # The endpoints.

    def _whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise ErrorResponse(401, message="Invalid username or password.")
        return 200, {"type": "user", "name": user[0], "orgs": []}, {}

    def _harnesses(self) -> Any:
        """huggingface_hub requests it once a day, to name the calling program in its user agent."""
        return 200, {"standardEnvVars": [], "harnesses": {}}, {}

    def _create(self) -> Any:
        request = json.loads(self.body)
        name = f"{request.get('organization')}/{request['name']}"
        kind = f"{request.get('type') or 'model'}s"
        self._require_write_access(name)
        url = f"{self.hub.address}/{'' if kind == 'models' else 'datasets/'}{name}"
        if (kind, name) in self.hub.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.make(name, kind, private)
        return 200, {"url": url, "name": name}, {}

    def _validate(self) -> Any:
        import yaml

        front = re.match(r"---\n(.*?)\n?---", json.loads(self.body)["content"], re.DOTALL)
        metadata = yaml.safe_load(front[1]) if front else None
        ids = [metadata.get("base_model"), *(metadata.get("datasets") or [])] if isinstance(metadata, dict) else []
        invalid = [name for name in ids if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
        if invalid:
            return (
                400,
                {"errors": [{"message": f"{name!r} is not a valid id"} for name in invalid], "warnings": []},
                {},
            )
        return 200, {"errors": [], "warnings": []}, {}

    def _branch(self, kind: str, name: str, branch: str) -> Any:
        self._require_write_access(name)
        branches = self._repo(kind, name).branches
        if branch in branches:
            raise ErrorResponse(409, message="Reference already exists")
        branches[branch] = [branches["main"][-1]]
        return 200, {}, {}

    def _refs(self, kind: str, name: str) -> Any:
        branches = self._repo(kind, name).branches
        refs = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
            for branch, commits in branches.items()
        ]
        return 200, {"branches": refs, "tags": [], "converts": []}, {}

    def _info(self, kind: str, name: str, revision: str = "") -> Any:
        commit, repo = self._commit_of(kind, name, revision), self._repo(kind, name)
        siblings = [{"rfilename": path} for path in commit.files]
        info = {"_id": name, "id": name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}
        return 200, info | {"downloads": 0, "likes": 0, "gated": False, "disabled": False}, {}

    def _tree(self, kind: str, name: str, revision: str, below: str = "") -> Any:
        commit = self._commit_of(kind, name, revision)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        start = f"{below}/" if below else ""
        entries: dict[str, Any] = {}
        for path, content in sorted(commit.files.items()):
            if path.startswith(start):
                inner = path[len(start) :]
                folders = [start + inner[: slash.start()] for slash in re.finditer("/", inner)]
                for folder in folders if recursive else folders[:1]:
                    entries.setdefault(
                        folder, {"type": "directory", "oid": git_hash(folder.encode()), "size": 0, "path": folder}
                    )
                if recursive or not folders:
                    entries[path] = self._entry(path, content)
        if below and not entries:
            raise ErrorResponse(404, "EntryNotFound", f"{below} does not exist on {revision}")
        first = int(self.query.get("cursor", 0))
        page = list(entries.values())[first : first + self.hub.page_size]
        following = first + self.hub.page_size
        link = f'<{self.hub.address}{urlsplit(self.path).path}?recursive={recursive}&cursor={following}>; rel="next"'
        return 200, page, {"Link": link} if following < len(entries) else {}

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": git_hash(content), "size": len(content), "path": path}
        if LARGE.search(path):
            sha = hashlib.sha256(content).hexdigest()
            entry |= {"oid": git_hash(sha.encode()), "lfs": {"oid": sha, "size": len(content), "pointerSize": 134}}
        return entry

    def _paths(self, kind: str, name: str, revision: str) -> Any:
        commit = self._commit_of(kind, name, revision)
        requested = (
            parse_qs(self.body.decode()).get("paths", []) if b"paths=" in self.body else json.loads(self.body)["paths"]
        )
        entries = [self._entry(path, commit.files[path]) for path in requested if path in commit.files]
        folders = [path for path in requested if any(file.startswith(f"{path}/") for file in commit.files)]
        entries += [{"type": "directory", "oid": git_hash(path.encode()), "size": 0, "path": path} for path in folders]
        return 200, entries, {}

    def _preupload(self, kind: str, name: str, revision: str) -> Any:
        self._require_write_access(name)
        existing = self._commit_of(kind, name, revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            path, content = file["path"], existing.get(file["path"])
            large = bool(LARGE.search(path))
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else git_hash(content)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def _batch(self, kind: str, name: str) -> Any:
        self._require_write_access(name)
        objects = []
        for blob in json.loads(self.body)["objects"]:
            oid, size = blob["oid"], blob["size"]
            if oid in self.hub.blobs:
                objects.append({"oid": oid, "size": size})
                continue
            url, query = f"{self.hub.address}/lfs/{oid}", f"?X-Amz-Signature={SIGNATURE}"
            upload: dict[str, Any] = {"href": f"{url}{query}"}
            if self.hub.part_size is not None and size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                parts = {str(number): f"{url}/{number}{query}" for number in range(1, count + 1)}
                upload = {"href": f"{url}/complete", "header": {"chunk_size": str(self.hub.part_size)} | parts}
            objects.append(
                {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{url}/verify"}}}
            )
        return 200, {"objects": objects, "transfer": "basic"}, {}

    def _put(self, oid: str, part: str) -> Any:
        if self.query.get("X-Amz-Signature") != SIGNATURE:
            raise ErrorResponse(403, message="SignatureDoesNotMatch")
        if part:
            self.hub.parts[oid, int(part)] = self.body
        else:
            self._store(oid, self.body)
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def _complete(self, oid: str) -> Any:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._store(oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        return 200, {"success": True}, {}

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise ErrorResponse(400, message="BadDigest")
        self.hub.blobs[oid] = content

    def _verify(self, oid: str) -> Any:
        size = json.loads(self.body)["size"]
        if len(self.hub.blobs.get(oid, b"")) != size:
            raise ErrorResponse(404, message="object not found")
        return 200, {}, {}

    def _commit(self, kind: str, name: str, branch: str) -> Any:
        self._require_write_access(name)
        old = self._commit_of(kind, name, branch)
        files, summary = dict(old.files), ""
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                summary = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise ErrorResponse(400, message=f"LFS object {value['oid']} does not exist")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
        if self.corrupt:
            largest = max(files, key=lambda path: len(files[path]))
            files[largest] = files[largest][:-1] + b"?"
        seed = json.dumps([summary, old.oid, sorted((path, git_hash(content)) for path, content in files.items())])
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), summary, files)
        self._repo(kind, name).branches[branch].append(commit)
        url = f"{self.hub.address}/{'' if kind == 'models' else 'datasets/'}{name}"
        return 200, {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}, {}

    def _resolve(self, dataset: str, name: str, revision: str, path: str) -> Any:
        commit = self._commit_of("datasets" if dataset else "models", name, revision)
        content = commit.files.get(path)
        if content is None:
            raise ErrorResponse(404, "EntryNotFound", f"{quote(path)} does not exist on {revision}")
        large = LARGE.search(path)
        etag = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid, "Content-Length": str(len(content))}
        return (
            200,
            content,
            headers | ({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))} if large else {}),
        )
