"""Writes a page with the predictions of several models next to each other, as in Figures 3 and 4 of the supplement."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from jinja2 import Environment
from PIL import Image

CASES = {
    "complete": "(a) All tags of the ground truth are predicted",
    "meaningful": "(b) A wrong tag that may be meaningful",
    "meaningless": "(c) A wrong tag that may be meaningless",
    "novel": "(d) A novel tag",
}
# A mark next to each colour, so that nobody needs to tell colours apart.
KINDS = {
    "common": ("●", "in the ground truth, common in training"),
    "rare": ("▲", "in the ground truth, rare in training"),
    "wrong": ("✕", "not in the ground truth, but a training tag"),
    "novel": ("★", "not a training tag; followed by ✓ if it is in the ground truth"),
}
TEMPLATE = Path(__file__).with_name("compare_page.html")
THUMBNAIL_SIZE = (112, 112)


def write_page(
    test: Dataset,
    predictions: Mapping[str, Sequence[Sequence[str]]],
    training_tags: Sequence[Sequence[str]],
    path: Path,
    max_examples: int = 12,
    common_count: int = 25,
) -> None:
    """Write one self-contained HTML page. Everything that comes from data is escaped.

    Args:
        test: Rows with `title`, `tags` and `image`.
        predictions: For each model its tags of every example. The first model decides the case of an example.
        training_tags: Tags of each training example.
        path: File of the page.
        max_examples: Maximum number of examples per case.
        common_count: Training count from which a tag is common.
    """
    counts = Counter(tag for tags in training_tags for tag in set(tags))
    titles, references = test["title"][:], test["tags"][:]
    first_model = next(iter(predictions))

    def describe(tag: str, truth: set[str]) -> dict:
        if tag not in counts:
            kind = "novel"
        elif tag not in truth:
            kind = "wrong"
        else:
            kind = "common" if counts[tag] >= common_count else "rare"
        return {"tag": tag, "kind": kind, "mark": KINDS[kind][0], "found": kind == "novel" and tag in truth}

    groups = {}
    for case, indices in sort_into_cases(predictions[first_model], references, training_tags, max_examples).items():
        groups[case] = []
        for index in indices:
            truth = set(references[index])
            rows = {"ground truth": references[index]} | {name: tags[index] for name, tags in predictions.items()}
            described = {name: [describe(tag, truth) for tag in tags] for name, tags in rows.items()}
            image = data_url(test[index].get("image"))
            groups[case].append({"title": titles[index] or "", "image": image, "rows": described})
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(first_model=first_model, kinds=KINDS, cases=CASES, groups=groups, max_examples=max_examples)
    path.write_text(text, encoding="utf-8")


def sort_into_cases(
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    training_tags: Sequence[Sequence[str]],
    max_examples: int,
) -> dict[str, list[int]]:
    """Sort examples into the cases of section 5 of the supplement.

    No program can tell whether a wrong tag is meaningful. Here it counts as meaningful if some training example has it
    together with a true tag of the example.

    Returns:
        The indices of at most `max_examples` examples of each case; an example has one case only. Novel tags that are
        in the ground truth come first.
    """
    partners = {}
    for tags in training_tags:
        for tag in tags:
            partners.setdefault(tag, set()).update(tags)
    cases, hits = {case: [] for case in CASES}, []
    for index, (tags, reference) in enumerate(zip(predictions, references)):
        truth = set(reference)
        novel = [tag for tag in tags if tag not in partners]
        wrong = [tag for tag in tags if tag not in truth and tag in partners]
        if truth & set(novel):
            hits.append(index)
        elif novel:
            cases["novel"].append(index)
        elif len(truth) > 2 and truth <= set(tags):
            cases["complete"].append(index)
        elif any(not partners[tag] & truth for tag in wrong):
            cases["meaningless"].append(index)
        elif wrong:
            cases["meaningful"].append(index)
    spread = {case: spread_out(indices, max_examples) for case, indices in cases.items()}
    spread["novel"] = (spread_out(hits, max_examples) + spread["novel"])[:max_examples]
    return spread


def spread_out(indices: Sequence[int], count: int) -> list[int]:
    """Return `count` of the indices, evenly spaced: neighbours in a dataset are often variants of one thing."""
    if len(indices) <= count:
        return list(indices)
    return [indices[position * len(indices) // count] for position in range(count)]


def data_url(image: Image.Image | None) -> str:
    """Return a thumbnail of an image as a data URL."""
    if image is None:
        return "data:,"
    thumbnail, buffer = image.convert("RGBA"), io.BytesIO()
    thumbnail.thumbnail(THUMBNAIL_SIZE)
    thumbnail.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
