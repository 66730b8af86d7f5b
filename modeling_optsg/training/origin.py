"""Where a trained model comes from: its checkpoint, its towers and their names on the Hub, for the summary."""

import os
import re
from typing import Any

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.training_summary import (
    HUB_TOWERS,
    read_training_summary,
    summary_base_models,
    summary_towers,
)
from modeling_optsg.towers import HALVES

from .arguments import OPTSGTrainingArguments
from .pretrained_towers import PACKAGED_TOWERS

# A model that was loaded by such a name, and not from a folder, is on the Hub. Old models have no organisation.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def describe_origin(args: OPTSGTrainingArguments, model: OPTSGPreTrainedModel, checkpoint: str | None) -> dict:
    """Describe what a model was trained from.

    Args:
        args: Training arguments.
        model: The trained model.
        checkpoint: Folder or Hub name of the checkpoint that was fine-tuned, `None` for pretrained towers.

    Returns:
        Entries of the training summary: `checkpoint`; `towers`, see [`summary_towers`]; and `base_models`, the Hub
        names of the checkpoint, or else of what it was made from, or else of the towers. Never a local path.
    """
    before = _read_summary(checkpoint) if checkpoint else {}
    towers = {half: _describe_tower(half, args, model, before, checkpoint) for half in HALVES}
    towers = {half: tower for half, tower in towers.items() if tower is not None}
    if checkpoint:
        base_models = [checkpoint] if _is_hub_name(checkpoint) else summary_base_models(before)
    else:
        base_models = [name for tower in towers.values() if (name := _hub_name(tower["name"])) is not None]
    return {"checkpoint": checkpoint, "towers": towers, "base_models": base_models}


def _describe_tower(
    half: str, args: OPTSGTrainingArguments, model: OPTSGPreTrainedModel, before: dict, checkpoint: str | None
) -> dict[str, Any] | None:
    tower = getattr(model.model, f"{half}_tower")
    if tower is None:
        return None
    known = summary_towers(before).get(half, {})
    # A checkpoint has towers of its own. An argument that names one agrees with it.
    name = known.get("name") or getattr(args, f"{half}_tower")
    is_trained = args.train_vision_tower if half == "vision" else args.train_text_layers != 0
    trained = True if is_trained else known.get("trained", None if checkpoint else False)
    if half == "text" and args.classifier_checkpoint and not trained:
        # The text tower was loaded from it. Without a summary, the first phase has probably trained it.
        first_phase = summary_towers(_read_summary(args.classifier_checkpoint))
        trained = first_phase.get(half, {}).get("trained", True)
    return {"name": name, "model_type": tower.config.model_type, "trained": trained}


def _hub_name(tower: str) -> str | None:
    """Return the Hub name of a tower that was loaded, `None` for a folder and for one that is not on the Hub."""
    if tower in PACKAGED_TOWERS:
        return HUB_TOWERS.get(tower)
    return tower if _is_hub_name(tower) else None


def _is_hub_name(name: str) -> bool:
    return not os.path.exists(name) and HUB_NAME.fullmatch(name) is not None


def _read_summary(checkpoint: str) -> dict:
    """Return a training summary, empty if there is none or it is damaged: the training does not depend on it."""
    try:
        return read_training_summary(checkpoint)
    except (OSError, ValueError):
        return {}
