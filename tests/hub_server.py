"""A local Hub: the part of the HTTP interface with which `huggingface_hub` publishes and downloads.

One port serves the API. Large files go through a second port, where addresses are signed and a token is refused, as on
the real Hub. Tokens, private repositories, revisions, pull requests and LFS (in one part or several) work as they do
there. Xet, gated repositories and the dataset viewer are not implemented.
"""

import base64
import json
import math
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs

import yaml
from hub_http import Answer, Fault, Handler, Listener, as_json, route
from hub_repositories import LFS_PATTERNS, Account, Commit, File, ObjectStore, Refusal, Repository, listing

ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
METADATA = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
PAGES = rf"/(?:(?P<kind>datasets|spaces)/)?{REPO}"
REVISION = r"(?P<revision>[^/]+)"
OBJECT = r"/objects/(?P<owner>(?:models|datasets|spaces)/[\w.-]+/[\w.-]+)/(?P<sha256>[0-9a-f]{64})"


class HubServer:
    """The state of the Hub. Tests inspect it and inject faults.

    Args:
        folder: where the files are stored; it is created.
        accounts: accounts by token.
        part_size: larger LFS objects are uploaded in parts of this size, in bytes.
    """

    def __init__(self, folder: Path, accounts: dict[str, Account], part_size: int = 2**24):
        self.accounts, self.part_size = accounts, part_size
        self.store = ObjectStore(folder)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.signature = secrets.token_hex(8)

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        """Serve requests while the context is open."""
        self.pages, self.storage = (Listener(kind, self, self.faults) for kind in (HubHandler, StorageHandler))
        self.endpoint = self.pages.address
        try:
            yield self
        finally:
            self.pages.close()
            self.storage.close()

    def requests(self, pattern: str) -> list[str]:
        """Return the matching requests, in order."""
        return [r for r in self.pages.requests + self.storage.requests if re.search(pattern, r)]

    def problems(self) -> list[str]:
        """Return requests that are not implemented, and unintended errors."""
        # The client sends this request when it runs under an assistant.
        unknown = [request for request in self.pages.unknown if "/api/agent-harnesses" not in request]
        return [*unknown, *self.storage.unknown, *self.pages.errors, *self.storage.errors]

    def repository(self, repo: str, kind: str = "models") -> Repository:
        """Return a repository, or refuse if it does not exist."""
        if (kind, repo) not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, repo]

    def contents(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return the files of a revision by name, without `.gitattributes`."""
        repository = self.repository(repo, kind)
        files = repository.resolve(revision).files.items()
        store, owner = self.store, repository.owner
        return {path: store.path(owner, file).read_bytes() for path, file in files if path != ".gitattributes"}

    def create(self, repo: str, kind: str = "models", private: bool = False) -> Repository:
        """Create a repository with its initial commit."""
        created = Repository(repo, kind, private)
        attributes = self.store.add_regular(ATTRIBUTES)
        created.add_commit("refs/heads/main", None, "initial commit", {".gitattributes": attributes})
        self.repositories[kind, repo] = created
        return created

    def change(self, repo: str, path: str, content: bytes, kind: str = "models") -> Commit:
        """Commit a file to main, as another user would."""
        with self.lock:
            repository = self.repository(repo, kind)
            head = repository.resolve("main")
            files = head.files | {path: self.store.add_regular(content)}
            return repository.add_commit("refs/heads/main", head, f"Change {path}", files)

    def sign(self, path: str) -> str:
        """Return the signed address of a path on the storage port."""
        return f"{self.storage.address}{path}?signature={self.signature}"


class StorageHandler(Handler):
    """Serves large files under signed addresses."""

    def _check_signature(self) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one way of authorisation is allowed; the address is signed")
        if self.query.get("signature") != self.state.signature:
            raise Refusal(403, "SignatureDoesNotMatch")

    def _write(self, file) -> None:
        for piece in self.pieces:
            file.write(piece)

    @route("PUT", OBJECT)
    def put(self, owner: str, sha256: str) -> Answer:
        self._check_signature()
        self.state.store.receive(owner, sha256, self._write)
        return Answer()

    @route("PUT", OBJECT + r"/(?P<number>\d+)")
    def put_part(self, owner: str, sha256: str, number: str) -> Answer:
        self._check_signature()
        return Answer(headers={"ETag": self.state.store.receive_part(owner, sha256, int(number), self._write)})

    @route("GET", OBJECT)
    def get(self, owner: str, sha256: str) -> Answer:
        self._check_signature()
        return Answer(self.state.store.lfs_path(owner, sha256), headers={"ETag": f'"{sha256}"'})


class HubHandler(Handler):
    """Serves the API of the Hub."""

    def _account(self, needed: bool = True) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.state.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Refusal(401, "Invalid username or password.")
        return self.state.accounts.get(token)

    def _readable(self, repo: str, kind: str) -> Repository:
        account = self._account(needed=False)
        found = self.state.repositories.get((kind, repo))
        if found is None or (found.private and not (account and account.reads(repo))):
            # The answer must not reveal that a private repository exists.
            status, message = (404, "Repository not found") if account else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        return found

    def _writable(self, repo: str, kind: str) -> Repository:
        account, found = self._account(), self._readable(repo, kind)
        if not account.writes(repo):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return found

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        account = self._account()
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        organisations = [{"type": "org", "name": name} for name in account.organisations]
        return as_json({"type": "user", "name": account.name, "orgs": organisations, "auth": access})

    @route("POST", "/api/repos/create")
    def create(self) -> Answer:
        account, request = self._account(), json.loads(self.body())
        kind = f"{request.get('type') or 'model'}s"
        repo = f"{request.get('organization') or account.name}/{request['name']}"
        if not account.writes(repo):
            namespace = repo.partition("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"')
        url = f"{self.state.endpoint}/{'' if kind == 'models' else kind + '/'}{repo}"
        with self.state.lock:
            if (kind, repo) in self.state.repositories:
                message = f"You already created this {kind[:-1]} repo"
                return as_json({"error": message, "url": url, "name": repo}, 409)
            self.state.create(repo, kind, request.get("visibility") == "private" or request.get("private") is True)
        return as_json({"url": url, "name": repo})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        found = METADATA.match(json.loads(self.body())["content"])
        problems = {"errors": [], "warnings": []}
        if not found:
            problems["warnings"].append({"message": "empty or missing yaml metadata in repo card"})
        else:
            try:
                if not isinstance(yaml.safe_load(found[1]), dict):
                    problems["errors"].append({"message": "YAML metadata must be a mapping"})
            except yaml.YAMLError as error:
                problems["errors"].append({"message": f"YAML metadata: {error}"})
        return as_json(problems, 400 if problems["errors"] else 200)

    @route("GET", rf"{API}(?:/revision/{REVISION})?")
    def info(self, repo: str, kind: str, revision: str = "main") -> Answer:
        repository = self._readable(repo, kind)
        commit = repository.resolve(revision)
        card = {}
        if "README.md" in commit.files:
            text = self.state.store.path(repository.owner, commit.files["README.md"]).read_text(encoding="utf-8")
            card = yaml.safe_load(found[1]) if (found := METADATA.match(text)) else {}
        info = {
            "_id": commit.id[:24],
            "id": repo,
            "author": repo.partition("/")[0],
            "sha": commit.id,
            "lastModified": commit.date,
            "createdAt": repository.history("main")[-1].date,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        if kind == "models":
            info |= {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
        return as_json(info)

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?")
    def tree(self, repo: str, kind: str, revision: str, folder: str = "") -> Answer:
        commit = self._readable(repo, kind).resolve(revision)
        return as_json(listing(commit, folder, self.query.get("recursive", "").lower() in ("true", "1")))

    @route("POST", rf"{API}/paths-info/{REVISION}")
    def paths_info(self, repo: str, kind: str, revision: str) -> Answer:
        commit = self._readable(repo, kind).resolve(revision)
        paths = parse_qs(self.body().decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in listing(commit, "", recursive=True)}
        return as_json([entries[path] for path in paths if path in entries])

    @route("GET", f"{API}/commits/{REVISION}")
    def commits(self, repo: str, kind: str, revision: str) -> Answer:
        history = self._readable(repo, kind).history(revision)
        result = ({"id": c.id, "title": c.title, "message": "", "date": c.date, "authors": []} for c in history)
        return as_json(list(result))

    @route("GET", f"{API}/refs")
    def refs(self, repo: str, kind: str) -> Answer:
        repository = self._readable(repo, kind)
        groups = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        result = {
            group: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit}
                for ref, commit in repository.refs.items()
                if ref.startswith(prefix)
            ]
            for group, prefix in groups.items()
        }
        return as_json(result | {"converts": []})

    @route("POST", f"{API}/branch/(?P<name>[^/]+)")
    def branch(self, repo: str, kind: str, name: str) -> Answer:
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        return self._new_ref(repo, kind, f"refs/heads/{name}", start)

    @route("POST", f"{API}/tag/{REVISION}")
    def tag(self, repo: str, kind: str, revision: str) -> Answer:
        return self._new_ref(repo, kind, f"refs/tags/{json.loads(self.body())['tag']}", revision)

    def _new_ref(self, repo: str, kind: str, ref: str, revision: str) -> Answer:
        repository = self._writable(repo, kind)
        with self.state.lock:
            if ref in repository.refs:
                raise Refusal(409, f"Reference already exists: {ref}")
            repository.refs[ref] = repository.resolve(revision).id
        return as_json({})

    @route("POST", f"{API}/preupload/{REVISION}")
    def preupload(self, repo: str, kind: str, revision: str) -> Answer:
        repository = self._readable(repo, kind) if "create_pr" in self.query else self._writable(repo, kind)
        self._account()
        commit = repository.resolve(revision)
        result = []
        for request in json.loads(self.body())["files"]:
            present = commit.files.get(request["path"])
            result.append(
                {
                    "path": request["path"],
                    "uploadMode": "lfs" if repository.uses_lfs(request["path"], request["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": (present.sha256 or present.oid) if present else None,
                }
            )
        return as_json({"files": result, "commitOid": commit.id})

    @route("POST", rf"{PAGES}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str, kind: str = "models") -> Answer:
        request = json.loads(self.body())
        self._account()
        # Without a branch the upload is for a pull request, which every reader may open.
        repository = (self._writable if "ref" in request else self._readable)(repo, kind)
        objects = [self._upload(repository.owner, each["oid"], each["size"]) for each in request["objects"]]
        return as_json({"transfer": "basic", "objects": objects})

    def _upload(self, owner: str, sha256: str, size: int) -> dict:
        if self.state.store.lfs_path(owner, sha256).is_file():
            return {"oid": sha256, "size": size}
        address, query = f"/objects/{owner}/{sha256}", f"owner={owner}&signature={self.state.signature}"
        upload = {"href": self.state.sign(address)}
        if size > self.state.part_size:
            numbers = range(1, math.ceil(size / self.state.part_size) + 1)
            upload = {
                "href": f"{self.state.endpoint}/api/complete_multipart?{query}",
                "header": {"chunk_size": str(self.state.part_size)}
                | {str(number): self.state.sign(f"{address}/{number}") for number in numbers},
            }
        verify = {"href": f"{self.state.endpoint}/api/lfs_verify?{query}"}
        return {"oid": sha256, "size": size, "actions": {"upload": upload, "verify": verify}}

    @route("POST", "/api/complete_multipart")
    def complete_multipart(self) -> Answer:
        self._check_signature()
        request = json.loads(self.body())
        parts = sorted(request["parts"], key=lambda part: part["partNumber"])
        self.state.store.join_parts(self.query["owner"], request["oid"], [part["etag"] for part in parts])
        return as_json({})

    @route("POST", "/api/lfs_verify")
    def lfs_verify(self) -> Answer:
        self._check_signature()
        self._account()
        request = json.loads(self.body())
        self.state.store.lfs_file(self.query["owner"], request["oid"], request["size"])
        return as_json({})

    def _check_signature(self) -> None:
        if self.query.get("signature") != self.state.signature:
            raise Refusal(403, "SignatureDoesNotMatch")

    @route("POST", f"{API}/commit/{REVISION}")
    def commit(self, repo: str, kind: str, revision: str) -> Answer:
        as_pull_request = "create_pr" in self.query
        repository = self._readable(repo, kind) if as_pull_request else self._writable(repo, kind)
        self._account()
        header, *lines = (json.loads(line) for line in self.body().splitlines())
        with self.state.lock:
            head = repository.resolve(revision)
            parent = header["value"].get("parentCommit")
            if parent and not head.id.startswith(parent) and not as_pull_request:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = self._changed(repository.owner, dict(head.files), lines)
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if not as_pull_request and ref not in repository.refs:
                raise Refusal(404, f"{revision} is not a branch", "RevisionNotFound")
            number = repository.next_pull_request()
            ref = f"refs/pr/{number}" if as_pull_request else ref
            commit = repository.add_commit(ref, head, header["value"]["summary"], files)
        page = f"{self.state.endpoint}/{'' if kind == 'models' else kind + '/'}{repo}"
        result = {"success": True, "commitOid": commit.id, "commitUrl": f"{page}/commit/{commit.id}"}
        return as_json(result | ({"pullRequestUrl": f"{page}/discussions/{number}"} if as_pull_request else {}))

    def _changed(self, owner: str, files: dict[str, File], lines: list[dict]) -> dict[str, File]:
        for line in lines:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = self.state.store.add_regular(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[path] = self.state.store.lfs_file(owner, value["oid"], value["size"])
            elif path in files:
                del files[path]
            else:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return files

    @route("GET", rf"{PAGES}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> Answer:
        repository = self._readable(repo, kind)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer(b"Entry not found", 404, headers | message)
        file = commit.files[path]
        if file.sha256 is None:
            return Answer(self.state.store.path(repository.owner, file), headers=headers | {"ETag": f'"{file.oid}"'})
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        location = self.state.sign(f"/objects/{repository.owner}/{file.sha256}")
        return Answer(b"", 302, headers | linked | {"Location": location})
