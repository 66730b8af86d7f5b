"""icon-tagging: open icon sets as a tagging benchmark of images, titles and free-form tags."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import datasets

from ..icon_tagging import icon_sets, npm_packages, rendering

logger = logging.getLogger(__name__)

_STYLE_WORDS = frozenset({"outline", "filled", "off", "variant", "alt"})


def split_of(title: str) -> str:
    """`"train"`, `"validation"` or `"test"` for a title.

    The same concept drawn by several sets, or in several styles, gets the same split: the key is the sorted set of
    the title's lower-cased alphanumeric (a-z, 0-9) words without style words, and md5(key) modulo 12 decides.
    """
    words = set(re.findall(r"[a-z0-9]+", title.lower())) - _STYLE_WORDS
    key = " ".join(sorted(words))
    remainder = int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % 12
    return {0: "validation", 1: "test"}.get(remainder, "train")


def clean_tags(tags: Iterable[str]) -> list[str]:
    """Tags lower-cased and stripped, without empty ones and repeats, in their order."""
    return list(dict.fromkeys(tag for tag in (tag.strip().lower() for tag in tags) if tag))


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


class IconTagging(datasets.GeneratorBasedBuilder):
    """Builds icon-tagging from npm packages: `IconTagging().download_and_prepare()`, then `.as_dataset()`.

    Args:
        data_dir: a `node_modules` folder with the six sets; without it they are installed by `npm ci`.
        work_dir: where packages and drawn images are kept and found again (default: `~/.cache/optsg/icon_tagging`,
            or `icon_tagging_sources` under `cache_dir` where that is given).
        num_render_proc: processes that draw; all cores if not given.
        cache_dir, **kwargs: as for every `datasets.DatasetBuilder`.

    Raises:
        FileNotFoundError: npm is missing, or `data_dir` lacks a set.
        RuntimeError: npm could not install the sets.
        ValueError: a set's metadata is not laid out as in the pinned version.
    """

    VERSION = datasets.Version("1.0.0")

    def __init__(self, *args, work_dir=None, num_render_proc=None, data_dir=None, cache_dir=None, **kwargs):
        if work_dir is None:
            home = Path.home() / ".cache" / "optsg" / "icon_tagging"
            work_dir = Path(cache_dir) / "icon_tagging_sources" if cache_dir else home
        self.work_dir = Path(work_dir).expanduser().resolve()
        self.num_render_proc = num_render_proc
        if data_dir is not None:
            data_dir = str(npm_packages.check_installed(Path(data_dir).expanduser().resolve()))
        self._node_modules = Path(data_dir) if data_dir else None
        # An imported builder's cache is keyed by neither its code nor its data unless it is told to be.
        kwargs.setdefault("hash", self._fingerprint())
        super().__init__(*args, data_dir=data_dir, cache_dir=cache_dir, **kwargs)

    def _fingerprint(self) -> str:
        code = [Path(module).read_bytes() for module in (__file__, icon_sets.__file__, rendering.__file__)]
        code.append(rendering.RENDERER.encode())
        if self._node_modules is None:
            return _sha256(*code, npm_packages.lock_hash().encode())
        drawn = (icon._replace(svg=_sha256(icon.svg.read_bytes())) for icon in self._icons if icon.svg.is_file())
        return _sha256(*code, *(repr(tuple(icon)).encode() for icon in drawn))

    @cached_property
    def _icons(self) -> list[icon_sets.Icon]:
        node_modules = self._node_modules or npm_packages.install(self.work_dir)
        return [icon._replace(tags=clean_tags(icon.tags)) for icon in icon_sets.read_icons(node_modules)]

    def _info(self):
        return datasets.DatasetInfo(
            description="Open icon sets, drawn as images, with their names as titles and their tags.",
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

    def _split_generators(self, dl_manager):
        tagged = [icon for icon in self._icons if icon.tags]
        untagged = Counter(icon.source for icon in self._icons if not icon.tags)
        if untagged:
            counts = ", ".join(f"{source} {count:,}" for source, count in sorted(untagged.items()))
            logger.warning("left out %s icons that have no tags: %s", f"{untagged.total():,}", counts)
        images, failed = rendering.render_files(
            [icon.svg for icon in tagged], self.work_dir / "png", self.num_render_proc
        )
        if failed:
            examples = "; ".join(f"{svg}: {reason}" for svg, reason in list(failed.items())[:3])
            logger.warning("left out %s icons that could not be drawn, such as %s", f"{len(failed):,}", examples)
        examples = {"train": [], "validation": [], "test": []}
        for icon, image in zip(tagged, images, strict=True):
            if image is not None:
                examples[split_of(icon.title)].append((icon, image))
        return [datasets.SplitGenerator(name=split, gen_kwargs={"examples": rows}) for split, rows in examples.items()]

    def _generate_examples(self, examples):
        for icon, image in examples:
            example_id = f"{icon.source}/{icon.name}"
            # With the bytes inside, the built dataset outlives the folder of drawn images.
            image = {"path": f"{example_id}.png", "bytes": image.read_bytes()}
            yield (
                example_id,
                {"id": example_id, "image": image, "title": icon.title, "tags": icon.tags, "source": icon.source},
            )
