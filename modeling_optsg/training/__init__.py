"""Parts of a training loop: batches that do not depend on the number of processes, and checkpoints that survive."""

from .batches import GlobalBatches, SeededItems, micro_batches, share_candidates, weigh_losses, weighted_losses
from .matching_moves import MatchingMoves
from .run_state import RunState
from .training_log import TrainingLog

__all__ = [
    "GlobalBatches",
    "MatchingMoves",
    "RunState",
    "SeededItems",
    "TrainingLog",
    "micro_batches",
    "share_candidates",
    "weigh_losses",
    "weighted_losses",
]
