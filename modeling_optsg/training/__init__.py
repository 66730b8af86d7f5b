"""Parts of a training loop: batches that do not depend on the number of processes, and checkpoints that survive."""

from .batches import GlobalBatches, SeededItems, micro_batches, share_candidates, weigh_losses, weighted_losses
from .collation import CollatedItems, CollateReadable, Unreadable
from .matching_moves import MatchingMoves
from .run_state import RunState, ignore_sigterm
from .streams import StreamBatches, TaggedStream
from .training_log import TrainingLog

__all__ = [
    "CollateReadable",
    "CollatedItems",
    "GlobalBatches",
    "MatchingMoves",
    "RunState",
    "SeededItems",
    "StreamBatches",
    "TaggedStream",
    "TrainingLog",
    "Unreadable",
    "ignore_sigterm",
    "micro_batches",
    "share_candidates",
    "weigh_losses",
    "weighted_losses",
]
