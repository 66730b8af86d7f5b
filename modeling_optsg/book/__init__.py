"""Tag books: tagged examples whose tags are suggested for similar examples, without training the model."""

from .book_files import load_book, load_pretrained_book, save_book
from .book_tagger import BookTagger
from .building import build_book, embed_examples, encoder_fingerprint
from .predictions import GENERATE_OPTIONS, ModelTagReader, ModelTags
from .queries import BookQueries
from .tag_book import BookCandidates, TagBook

__all__ = [
    "GENERATE_OPTIONS",
    "BookCandidates",
    "BookQueries",
    "BookTagger",
    "ModelTagReader",
    "ModelTags",
    "TagBook",
    "build_book",
    "embed_examples",
    "encoder_fingerprint",
    "load_book",
    "load_pretrained_book",
    "save_book",
]
