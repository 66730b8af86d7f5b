"""Arguments that contradict the checkpoint to fine-tune."""

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.training_summary import read_training_summary, summary_towers
from modeling_optsg.processing_optsg import OPTSGProcessor
from modeling_optsg.towers import HALVES

from .arguments import OPTSGTrainingArguments

# Not stored in the model or its processor, but only in the summary of the training.
RECORDED = ("image_words", "tag_vocab_size")


def check_checkpoint_arguments(
    args: OPTSGTrainingArguments, model: OPTSGPreTrainedModel, processor: OPTSGProcessor, new_tag_tokenizer: bool
) -> None:
    """Check that the given arguments agree with the checkpoint to fine-tune, which keeps its own settings.

    Args:
        args: Training arguments. An argument that is `None` was not given.
        model: The model of the checkpoint.
        processor: Its processor.
        new_tag_tokenizer: Whether a new tag tokenizer is trained, for which `tag_vocab_size` is used.

    Raises:
        ValueError: An argument differs from the checkpoint. The message names all such arguments.
    """
    settings = {
        "num_frames": processor.num_frames,
        "max_tag_tokens": processor.max_tag_tokens,
        "image_size": image_size_of(processor),
    }
    summary = read_training_summary(args.checkpoint) if args.checkpoint else {}
    settings |= {name: summary.get("arguments", {}).get(name) for name in RECORDED}
    towers = summary_towers(summary)
    settings |= {f"{half}_tower": towers.get(half, {}).get("name") for half in HALVES}
    if settings["vision_tower"] is None and model.model.vision_tower is None:
        settings["vision_tower"] = "none"
    if settings["image_words"] is None and model.model.image_words is None:
        settings["image_words"] = "none"
    if settings["tag_vocab_size"] is None:
        settings["tag_vocab_size"] = len(processor.tag_tokenizer)
    if new_tag_tokenizer:
        settings.pop("tag_vocab_size")
    wrong = [
        f"--{name} {getattr(args, name)} (the checkpoint has {'its own' if value is None else value})"
        for name, value in settings.items()
        if getattr(args, name) is not None and getattr(args, name) != value
    ]
    if wrong:
        raise ValueError(
            f"These arguments contradict --checkpoint {args.checkpoint or '(the given model)'}: {', '.join(wrong)}. "
            "Leave them out, or train from pretrained towers, without --checkpoint."
        )


def image_size_of(processor: OPTSGProcessor) -> int | None:
    """Return height and width to which a processor resizes images; `None` if they differ or images are cropped."""
    image_processor = getattr(processor, "image_processor", None)
    settings = {} if image_processor is None else image_processor.to_dict()
    size = settings.get("size")
    if not size or settings.get("do_center_crop") or size.get("height") != size.get("width"):
        return None
    return size.get("height")
