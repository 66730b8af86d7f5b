"""What `optsg tag` says: tags and planned changes on standard output, everything else on standard error."""

import json
import sys
from collections import Counter

from .media_files import MediaFile
from .sidecars import Change, SidecarError
from .terminal import TagTable, printable, say


class TagReport:
    """Takes in the outcome of every file and gives the exit status.

    Args:
        files: paths of all files of the run.
        as_json: JSON lines on standard output.
        writers: of `make_writer`; without any, and without `as_json`, a table is printed.
        dry_run: say what the writers would do, and what they cannot.
    """

    def __init__(self, files: list[str], as_json: bool, writers: list, dry_run: bool = False):
        self.files, self.as_json, self.writers, self.dry_run = files, as_json, writers, dry_run
        self.table = None if as_json or writers else TagTable(files)
        self.tagged = self.done = self.written = self.unchanged = 0
        self.failures: set[str] = set()
        self.remarks = Counter()

    def pending(self, files: list[MediaFile], redo: bool) -> list[tuple[MediaFile, list]]:
        """The files that are still to be tagged, each with the writers that want its tags. Those whose sidecars cannot
        be written are failures, before a model is loaded."""
        todo = []
        for file in files:
            wanting, refused = [], 0
            for writer in self.writers:
                try:
                    if not writer.done(file) or redo:
                        wanting.append(writer)
                except SidecarError as error:
                    refused += 1
                    self.refused(file, str(error), writer)
            if wanting or not self.writers:
                todo.append((file, wanting))
                continue
            self.done += not refused
            if self.as_json:
                state = {"error": "not every file of --write can be written"} if refused else {"done": True}
                self._json(file=file.path, title=file.title, **state)
        return todo

    def outcome(self, file: MediaFile, outcome: list[dict] | Exception, writers: list):
        if isinstance(outcome, Exception):
            self.failure(file.path, file.title, str(outcome))
            return
        if self.as_json:
            self._json(file=file.path, title=file.title, tags=outcome)
        elif self.table is not None:
            if self.tagged == 0:
                say(self.table.header())
            say(self.table.rows(file.path, outcome))
        self.tagged += 1
        for writer in writers:
            try:
                self._change(file, writer.write(file, outcome))
            except SidecarError as error:
                self.refused(file, str(error), writer)

    def failure(self, path: str, title: str | None, reason: str):
        """A file that gets no tags."""
        self._failed(path, reason)
        if self.as_json:
            self._json(file=path, title=title, error=reason)
        for writer in self.writers:
            if hasattr(writer, "failed"):
                writer.failed(path, title, reason)

    def refused(self, file: MediaFile, reason: str, writer):
        """A file whose tags one of the writers cannot write; the others have them."""
        self._failed(file.path, reason)
        if hasattr(writer, "failed"):
            writer.failed(file.path, file.title, reason)

    def _failed(self, path: str, reason: str):
        self.failures.add(path)
        self.note(reason if path in reason else f"{path}: {reason}")

    def note(self, text: str):
        say(f"optsg tag: {printable(text)}", file=sys.stderr)

    def interrupted(self):
        if self.writers and not self.dry_run:
            self.note(f"stopped after {self.tagged} files; the same command goes on from here")

    def close(self) -> int:
        for writer in self.writers:
            if hasattr(writer, "finish"):
                try:
                    if writer.finish(self.files):
                        self.note(f"{writer.path}: {len(writer.rows)} rows")
                        if writer.left_out:
                            self.note(
                                f"{writer.path}: {writer.left_out} rows of an earlier run, of other files, are not in "
                                "it any more; to have all, name all folders in one command"
                            )
                except SidecarError as error:
                    self.failures.add(str(writer.path))
                    self.note(str(error))
        for remark, count in self.remarks.items():
            self.note(f"{remark} ({count})")
        if self.done:
            self.note(f"{self.done} files have their tags from this model and these settings; --redo tags them again")
        if self.writers:
            would = "would be " if self.dry_run else ""
            self.note(f"{self.written} {would}written, {self.unchanged} {would}unchanged")
        if self.failures:
            self.note(f"{len(self.failures)} could not be used, {self.tagged} tagged")
        return 1 if self.failures else 0

    def _change(self, file: MediaFile, change: Change):
        self.written += change.written
        self.unchanged += not change.written
        self.remarks.update(change.notes)
        if self.dry_run and not self.as_json:
            tags = [f"+{tag}" for tag in change.added] + [f"-{tag}" for tag in change.removed]
            place = change.path if change.path.startswith(file.path) else f"{file.path} -> {change.path}"
            say(printable(f"{place}: {', '.join(tags) or 'no tag comes or goes'}"))

    def _json(self, **line):
        # ASCII, whatever the terminal's encoding: an escape that a stream put in for itself would not be JSON.
        say(json.dumps(line))
