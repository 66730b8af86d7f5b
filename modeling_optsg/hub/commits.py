"""Upload files to the Hub in one commit: either all of them become visible, or none."""

import contextlib
import copy
import fnmatch
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

# The Hub's limit for one commit.
MAX_FILES = 25_000
TEXT_SUFFIXES = frozenset(".jinja .json .md .py .txt".split())
# The base class of the HTTP client's errors. Versions of `huggingface_hub` differ in the client they use.
HTTPError = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


# Loggers of the HTTP clients of `huggingface_hub`, by its version. They log the URL of each request.
HTTP_LOGGERS = ("httpx", "httpx2", "urllib3.connectionpool", "huggingface_hub.utils._http")
# The query of a URL. Those of uploads contain signatures.
QUERY = re.compile(r"(?<=[^\s?])\?[^\s\"']*")


class PublishingError(RuntimeError):
    """The files could not be published; the message says why and what to do."""


@dataclass
class LocalFiles:
    """Local files to publish, in the state they have when this object is created.

    Text files are read into memory. For other files the inode, size and modification time are recorded, so that a
    change during the upload is noticed.

    Args:
        paths: Local paths by file name in the repository.
        contents: File contents by file name in the repository. They replace the contents of a local file of the same
            name, or add a file.
    """

    paths: Mapping[str, Path]
    contents: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._states = {name: _state(path) for name, path in self.paths.items()}
        texts = {name: path.read_bytes() for name, path in self.paths.items() if path.suffix in TEXT_SUFFIXES}
        self.contents = texts | dict(self.contents)

    @property
    def names(self) -> set[str]:
        """Names of the published files."""
        return self.paths.keys() | self.contents.keys()

    def with_contents(self, contents: Mapping[str, bytes]) -> "LocalFiles":
        """Return a copy that publishes `contents` too. The recorded states of the local files are kept."""
        changed = copy.copy(self)
        changed.contents = self.contents | dict(contents)
        return changed

    def additions(self) -> list[CommitOperationAdd]:
        """Return the files as operations of a commit, sorted by name.

        Raises:
            OSError: A file cannot be read any more.
        """
        sources = {**self.paths, **self.contents}
        return [CommitOperationAdd(name, source) for name, source in sorted(sources.items())]

    def changed(self) -> list[str]:
        """Return the names of the files that have changed on disk since this object was created."""
        return [name for name, path in self.paths.items() if _state(path) != self._states[name]]


@dataclass(frozen=True)
class PushResult:
    """The outcome of a push.

    Args:
        url: Page of the commit or of the pull request.
        revision: Commit id.
        changed: Whether a commit was made. Without changes, `revision` is the commit that was already there.
    """

    url: str
    revision: str
    changed: bool


def check_repo_id(repo_id: str) -> None:
    """Check that `repo_id` has the form `org/name`.

    Raises:
        ValueError: It does not.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is not a repository name: {error}") from None
    if "/" not in repo_id:
        raise ValueError(
            f"{repo_id!r} is not a repository name: give org/name, starting with the organisation or user"
        )


def push_files(
    files: LocalFiles,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    delete_patterns: Iterable[str] = (),
) -> PushResult:
    """Create the repository if necessary and upload the files in one commit.

    When a push fails, large files that have already arrived stay on the Hub without being visible; the next push does
    not send them again.

    Args:
        files: The files.
        repo_id: `org/name`.
        repo_type: "model" or "dataset".
        private: Create the repository as private; an existing one must be private.
        revision: Branch, created if necessary; main by default.
        create_pr: Open a pull request on an existing repository instead.
        commit_message: Title of the commit or pull request.
        delete_patterns: Patterns of repository files to delete unless they are among `files`.

    Raises:
        ValueError: The name is malformed, or there are more files than one commit may have.
        PublishingError: The Hub cannot be reached or refuses, or a local file changed during the upload.
    """
    check_repo_id(repo_id)
    if len(files.names) > MAX_FILES:
        raise ValueError(
            f"{len(files.names)} files exceed the limit of {MAX_FILES} per commit; upload them in several commits "
            f"with `hf upload {repo_id} FOLDER --repo-type {repo_type}`"
        )
    # Without a token, every call below fails with a different message.
    if get_token() is None:
        raise PublishingError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    push = _Push(files, {"repo_id": repo_id, "repo_type": repo_type}, revision, create_pr)
    try:
        with warnings.catch_warnings(), _without_signatures():
            # The retrieval index of the Open-Book model holds training examples and belongs to the model.
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            if not create_pr:
                push.prepare_repository(private)
            head = push.head()
            commit = push.commit(head, commit_message, list(delete_patterns))
    except PublishingError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # A file that changed is the cause of whatever error followed.
        _refuse_changed(files)
        refused = (_status(error) or 500) < 500
        unknown = push.committing and not refused
        outcome = "the commit may have been made; push again to find out" if unknown else "nothing was published"
        raise PublishingError(f"{_reason(error, repo_id)}; {outcome}") from error
    return PushResult(commit.pr_url or commit.commit_url, commit.oid, commit.oid != head)


@contextlib.contextmanager
def _without_signatures() -> Iterator[None]:
    """Leave the queries of URLs out of the log: anyone who reads a signed URL can upload with it."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = QUERY.sub("?…", record.getMessage()), ()
        return True

    loggers = [logging.getLogger(name) for name in HTTP_LOGGERS]
    for logger in loggers:
        logger.addFilter(hide)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(hide)


