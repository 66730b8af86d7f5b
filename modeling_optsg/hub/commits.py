"""Files to the Hub as one commit: all of them can be seen there, or none."""

import fnmatch
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

# The Hub's own limit; `hf upload` makes several commits.
MAX_FILES = 25_000
TEXT_SUFFIXES = frozenset(".jinja .json .md .py .txt".split())
# Of httpx, or of what `huggingface_hub` has taken in its place: also what is raised when a connection is lost.
HTTPError = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


class PublishingError(RuntimeError):
    """It was not published. The message says why and what can be done."""


@dataclass
class LocalFiles:
    """Files as they are now. Texts are kept in memory; larger files are remembered by size and time.

    Args:
        paths: by their name in the repository.
        replaced: what is published in place of a file's contents.
    """

    paths: Mapping[str, Path]
    replaced: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        self._states = {name: _state(path) for name, path in self.paths.items()}
        texts = (name for name, path in self.paths.items() if path.suffix in TEXT_SUFFIXES)
        self._contents = {name: self.paths[name].read_bytes() for name in texts} | dict(self.replaced)

    def additions(self) -> list[CommitOperationAdd]:
        """Raises OSError: a file cannot be read any more."""
        return [CommitOperationAdd(name, self._contents.get(name, path)) for name, path in sorted(self.paths.items())]

    def changed(self) -> list[str]:
        """Names of those that are no longer what they were."""
        return [name for name, path in self.paths.items() if _state(path) != self._states[name]]


@dataclass(frozen=True)
class Published:
    """
    Args:
        url: page of the commit or of the pull request.
        revision: id of the commit.
        changed: whether there was anything to change; if not, it is the commit that was there.
    """

    url: str
    revision: str
    changed: bool


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: it is not of the form `org/name`.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no name of a repository: give org/name, the organisation or user first")


def push_files(
    files: LocalFiles,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    replace: Iterable[str] = (),
) -> Published:
    """Makes the repository if it is not there, uploads what it has not yet, and then shows all of it by one commit.

    Large files that have arrived when a push fails stay on the Hub, unseen: the next push does not send them again.

    Args:
        repo_type: "model" or "dataset".
        private: whether a new repository is; one that is there must be.
        revision: branch, made if it is not there; main if not given.
        create_pr: make a pull request instead, to a repository that is there.
        replace: patterns of files of the repository that are deleted if they are not among `files`.

    Raises:
        ValueError: the name is malformed, or there are more files than one commit may have.
        PublishingError: the Hub cannot be reached or refuses, or a file was changed on the way.
    """
    check_repo_id(repo_id)
    if len(files.paths) > MAX_FILES:
        raise ValueError(
            f"{len(files.paths)} files are more than one commit may have ({MAX_FILES}); upload them in several by "
            f"`hf upload {repo_id} FOLDER --repo-type {repo_type}`"
        )
    # Without one, each call below fails in words of its own.
    if get_token() is None:
        raise PublishingError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    where = {"repo_id": repo_id, "repo_type": repo_type}
    outcome = "nothing was published"
    try:
        with warnings.catch_warnings():
            # Of a book of training examples, which belongs to its model.
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            if not create_pr:
                api.create_repo(**where, private=private or None, exist_ok=True)
                if private and not api.repo_info(**where).private:
                    raise PublishingError(
                        f"{repo_id} is there already and public: make it private in its settings, or push without "
                        "--private"
                    )
                if revision and not revision.startswith("refs/"):
                    api.create_branch(**where, branch=revision, exist_ok=True)
            head = api.repo_info(**where, revision=revision).sha
            additions = files.additions()
            present = api.list_repo_files(**where, revision=head) if replace else []
            deletions = [
                CommitOperationDelete(name)
                for name in present
                if name not in files.paths and any(fnmatch.fnmatch(name, pattern) for pattern in replace)
            ]
            api.preupload_lfs_files(
                **where, additions=additions, revision=revision, create_pr=create_pr, free_memory=False
            )
            _refuse_changed(files)
            # The answer may be lost when it is done.
            outcome = "whether it was published is not known, pushing again will tell"
            commit = api.create_commit(
                **where,
                operations=[*deletions, *additions],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
    except PublishingError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Then that is the cause, whatever came of it.
        _refuse_changed(files)
        refused = (_status(error) or 500) < 500
        raise PublishingError(
            f"{_reason(error, repo_id)}; {'nothing was published' if refused else outcome}"
        ) from error
    return Published(commit.pr_url or commit.commit_url, commit.oid, commit.oid != head)


def _state(path: Path) -> tuple | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _refuse_changed(files: LocalFiles) -> None:
    if changed := files.changed():
        raise PublishingError(
            f"{', '.join(changed)} changed while it was uploaded; nothing was published. Push again when nothing is "
            "written there any more"
        )


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _reason(error: Exception, repo_id: str) -> str:
    """One line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        # Of a file that is uploaded in a thread.
        return f"{str(error).rstrip('.')}: {_reason(error.__cause__, repo_id)}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision"
    status = _status(error)
    # Of a repository that one may not see the Hub says 401 too, but only to those without a token.
    if status == 401:
        return "the Hub does not know this token: log in with `hf auth login`, or set another HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {repo_id}, or this token may not see it"
    if status == 403:
        return f"this token may not write to {repo_id}: {error.server_message}"
    if status == 412:
        return f"somebody else has changed {repo_id} meanwhile; push again"
    if status is not None and status >= 500:
        return f"the Hub answers {status}; push again later, what has arrived is not sent again"
    if isinstance(error, HTTPError) and status is None:
        lost = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
        return f"the connection was lost ({lost}); what has arrived is not sent again by the next push"
    return " ".join(str(error).split()) or type(error).__name__
