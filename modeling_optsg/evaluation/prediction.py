"""Tags for many examples, and the fit of decoding settings on validation examples."""

from collections.abc import Iterator, Mapping, Sequence

from tqdm.auto import tqdm

from modeling_optsg.data.collator import OPTSGDataCollator

MODALITY_COLUMNS = {"image": ("image", "video", "frame_features"), "title": ("title", "title_features")}


def predict_tags(
    model,
    processor,
    examples: Sequence[Mapping],
    *,
    batch_size: int = 64,
    modalities: Sequence[str] = ("image", "title"),
    progress: bool = True,
    **generate_kwargs,
) -> list[list[dict]]:
    """Tags of many examples.

    Args:
        examples: anything [`OPTSGDataCollator`] makes batches of; ground-truth tags are not looked at.
        modalities: what the model may look at, "image", "title" or both.
        generate_kwargs: of `generate`.

    Returns:
        For each example its tags as `{"tag", "score", "novel"}`, best first. An example that has none of the modalities gets
        no tags.
    """
    predictions = [[] for _ in range(len(examples))]
    for rows, outputs in _generate(model, processor, examples, batch_size, modalities, progress, generate_kwargs):
        for index, tags in zip(rows, processor.batch_decode(outputs)):
            predictions[index] = tags
    return predictions


def _generate(model, processor, examples, batch_size, modalities, progress, generate_kwargs) -> Iterator[tuple]:
    """Batch by batch the indices of the examples that can be looked at, and `generate`'s output for them."""
    if unknown := set(modalities) - set(MODALITY_COLUMNS):
        raise ValueError(f"modalities={sorted(unknown)} are unknown; expected some of {sorted(MODALITY_COLUMNS)}.")
    columns = {column for modality in modalities for column in MODALITY_COLUMNS[modality]}
    collate = OPTSGDataCollator(processor, max_book_tokens=getattr(model.config, "max_book_tokens", None))
    for start in tqdm(range(0, len(examples), batch_size), desc="Tagging", disable=not progress, leave=False):
        rows = {}
        for index in range(start, min(start + batch_size, len(examples))):
            row = {name: value for name, value in examples[index].items() if name in columns}
            if any(value is not None and not (isinstance(value, str) and not value.strip()) for value in row.values()):
                # What neighbours have is no modality of the example's own.
                rows[index] = row | {name: examples[index][name] for name in ("book_tags",) if name in examples[index]}
        if not rows:
            continue
        batch = {name: value.to(model.device) for name, value in collate(list(rows.values())).items()}
        yield list(rows), model.generate(**batch, **generate_kwargs)
