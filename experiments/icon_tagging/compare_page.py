"""The page of side-by-side examples: Figures 3 and 4 of the supplement for every test example one cares to look at."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment
from PIL import Image

CASES = {
    "complete": "(a) Complete: every tag of the ground truth is found",
    "meaningful": "(b) Wrong but perhaps meaningful",
    "meaningless": "(c) Wrong and perhaps meaningless",
    "novel": "(d) Novel: a tag no training example has",
}
# A mark beside each colour: nobody has to tell colours apart.
KINDS = {
    "common": ("●", "in the ground truth, common in training"),
    "rare": ("▲", "in the ground truth, rare in training"),
    "wrong": ("✕", "not in the ground truth, known from training"),
    "novel": ("★", "never seen in training; ✓ after it: in the ground truth"),
}
TEMPLATE = Path(__file__).with_name("compare_page.html")


def write_page(
    test,
    predictions: Mapping[str, Sequence[Sequence[tuple[str, float]]]],
    label_vocabulary: Sequence[Sequence[str]],
    path: Path,
    most: int = 12,
    common_count: int = 25,
) -> None:
    """Writes one self-contained HTML page; everything that comes from data is escaped.

    Args:
        test: rows with `title`, `tags` and `image`.
        predictions: for each system its tags of every example as `(tag, score)`; the first system's decide the case.
        label_vocabulary: tags of each training example.
        most: examples shown of each case.
        common_count: training count from which a tag is common.
    """
    counts = Counter(tag for tags in label_vocabulary for tag in set(tags))
    titles, references = test["title"][:], test["tags"][:]
    judged = next(iter(predictions))
    chosen = sort_into_cases(
        [[tag for tag, _ in tags] for tags in predictions[judged]], references, label_vocabulary, most
    )

    def describe(tag: str, truth: set[str]) -> dict:
        if tag not in counts:
            kind = "novel"
        elif tag not in truth:
            kind = "wrong"
        else:
            kind = "common" if counts[tag] >= common_count else "rare"
        return {"tag": tag, "kind": kind, "mark": KINDS[kind][0], "found": kind == "novel" and tag in truth}

    groups = {}
    for case, indices in chosen.items():
        groups[case] = []
        for index in indices:
            truth = set(references[index])
            rows = [("ground truth", [describe(tag, truth) for tag in references[index]])]
            rows += [(name, [describe(tag, truth) for tag, _ in tags[index]]) for name, tags in predictions.items()]
            groups[case].append(
                {"title": titles[index] or "", "image": data_url(test[index].get("image")), "rows": rows}
            )
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(judged=judged, kinds=KINDS, cases=CASES, groups=groups, most=most)
    Path(path).write_text(text, encoding="utf-8")


def sort_into_cases(predicted, references, label_vocabulary, most: int) -> dict[str, list[int]]:
    """Examples of each case, at most `most`, each example in one case only."""
    partners = {}
    for tags in label_vocabulary:
        for tag in tags:
            partners.setdefault(tag, set()).update(tags)
    cases = {case: [] for case in CASES}
    for index, (tags, reference) in enumerate(zip(predicted, references)):
        truth = set(reference)
        wrong = [tag for tag in tags if tag not in truth and tag in partners]
        if any(tag not in partners for tag in tags):
            case = "novel"
        elif len(truth) > 2 and truth <= set(tags):
            case = "complete"
        elif wrong and any(not partners[tag] & truth for tag in wrong):
            case = "meaningless"
        elif wrong:
            case = "meaningful"
        else:
            continue
        cases[case].append(index)
    hits = [
        index
        for index in cases["novel"]
        if any(t not in partners and t in references[index] for t in predicted[index])
    ]
    # Novel tags that hit the ground truth first: they are the ones that can be checked.
    others = [index for index in cases["novel"] if index not in set(hits)]
    spread = {case: spread_out(indices, most) for case, indices in cases.items()}
    return spread | {"novel": (spread_out(hits, most) + spread_out(others, most))[:most]}


def spread_out(indices: list[int], most: int) -> list[int]:
    """So many of them, evenly over the whole list: neighbours in a data set are often variants of one thing."""
    return indices if len(indices) <= most else [indices[place * len(indices) // most] for place in range(most)]


def data_url(image: Image.Image | None) -> str:
    if image is None:
        return "data:,"
    buffer = io.BytesIO()
    small = image.convert("RGBA")
    small.thumbnail((112, 112))
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
