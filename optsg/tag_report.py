"""The output of `optsg tag`: tags and planned changes on standard output, everything else on standard error."""

import json
import sys
from collections import Counter
from typing import Any

from .file_tagger import FileTags
from .media_files import MediaFile
from .sidecars import Change, SidecarError, TagWriter
from .terminal import TagTable, plural, print_line, printable

NO_TAGS_ADVICE = (
    "the model may not know this kind of image (its model card says what it was trained on); give titles "
    "(--title-from-name), lower --threshold, use --book, or train a model on your own images (optsg train)"
)
# Maximum number of examples of the book printed per tag.
MAX_NEIGHBOURS = 3


class TagReport:
    """Prints and writes the result of each file and computes the exit status.

    Args:
        files: Paths of all files of the run.
        as_json: Print JSON lines on standard output.
        writers: From `make_writer`. A table is printed if there are none and `as_json` is false.
        dry_run: Print what the writers would do.
        show_image_words: Print the image words of each file.
        explain: Print where each tag comes from.
    """

    def __init__(
        self,
        files: list[str],
        as_json: bool,
        writers: list[TagWriter],
        dry_run: bool = False,
        show_image_words: bool = False,
        explain: bool = False,
    ):
        self.show_image_words, self.explain = show_image_words, explain
        self.files, self.as_json, self.writers, self.dry_run = files, as_json, writers, dry_run
        self.table = None if as_json or writers else TagTable(files)
        self.num_tagged = self.num_without_tags = self.num_done = self.num_written = self.num_unchanged = 0
        self.failures: set[str] = set()
        self.remarks = Counter()

    def select_pending(self, files: list[MediaFile], redo: bool) -> list[tuple[MediaFile, list[TagWriter]]]:
        """Select the files that need tags, each with the writers that need them.

        A sidecar that cannot be written is reported here, before a model is loaded.

        Args:
            files: All images and videos of the run.
            redo: Also select files that are done.
        """
        if not self.writers:
            return [(file, []) for file in files]
        pending = []
        for file in files:
            writers, refused = self._pending_writers(file, redo)
            if writers:
                pending.append((file, writers))
                continue
            self.num_done += not refused
            state = {"error": "not all files of --write can be written"} if refused else {"done": True}
            self._print_json(file=file.path, title=file.title, **state)
        return pending

    def _pending_writers(self, file: MediaFile, redo: bool) -> tuple[list[TagWriter], bool]:
        """Return the writers that need a file's tags, and whether any writer refused the file."""
        pending, refused = [], False
        for writer in self.writers:
            try:
                if not writer.is_done(file) or redo:
                    pending.append(writer)
            except Exception as error:  # one file must not end the run for the others
                refused = True
                self._add_refusal(file, _reason(error), writer)
        return pending, refused

    def add_result(self, file: MediaFile, result: FileTags | Exception, writers: list[TagWriter]) -> None:
        """Print and write the tags of a file.

        Args:
            file: The image or video.
            result: Its tags, or why it has none.
            writers: Writers that need the tags.
        """
        if isinstance(result, Exception):
            self.add_failure(file.path, file.title, str(result) or type(result).__name__)
            return
        words = {"image_words": result.image_words} if self.show_image_words else {}
        tags = result.tags
        if self.explain:
            tags = [tag | source for tag, source in zip(tags, result.sources, strict=True)]
        self._print_json(file=file.path, title=file.title or result.title, tags=tags, **words)
        if self.table is not None:
            if self.num_tagged + self.num_without_tags == 0:
                print_line(self.table.header())
            print_line(self.table.rows(file.path, result.tags))
        if self.show_image_words and not self.as_json:
            seen = ", ".join(f"{printable(word['word'])} {word['score']:.2f}" for word in result.image_words)
            print_line(f"{'' if self.table else printable(file.path)}  image words: {seen or '(none)'}")
        if self.explain and not self.as_json:
            if self.table is None:
                print_line(printable(file.path))
            for tag, source in zip(result.tags, result.sources, strict=True):
                print_line(f"  {printable(tag['tag'])}: {_explain(**source)}")
        self.num_tagged += bool(tags)
        self.num_without_tags += not tags
        for writer in writers:
            try:
                self._add_change(file, writer.write(file, result.tags, result.title, result.embedded))
            except Exception as error:  # one file must not end the run for the others
                self._add_refusal(file, _reason(error), writer)

    def add_failure(self, path: str, title: str | None, reason: str) -> None:
        """Report a file that has no tags.

        Args:
            path: Path of the file.
            title: Its title, if it has one.
            reason: Why it has no tags.
        """
        self._add_error(path, reason)
        self._print_json(file=path, title=title, error=reason)
        for writer in self.writers:
            writer.add_failure(path, title, reason)

    def add_message(self, text: str) -> None:
        """Print a sentence on standard error."""
        print_line(f"optsg tag: {printable(text)}", file=sys.stderr)

    def report_stop(self) -> None:
        """Report that the run was interrupted."""
        if self.writers and not self.dry_run:
            read = plural(self.num_tagged + self.num_without_tags, "file")
            self.add_message(f"stopped after {read}; run the same command to continue")

    def finish(self) -> int:
        """Write the tables, print the summary and return the exit status."""
        for writer in self.writers:
            try:
                for message in writer.finish(self.files):
                    self.add_message(message)
            except SidecarError as error:
                self.failures.add(str(error))
                self.add_message(str(error))
        for remark, count in self.remarks.items():
            self.add_message(f"{remark} ({plural(count, 'file')})")
        if self.num_done:
            done = plural(self.num_done, "file")
            self.add_message(f"{done} already tagged by this model with these settings (--redo tags them again)")
        if self.writers:
            would = "would be " if self.dry_run else ""
            self.add_message(f"{self.num_written} {would}written, {self.num_unchanged} {would}unchanged")
        if self.num_without_tags:
            read = plural(self.num_tagged + self.num_without_tags, "file")
            self.add_message(f"{self.num_without_tags:,} of {read} got no tags: {NO_TAGS_ADVICE}")
        if self.failures:
            self.add_message(f"{self.num_tagged} tagged, {len(self.failures)} failed")
        return 1 if self.failures else 0

    def _add_refusal(self, file: MediaFile, reason: str, writer: TagWriter) -> None:
        """Report a file whose tags one writer cannot write; other writers may still write them."""
        self._add_error(file.path, reason)
        writer.add_failure(file.path, file.title, reason)

    def _add_error(self, path: str, reason: str) -> None:
        self.failures.add(path)
        self.add_message(reason if path in reason else f"{path}: {reason}")

    def _add_change(self, file: MediaFile, change: Change) -> None:
        self.num_written += change.written
        self.num_unchanged += not change.written
        self.remarks.update(change.remarks)
        if self.dry_run and not self.as_json:
            tags = [f"+{tag}" for tag in change.added] + [f"-{tag}" for tag in change.removed]
            name = change.path if change.path.startswith(file.path) else f"{file.path} -> {change.path}"
            print_line(printable(f"{name}: {', '.join(tags) or 'no changes'}"))

    def _print_json(self, **line: Any) -> None:
        if self.as_json:
            # ASCII only: the escapes of a terminal with another encoding would not be valid JSON.
            print_line(json.dumps(line, allow_nan=False))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, SidecarError) else f"{type(error).__name__}: {error}"


def _explain(source: str, neighbours: list[dict]) -> str:
    shown = []
    for example in neighbours[:MAX_NEIGHBOURS]:
        title = f' "{printable(example["title"])}"' if example["title"] else ""
        shown.append(f"{printable(example['id'])}{title} ({example['score']:.2f})")
    found = [] if source == "book" else [f"{source} by the model"]
    return ", ".join(found + ([f"like {', '.join(shown)}"] if shown else []))
