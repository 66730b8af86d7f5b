"""Tag Gain: what novel tags, never seen in training, add to the ground truth."""

import csv
import json

import datasets
import evaluate

from modeling_optsg.evaluation.metrics import checked_tag_sets, normalize_tag, tag_gain

_DESCRIPTION = """
Tag Gain of the OP-TSG paper: 100 x (novel predicted pairs judged relevant) / (ground-truth pairs). A predicted tag is
novel when no training example has it. The paper does not say who judged relevance; here it is an exact match with the
example's ground truth, or a verdict file.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each example its predicted tags, a list of str, each once.
    references: for each example its ground-truth tags, a list of str, each once.
    ids: for each example its identifier, a str; needed with verdicts.
    label_vocabulary: the training tags, any collection of str.
    verdicts: path of a CSV or JSON-lines file with the fields example, tag and verdict (yes or no), or None to judge by
        exact match.
    normalize: compare tags without differences of case, width and spaces (False: exactly as they are written).

Returns:
    tag_gain and novel_ratio in percent; novel_pairs, relevant_pairs and reference_pairs; and unjudged_pairs, the novel
    pairs the verdict file says nothing about, which count as not relevant.

Raises:
    ValueError: a tag is listed twice for an example; the verdict file names an example there is not, judges a pair twice
        differently, or holds another verdict than yes or no.
"""

_CITATION = """
@inproceedings{optsg2023, title = {Order-Prompted Tag Sequence Generation for Video Tagging}, booktitle = {ICCV},
year = {2023}}
"""


def read_verdicts(path, ids, normalize=False):
    """`{(example, tag): relevant}` of a verdict file whose examples are all among `ids`, its tags normalised if asked."""
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
            raise ValueError(f"Row {number} of {path} judges example {example!r}, which is not among the ids.")
        if verdict not in ("yes", "no"):
            raise ValueError(f"Row {number} of {path} has the verdict {row['verdict']!r}; expected yes or no.")
        if verdicts.setdefault((example, tag), verdict == "yes") != (verdict == "yes"):
            raise ValueError(f"{path} says both yes and no of {tag!r} for example {example!r}.")
    return verdicts


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TagGain(evaluate.Metric):
    def _info(self):
        tags = datasets.List(datasets.Value("string"))
        pairs = {"predictions": tags, "references": tags}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features(pairs), datasets.Features(pairs | {"ids": datasets.Value("string")})],
        )

    def _compute(self, predictions, references, label_vocabulary, ids=None, verdicts=None, normalize=False):
        predictions = checked_tag_sets("predictions", predictions, normalize)
        references = checked_tag_sets("references", references, normalize)
        if verdicts is not None:
            if ids is None:
                raise ValueError("verdicts need ids, the identifier of every example.")
            if len(set(ids)) < len(ids):
                raise ValueError("Two examples have the same id; a verdict would not know which it judges.")
            verdicts = read_verdicts(verdicts, ids, normalize)
        if normalize:
            label_vocabulary = set(map(normalize_tag, label_vocabulary))
        if verdicts is None:
            return tag_gain(predictions, references, label_vocabulary) | {"unjudged_pairs": 0}
        unjudged = []

        def relevant(example, tag):
            if (ids[example], tag) not in verdicts:
                unjudged.append((example, tag))
            return verdicts.get((ids[example], tag), False)

        return tag_gain(predictions, references, label_vocabulary, relevant) | {"unjudged_pairs": len(unjudged)}
