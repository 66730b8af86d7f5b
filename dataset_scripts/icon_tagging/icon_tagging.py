"""icon-tagging: open icon sets as a benchmark of images, titles and free-form tags."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from . import icon_sets, iconify_sets, more_drawings, npm_packages, rendering, splits, unseen
from .splits import clean_tags, split_of

logger = logging.getLogger(__name__)

_VERSION = datasets.Version("1.0.0")
# The modules that decide the content of each configuration.
_MODULES = {
    "default": (icon_sets, splits, rendering),
    "more_drawings": (icon_sets, splits, rendering, iconify_sets, more_drawings),
    "unseen": (icon_sets, splits, rendering, iconify_sets, unseen),
}
_SPLITS = {"default": ("train", "validation", "test"), "more_drawings": ("train",), "unseen": ("test",)}


class IconTagging(datasets.GeneratorBasedBuilder):
    """Builds icon-tagging from npm packages.

    Args:
        config_name: `"default"`; `"more_drawings"`, training examples of concepts in the training split, drawn by
            other sets; or `"unseen"`, test examples of concepts outside the training split, drawn by other sets again.
        data_dir: A `node_modules` folder with the six sets, and for another configuration also with its own sets. By
            default `npm ci` installs them.
        work_dir: Folder where packages and rendered images are kept for the next build; by default
            `~/.cache/optsg/icon_tagging`, or `icon_tagging_sources` in `cache_dir` if that is given.
        num_render_proc: Number of processes that render images; all cores by default.
        cache_dir: Cache folder of `datasets`.
        **kwargs: Other arguments of `datasets.DatasetBuilder`.

    Raises:
        FileNotFoundError: npm is not installed, or `data_dir` lacks a set.
        RuntimeError: npm could not install the sets.
        ValueError: The metadata of a set has another layout than in the pinned version, or there is no such
            configuration.
    """

    VERSION = _VERSION
    BUILDER_CONFIGS = [datasets.BuilderConfig(name=name, version=_VERSION) for name in _SPLITS]
    DEFAULT_CONFIG_NAME = "default"

    def __init__(
        self,
        *args: Any,
        config_name: str | None = None,
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
        self._configuration = config_name or self.DEFAULT_CONFIG_NAME
        if self._configuration not in _SPLITS:
            raise ValueError(f"config_name {config_name!r} is not one of {', '.join(_SPLITS)}")
        if data_dir is not None:
            for sources in self._all_sources():
                node_modules = npm_packages.check_installed(Path(data_dir).expanduser().resolve(), sources)
            data_dir = str(node_modules)
        self._node_modules = Path(data_dir) if data_dir else None
        # The cache of an imported builder depends on its code and data only if this hash does.
        kwargs.setdefault("hash", self._fingerprint())
        super().__init__(*args, config_name=self._configuration, data_dir=data_dir, cache_dir=cache_dir, **kwargs)

    def _all_sources(self) -> list[Path]:
        """Return the folders of the lock files: the default one, and that of another configuration."""
        return list(dict.fromkeys([npm_packages.DEFAULT_SOURCES, npm_packages.SOURCES[self._configuration]]))

    def _fingerprint(self) -> str:
        files = [__file__, *(module.__file__ for module in _MODULES[self._configuration])]
        code = [Path(file).read_bytes() for file in files]
        code.append(rendering.RENDERER.encode())
        if self._node_modules is None:
            return _sha256(*code, *(npm_packages.lock_hash(sources).encode() for sources in self._all_sources()))
        icons = (
            icon._replace(svg=_sha256(rendering.svg_bytes(icon.svg)))
            for icon in self._icons
            if isinstance(icon.svg, str) or icon.svg.is_file()
        )
        return _sha256(*code, *(repr(tuple(icon)).encode() for icon in icons))

    def _installed(self, configuration: str) -> Path:
        return self._node_modules or npm_packages.install(self.work_dir, npm_packages.SOURCES[configuration])

    @cached_property
    def _icons(self) -> list[icon_sets.Icon]:
        """All icons of the configuration, with clean tags and before those without tags are left out."""
        icons = list(icon_sets.read_icons(self._installed("default")))
        openmoji = [icon for icon in icons if icon.source == "openmoji"]
        if self._configuration == "more_drawings":
            drawings = _keep(more_drawings.read_more_icons(self._installed("more_drawings"), openmoji), {"train"})
            icons = more_drawings.add_training_tags(drawings, icons)
        elif self._configuration == "unseen":
            icons = _keep(unseen.read_emoji_sets(self._installed("unseen"), openmoji), {"validation", "test"})
        return [icon._replace(tags=clean_tags(icon.tags)) for icon in icons]

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
            reasons = "; ".join(f"{svg[:300]}: {reason}" for svg, reason in list(failed.items())[:3])
            logger.warning("left out %s icons that could not be rendered, such as %s", f"{len(failed):,}", reasons)
        examples = {split: [] for split in _SPLITS[self._configuration]}
        for icon, image in zip(tagged, images, strict=True):
            if image is not None:
                # A configuration with one split has kept only the concepts that belong there.
                split = split_of(icon.title) if len(examples) > 1 else next(iter(examples))
                examples[split].append((icon, image))
        return [datasets.SplitGenerator(name=split, gen_kwargs={"icons": icons}) for split, icons in examples.items()]

    def _generate_examples(self, icons: list[tuple[icon_sets.Icon, Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for icon, image in icons:
            example_id = f"{icon.source}/{icon.name}"
            # With its bytes, so that the dataset does not need the folder of rendered images.
            cell = {"path": f"{example_id}.png", "bytes": image.read_bytes()}
            yield (
                example_id,
                {"id": example_id, "image": cell, "title": icon.title, "tags": icon.tags, "source": icon.source},
            )


def _keep(icons: Iterable[icon_sets.Icon], kept_splits: set[str]) -> list[icon_sets.Icon]:
    """Keep the icons whose concepts are in these splits, and log how many are left out."""
    icons = list(icons)
    kept = [icon for icon in icons if split_of(icon.title) in kept_splits]
    logger.info("left out %s icons of concepts in other splits", f"{len(icons) - len(kept):,}")
    return kept


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
