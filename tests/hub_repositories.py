"""The storage of the local Hub: repositories of commits, and files named by the hash of their contents."""

import fnmatch
import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LFS_PATTERNS = "*.arrow *.bin *.faiss *.h5 *.mp4 *.npz *.onnx *.parquet *.pt *.safetensors *.tflite *.zip".split()
# The Hub requires LFS for larger files, whatever their name.
MAX_REGULAR_FILE_SIZE = 10 * 2**20


class Refusal(Exception):
    """An error answer.

    Args:
        status: HTTP status.
        message: the error message.
        code: the Hub's error code, from which its client chooses the exception.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Account:
    """The account that a token belongs to.

    Args:
        name: user name.
        organisations: further namespaces that the account may write to.
        role: "write", or "read" for a token that may only read.
    """

    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    def reads(self, repo: str) -> bool:
        """Return whether the account may read a private repository."""
        return repo.partition("/")[0] in (self.name, *self.organisations)

    def writes(self, repo: str) -> bool:
        """Return whether the account may write to a repository."""
        return self.role == "write" and self.reads(repo)


@dataclass(frozen=True)
class File:
    """A file of a commit.

    Args:
        size: in bytes.
        oid: git's id of the blob; for an LFS file, the id of its pointer.
        sha256: hash of the contents of an LFS file.
    """

    size: int
    oid: str
    sha256: str | None = None

    def describe(self, path: str) -> dict:
        """Return the Hub's description of the file."""
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer(self.sha256, self.size))}
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid} | (
            {"lfs": lfs} if self.sha256 else {}
        )


@dataclass(frozen=True)
class Commit:
    """A commit with all files of its tree."""

    id: str
    parent: str | None
    title: str
    files: dict[str, File]
    date: str


@dataclass
class Repository:
    """A repository with its branches, tags and pull requests."""

    id: str
    kind: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The key of the repository in the object store."""
        return f"{self.kind}/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag or a commit id."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        found = next((self.refs[name] for name in names if name in self.refs), revision)
        if found not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found]

    def history(self, revision: str) -> list[Commit]:
        """Return a commit and those before it, the latest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add_commit(self, ref: str, parent: Commit | None, title: str, files: dict[str, File]) -> Commit:
        """Make a commit; it becomes visible only in the last statement."""
        listing = "".join(f"{path}\0{file.oid}\n" for path, file in sorted(files.items()))
        lineage = f"{parent.id if parent else ''}\n{title}\n{time.time_ns()}\n{listing}"
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit = Commit(_sha1(lineage.encode()), parent.id if parent else None, title, dict(files), date)
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit

    @staticmethod
    def uses_lfs(path: str, size: int) -> bool:
        """Return whether the Hub asks for a file to be uploaded by LFS."""
        name = path.rpartition("/")[2]
        return size > MAX_REGULAR_FILE_SIZE or any(fnmatch.fnmatchcase(name, pattern) for pattern in LFS_PATTERNS)

    def next_pull_request(self) -> int:
        """Return the first unused number."""
        return next(n for n in itertools.count(1) if f"refs/pr/{n}" not in self.refs)


class ObjectStore:
    """Files named by the hash of their contents. A file appears only when it is complete and its hash is right.

    LFS objects belong to a repository, as on the Hub: `owner` is its kind, organisation and name, joined by slashes.

    Args:
        folder: where the files are kept; it is created.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "regular").mkdir(parents=True)

    def add_regular(self, content: bytes) -> File:
        """Store a file that is not an LFS object."""
        oid = blob_id(content)
        self._place(self.folder / "regular" / oid, content)
        return File(len(content), oid)

    def receive(self, owner: str, sha256: str, write: Callable) -> None:
        """Store an LFS object.

        Args:
            owner: the repository.
            sha256: the hash that the contents must have.
            write: writes the contents into the open file it is called with.

        Raises:
            Refusal: the contents have another hash.
        """
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            try:
                write(file)
                file.flush()
                if (found := hashlib.sha256(Path(file.name).read_bytes()).hexdigest()) != sha256:
                    raise Refusal(400, f"the content's SHA-256 is {found}, not {sha256}")
                os.replace(file.name, self._with_parent(self.lfs_path(owner, sha256)))
            except BaseException:
                os.unlink(file.name)
                raise

    def receive_part(self, owner: str, sha256: str, number: int, write: Callable) -> str:
        """Store a part of an LFS object and return its ETag."""
        path = self._with_parent(self._part_path(owner, sha256, number))
        with path.open("wb") as file:
            write(file)
        return hashlib.md5(path.read_bytes()).hexdigest()

    def join_parts(self, owner: str, sha256: str, etags: list[str]) -> None:
        """Store an LFS object from its parts."""
        paths = [self._part_path(owner, sha256, number) for number in range(1, len(etags) + 1)]
        for path, etag in zip(paths, etags, strict=True):
            if not path.is_file() or hashlib.md5(path.read_bytes()).hexdigest() != etag:
                raise Refusal(400, f"part {path.name} did not arrive as {etag}")
        self.receive(owner, sha256, lambda file: [file.write(path.read_bytes()) for path in paths])

    def lfs_path(self, owner: str, sha256: str) -> Path:
        """Return where an LFS object is or will be stored."""
        return self.folder / "lfs" / owner / sha256

    def lfs_file(self, owner: str, sha256: str, size: int) -> File:
        """Return the file of an LFS object that has arrived."""
        path = self.lfs_path(owner, sha256)
        if not path.is_file() or path.stat().st_size != size:
            raise Refusal(400, f"Your push was rejected because an LFS pointer pointed to no file: {sha256}")
        return File(size, blob_id(pointer(sha256, size)), sha256)

    def path(self, owner: str, file: File) -> Path:
        """Return where a file is stored."""
        return self.lfs_path(owner, file.sha256) if file.sha256 else self.folder / "regular" / file.oid

    def _part_path(self, owner: str, sha256: str, number: int) -> Path:
        return self.folder / "parts" / owner / f"{sha256}-{number:05d}"

    @staticmethod
    def _with_parent(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _place(self, path: Path, content: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)


def pointer(sha256: str | None, size: int) -> bytes:
    """Return the LFS pointer that git keeps for an object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def blob_id(content: bytes) -> str:
    """Return git's id of a blob."""
    return _sha1(b"blob %d\0" % len(content) + content)


def listing(commit: Commit, folder: str, recursive: bool) -> list[dict]:
    """Return the Hub's descriptions of the files and folders below `folder`."""
    prefix = f"{folder.strip('/')}/" if folder else ""
    below = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
    if prefix and not below:
        raise Refusal(404, f"{folder} does not exist on {commit.id}", "EntryNotFound")
    entries = {}
    for path, file in below.items():
        *folders, _ = path[len(prefix) :].split("/")
        for depth in range(1, len(folders) + 1):
            if recursive or depth == 1:
                name = prefix + "/".join(folders[:depth])
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": _sha1(name.encode())}
        if recursive or not folders:
            entries[path] = file.describe(path)
    return [entries[path] for path in sorted(entries)]


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
