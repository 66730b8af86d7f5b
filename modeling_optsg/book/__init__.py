"""Tag books: tagged examples whose tags are suggested for similar examples, without training the model."""

from .building import build_book, embed_examples, embed_inputs, encoder_fingerprint, predict_all_tags
from .tag_book import BookCandidates, BookQueries, TagBook

__all__ = [
    "BookCandidates",
    "BookQueries",
    "TagBook",
    "build_book",
    "embed_examples",
    "embed_inputs",
    "encoder_fingerprint",
    "predict_all_tags",
]
