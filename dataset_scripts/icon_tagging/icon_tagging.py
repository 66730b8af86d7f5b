"""icon-tagging: open icon sets as a benchmark of images, titles and free-form tags."""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from . import icon_sets, npm_packages, rendering

logger = logging.getLogger(__name__)

_STYLE_WORDS = frozenset({"outline", "filled", "off", "variant", "alt"})


def split_of(title: str) -> str:
    """Return the split of a title: `"train"`, `"validation"` or `"test"`.

    One concept has one split, whichever sets draw it and in whichever styles: the key is the sorted set of the title's
    lower-cased alphanumeric (a-z, 0-9) words without style words, and md5(key) modulo 12 decides.
    """
    words = set(re.findall(r"[a-z0-9]+", title.lower())) - _STYLE_WORDS
    key = " ".join(sorted(words))
    remainder = int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % 12
    return {0: "validation", 1: "test"}.get(remainder, "train")


# Not shared with other datasets: like the splits, the tags of the benchmark must not change.
def clean_tags(tags: Iterable[str]) -> list[str]:
    """Lower-cases and strips tags, and leaves out empty and repeated ones; the order stays."""
    return list(dict.fromkeys(tag for tag in (tag.strip().lower() for tag in tags) if tag))


class IconTagging(datasets.GeneratorBasedBuilder):
    """Builds icon-tagging from npm packages.

    Args:
        data_dir: A `node_modules` folder with the six sets. By default `npm ci` installs them.
        work_dir: Folder where packages and rendered images are kept for the next build; by default
            `~/.cache/optsg/icon_tagging`, or `icon_tagging_sources` in `cache_dir` if that is given.
        num_render_proc: Number of processes that render images; all cores by default.
        cache_dir: Cache folder of `datasets`.
        **kwargs: Other arguments of `datasets.DatasetBuilder`.

    Raises:
        FileNotFoundError: npm is not installed, or `data_dir` lacks a set.
        RuntimeError: npm could not install the sets.
        ValueError: The metadata of a set has another layout than in the pinned version.
    """

    VERSION = datasets.Version("1.0.0")

    def __init__(
        self,
        *args: Any,
        work_dir: str | os.PathLike | None = None,
        num_render_proc: int | None = None,
        data_dir: str | os.PathLike | None = None,
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        if work_dir is None:
            home = Path.home() / ".cache" / "optsg" / "icon_tagging"
            work_dir = Path(cache_dir) / "icon_tagging_sources" if cache_dir else home
        self.work_dir = Path(work_dir).expanduser().resolve()
        self.num_render_proc = num_render_proc
        if data_dir is not None:
            data_dir = str(npm_packages.check_installed(Path(data_dir).expanduser().resolve()))
        self._node_modules = Path(data_dir) if data_dir else None
        # The cache of an imported builder depends on its code and data only if this hash does.
        kwargs.setdefault("hash", self._fingerprint())
        super().__init__(*args, data_dir=data_dir, cache_dir=cache_dir, **kwargs)

    def _fingerprint(self) -> str:
        code = [Path(module).read_bytes() for module in (__file__, icon_sets.__file__, rendering.__file__)]
        code.append(rendering.RENDERER.encode())
        if self._node_modules is None:
            return _sha256(*code, npm_packages.lock_hash().encode())
        icons = (icon._replace(svg=_sha256(icon.svg.read_bytes())) for icon in self._icons if icon.svg.is_file())
        return _sha256(*code, *(repr(tuple(icon)).encode() for icon in icons))

    @cached_property
    def _icons(self) -> list[icon_sets.Icon]:
        node_modules = self._node_modules or npm_packages.install(self.work_dir)
        return [icon._replace(tags=clean_tags(icon.tags)) for icon in icon_sets.read_icons(node_modules)]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Images of open icon sets, with their names as titles and their tags.",
            features=datasets.Features(
                {
                    "id": datasets.Value("string"),
                    "image": datasets.Image(),
                    "title": datasets.Value("string"),
                    "tags": datasets.List(datasets.Value("string")),
                    "source": datasets.Value("string"),
                }
            ),
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        tagged = [icon for icon in self._icons if icon.tags]
        untagged = Counter(icon.source for icon in self._icons if not icon.tags)
        if untagged:
            counts = ", ".join(f"{source} {count:,}" for source, count in sorted(untagged.items()))
            logger.warning("left out %s icons without tags: %s", f"{untagged.total():,}", counts)
        images, failed = rendering.render_files(
            [icon.svg for icon in tagged], self.work_dir / "png", self.num_render_proc
        )
        if failed:
            reasons = "; ".join(f"{svg}: {reason}" for svg, reason in list(failed.items())[:3])
            logger.warning("left out %s icons that could not be rendered, such as %s", f"{len(failed):,}", reasons)
        splits = {"train": [], "validation": [], "test": []}
        for icon, image in zip(tagged, images, strict=True):
            if image is not None:
                splits[split_of(icon.title)].append((icon, image))
        return [datasets.SplitGenerator(name=split, gen_kwargs={"icons": icons}) for split, icons in splits.items()]

    def _generate_examples(self, icons: list[tuple[icon_sets.Icon, Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for icon, image in icons:
            example_id = f"{icon.source}/{icon.name}"
            # With its bytes, so that the dataset does not need the folder of rendered images.
            cell = {"path": f"{example_id}.png", "bytes": image.read_bytes()}
            yield (
                example_id,
                {"id": example_id, "image": cell, "title": icon.title, "tags": icon.tags, "source": icon.source},
            )


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
