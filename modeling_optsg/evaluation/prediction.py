"""Prediction of tags for many examples."""

from collections.abc import Iterator, Mapping, Sequence

from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.collator import OPTSGDataCollator, is_present
from modeling_optsg.processing_optsg import OPTSGProcessor

MODALITY_COLUMNS = {
    "image": ("image", "video", "frame_features", "image_features"),
    "title": ("title", "title_features"),
}


def predict_tags(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, examples: Sequence[Mapping], **kwargs: object
) -> list[list[dict]]:
    """Predicts the tags of many examples.

    Args:
        model: A model with `generate`.
        processor: The processor of the model.
        examples: Rows as [`OPTSGDataCollator`] reads them; ground-truth tags are ignored.
        kwargs: Arguments of [`generate_batches`] and of `generate`.

    Returns:
        For each example its tags as `{"tag", "score", "novel"}`, best first. An example that has none of the
        `modalities` gets no tags.

    Example:

        >>> from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, predict_tags
        >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> examples = [{"image": "examples/images/bird.png", "title": "bird"}]
        >>> tags = predict_tags(model, processor, examples, max_tags=2, progress=False)[0]
        >>> [tag["tag"] for tag in tags]
        ['bird', 'ornithology']
    """
    predictions = [[] for _ in range(len(examples))]
    for indices, outputs in generate_batches(model, processor, examples, **kwargs):
        for index, tags in zip(indices, processor.batch_decode(outputs)):
            predictions[index] = tags
    return predictions


def generate_batches(
    model: OPTSGPreTrainedModel,
    processor: OPTSGProcessor,
    examples: Sequence[Mapping],
    *,
    batch_size: int = 64,
    modalities: Sequence[str] = ("image", "title"),
    progress: bool = True,
    **generate_kwargs: object,
) -> Iterator[tuple[list[int], ModelOutput]]:
    """Call `generate` on many examples, batch by batch.

    Args:
        model: A model with `generate`.
        processor: The processor of the model.
        examples: Rows as [`OPTSGDataCollator`] reads them; ground-truth tags are ignored. Tags of [`ExamplesWithBook`]
            are retrieved by `modalities` only.
        batch_size: Number of examples per batch.
        modalities: The inputs that the model sees: "image" (including videos and frame features), "title"
            or both.
        progress: Whether to show a progress bar.
        generate_kwargs: Arguments of `generate`.

    Yields:
        The indices of a batch's examples, without those that have none of the modalities, and the output for them.

    Raises:
        ValueError: A modality is unknown, an example cannot be read, or it has `book_input_ids` that may have been
            retrieved by a hidden input.
    """
    if unknown := set(modalities) - set(MODALITY_COLUMNS):
        raise ValueError(f"modalities={sorted(unknown)} are unknown; expected some of {sorted(MODALITY_COLUMNS)}.")
    columns = {column for modality in modalities for column in MODALITY_COLUMNS[modality]}
    retrieves = hasattr(examples, "with_modalities")
    if retrieves:
        examples = examples.with_modalities(modalities)
    collate = OPTSGDataCollator(processor)
    # Many calls take less than two seconds: they show no bar.
    starts = range(0, len(examples), batch_size)
    for start in tqdm(starts, desc="Tagging", disable=not progress, leave=False, delay=2):
        rows = {}
        for index in range(start, min(start + batch_size, len(examples))):
            example = examples[index]
            row = {name: value for name, value in example.items() if name in columns}
            if any(map(is_present, row.values())):
                # Retrieved tags tell about the inputs that they were retrieved by.
                if "book_input_ids" in example:
                    if not retrieves:
                        _check_all_visible(example, modalities)
                    row["book_input_ids"] = example["book_input_ids"]
                rows[index] = row
        if rows:
            batch = {name: value.to(model.device) for name, value in collate(list(rows.values())).items()}
            yield list(rows), model.generate(**batch, **generate_kwargs)


def _check_all_visible(example: Mapping, modalities: Sequence[str]) -> None:
    """Check that no input is hidden that the tags of an example may have been retrieved by."""
    for name in MODALITY_COLUMNS.keys() - set(modalities):
        if any(is_present(example.get(column)) for column in MODALITY_COLUMNS[name]):
            raise ValueError(
                f"modalities={list(modalities)} hides the {name}, by which book_input_ids may have been retrieved. "
                "Pass ExamplesWithBook, which retrieves without it."
            )
