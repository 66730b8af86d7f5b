"""Per-tag F1 averaged over tags (Full, Rare, Common), micro and per-example metrics, and metrics at k."""

from collections.abc import Mapping, Sequence

import datasets
import evaluate

from modeling_optsg.evaluation.metrics import TagEvaluator, check_tag_sets, normalize_tag

_DESCRIPTION = """
Full, Rare and Common F1 of free-form tags, as in the OP-TSG paper. F1 is computed for each tag over the examples, and
averaged over the tags that occur both in training and in the references. Rare and common tags are separated by their
training counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each example its predicted tags, a list of str, best first, each once.
    references: for each example its ground-truth tags, a list of str, each once.
    train_counts: dict from each training tag to its number of training examples.
    common_count: training count from which a tag is common (25).
    ks: numbers of predictions to keep for precision and recall at k ([1, 5, 10]).
    normalize: whether to ignore differences of case, width and spaces (False: tags must match exactly). Tags of an
        example that become equal are merged, and their training counts are added up.

Returns:
    full_f1, rare_f1, common_f1, micro_precision, micro_recall, micro_f1, example_precision, example_recall,
    example_f1, novel_ratio, precision_at_k and recall_at_k in percent; tags_per_example; and evaluated_tags, the
    number of tags that F1 is averaged over. Without rare tags, rare_f1 is None, and without common tags, common_f1 is
    None.

Raises:
    ValueError: a tag is listed twice for an example, the number of predictions is not that of the references, or no
        reference tag is a training tag.
"""

_CITATION = """
@inproceedings{optsg2023, title = {Order-Prompted Tag Sequence Generation for Video Tagging}, booktitle = {ICCV},
year = {2023}}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TagF1(evaluate.Metric):
    """Computes the metrics of [`TagEvaluator`]."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        train_counts: Mapping[str, int],
        common_count: int = 25,
        ks: Sequence[int] = (1, 5, 10),
        normalize: bool = False,
        **of_tag_gain: object,
    ) -> dict[str, float]:
        # `evaluate.combine` passes the settings of all metrics to each of them.
        if unknown := of_tag_gain.keys() - {"label_vocabulary", "ids", "verdicts"}:
            raise ValueError(f"tag_f1 has no setting {sorted(unknown)}.")
        predictions = check_tag_sets("predictions", predictions, normalize)
        references = check_tag_sets("references", references, normalize)
        if normalize:
            merged = {}
            for tag, count in train_counts.items():
                merged[normalize_tag(tag)] = merged.get(normalize_tag(tag), 0) + count
            train_counts = merged
        evaluator = TagEvaluator(references, train_counts, common_count)
        evaluator.check_metric("full_f1")
        scored = [[{"tag": tag, "score": 1.0} for tag in tags] for tags in predictions]
        metrics = evaluator.score(scored) | evaluator.at_k(scored, list(ks))
        return metrics | {"evaluated_tags": len(evaluator.evaluated_tags)}
