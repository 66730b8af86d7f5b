"""Tag Gain: how many relevant tags that never occurred in training are predicted."""

import csv
import json
import os
from collections.abc import Iterable, Sequence

import datasets
import evaluate

from modeling_optsg.evaluation.metrics import check_tag_sets, normalize_tag, tag_gain

_DESCRIPTION = """
Tag Gain of the OP-TSG paper: 100 x (novel predicted pairs judged relevant) / (ground-truth pairs). A pair is an
example and one of its tags; a predicted tag is novel if it is not a training tag. The paper does not tell who judged
relevance. Here a tag is relevant if it is in the ground truth of the example, or if a verdict file says so.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each example its predicted tags, a list of str, each once.
    references: for each example its ground-truth tags, a list of str, each once.
    ids: for each example its identifier, a str; required with verdicts.
    label_vocabulary: the training tags, any collection of str.
    verdicts: path of a CSV or JSON Lines file with the fields example, tag and verdict (yes or no), or None to judge
        relevance by exact match with the ground truth.
    normalize: whether to ignore differences of case, width and spaces (False: tags must match exactly).

Returns:
    tag_gain and novel_ratio in percent; novel_pairs, relevant_pairs and reference_pairs; and unjudged_pairs, the
    number of novel pairs without a verdict, which count as not relevant.

Raises:
    ValueError: a tag is listed twice for an example, or the verdict file has an unknown example, two different
        verdicts on a pair, or a verdict other than yes or no.
"""

_CITATION = """
@inproceedings{optsg2023, title = {Order-Prompted Tag Sequence Generation for Video Tagging}, booktitle = {ICCV},
year = {2023}}
"""


def read_verdicts(path: str | os.PathLike, ids: Iterable[str], normalize: bool = False) -> dict[tuple[str, str], bool]:
    """Read a verdict file.

    Args:
        path: A CSV or JSON Lines file with the fields example, tag and verdict.
        ids: The identifiers of all examples.
        normalize: Whether to normalise the tags.

    Returns:
        `{(example, tag): relevant}`.

    Raises:
        ValueError: A field is missing, an example is unknown, a verdict is not yes or no, or two verdicts on a pair
            differ.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        if str(path).endswith((".jsonl", ".json")):
            rows = [json.loads(line) for line in file if line.strip()]
        else:
            rows = list(csv.DictReader(file))
    verdicts, known = {}, set(ids)
    for number, row in enumerate(rows, 1):
        if missing := [name for name in ("example", "tag", "verdict") if row.get(name) is None]:
            raise ValueError(f"Row {number} of {path} has no {', '.join(missing)}; it needs example, tag and verdict.")
        example, tag, verdict = str(row["example"]), row["tag"], str(row["verdict"]).strip().lower()
        tag = normalize_tag(tag) if normalize else tag
        if example not in known:
            raise ValueError(f"Row {number} of {path} has the example {example!r}, which is not among the ids.")
        if verdict not in ("yes", "no"):
            raise ValueError(f"Row {number} of {path} has the verdict {row['verdict']!r}; expected yes or no.")
        if verdicts.setdefault((example, tag), verdict == "yes") != (verdict == "yes"):
            raise ValueError(f"{path} has both yes and no for {tag!r} of example {example!r}; keep one of them.")
    return verdicts


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TagGain(evaluate.Metric):
    """Computes [`tag_gain`]."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        pairs = {"predictions": tags, "references": tags}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features(pairs), datasets.Features(pairs | {"ids": datasets.Value("string")})],
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        label_vocabulary: Iterable[str],
        ids: Sequence[str] | None = None,
        verdicts: str | os.PathLike | None = None,
        normalize: bool = False,
        **of_tag_f1: object,
    ) -> dict[str, float]:
        # `evaluate.combine` passes the settings of all metrics to each of them.
        if unknown := of_tag_f1.keys() - {"train_counts", "common_count", "ks"}:
            raise ValueError(f"tag_gain has no setting {sorted(unknown)}.")
        predictions = check_tag_sets("predictions", predictions, normalize)
        references = check_tag_sets("references", references, normalize)
        if normalize:
            label_vocabulary = set(map(normalize_tag, label_vocabulary))
        if verdicts is None:
            return tag_gain(predictions, references, label_vocabulary) | {"unjudged_pairs": 0}
        if ids is None:
            raise ValueError("verdicts need ids, the identifier of every example.")
        if len(set(ids)) < len(ids):
            raise ValueError("Two examples have the same id; verdicts need a different id for every example.")
        relevance, unjudged = read_verdicts(verdicts, ids, normalize), []

        def relevant(example: int, tag: str) -> bool:
            if (ids[example], tag) not in relevance:
                unjudged.append((example, tag))
            return relevance.get((ids[example], tag), False)

        return tag_gain(predictions, references, label_vocabulary, relevant) | {"unjudged_pairs": len(unjudged)}