class _Push:
    """The calls of one push.

    Args:
        files: The files.
        repository: `repo_id` and `repo_type`.
        revision: Branch, or None for main.
        create_pr: Whether the commit becomes a pull request.
    """

    def __init__(self, files: LocalFiles, repository: dict[str, str], revision: str | None, create_pr: bool):
        self.files, self.repository, self.revision, self.create_pr = files, repository, revision, create_pr
        self.api = HfApi()
        # From then on, a lost answer does not mean that nothing was published.
        self.committing = False

    def prepare_repository(self, private: bool) -> None:
        """Create the repository and the branch where they do not exist."""
        self.api.create_repo(**self.repository, private=private or None, exist_ok=True)
        if private and not self.api.repo_info(**self.repository).private:
            raise PublishingError(
                f"{self.repository['repo_id']} already exists and is public: make it private in its settings, or push "
                "without --private"
            )
        if self.revision and not self.revision.startswith("refs/"):
            self.api.create_branch(**self.repository, branch=self.revision, exist_ok=True)

    def head(self) -> str:
        """Return the id of the commit that the new one follows."""
        return self.api.repo_info(**self.repository, revision=self.revision).sha

    def commit(self, head: str, message: str, delete_patterns: list[str]) -> CommitInfo:
        """Upload the large files, then make the commit."""
        additions = self.files.additions()
        present = self.api.list_repo_files(**self.repository, revision=head) if delete_patterns else []
        deletions = [
            CommitOperationDelete(name)
            for name in present
            if name not in self.files.names and any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns)
        ]
        where = self.repository | {"revision": self.revision, "create_pr": self.create_pr}
        self.api.preupload_lfs_files(**where, additions=additions, free_memory=False)
        _refuse_changed(self.files)
        self.committing = True
        return self.api.create_commit(
            **where, operations=[*deletions, *additions], commit_message=message, parent_commit=head
        )


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _refuse_changed(files: LocalFiles) -> None:
    if changed := files.changed():
        raise PublishingError(
            f"{', '.join(changed)} changed during the upload; nothing was published. Push again when no program "
            "writes to the folder"
        )


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _reason(error: BaseException, repo_id: str) -> str:
    """Describe an error of the client in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        # Raised for a file that is uploaded in a thread; it names the file.
        return f"{str(error).rstrip('.')}: {_reason(error.__cause__, repo_id)}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision"
    status = _status(error)
    # A missing repository also gives 401, but only without a token.
    if status == 401:
        return "the Hub does not accept this token: log in with `hf auth login`, or set another HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {repo_id}, or this token may not read it"
    if status == 403:
        return f"this token may not write to {repo_id}: {error.server_message}"
    if status == 412:
        return f"{repo_id} was changed by another commit during the push; push again"
    if status is not None and status >= 500:
        return f"the Hub answers {status}; push again later, files that have arrived are not sent again"
    if isinstance(error, HTTPError) and status is None:
        cause = QUERY.sub("?…", " ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")
        return f"the connection was lost ({cause}); the next push does not send files again that have arrived"
    return QUERY.sub("?…", " ".join(str(error).split())) or type(error).__name__
