"""Tags examples with a model and a book."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModel
from transformers.utils import ModelOutput, PushToHubMixin

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.evaluation.metrics import normalize_tag
from modeling_optsg.generation_settings import check_positive_integer, check_threshold
from modeling_optsg.processing_optsg import OPTSGProcessor

from .book_files import INDEX_FOLDER, check_replaceable, load_pretrained_book, save_book
from .building import encoder_fingerprint
from .predictions import GENERATE_OPTIONS, ModelTagReader
from .tag_book import TagBook


class BookTagger(PushToHubMixin):
    """Tags examples with a model and a book.

    `push_to_hub("org/name")` publishes what [`save_pretrained`] saves, like `push_to_hub` of a model. `optsg push`
    also checks the files and adds the code for Inference Endpoints.

    Args:
        model: The model that the book was made with.
        processor: Its processor.
        book: The book; its folder; the folder of the images that it was made from; or the folder or Hub name of a
            checkpoint with a book.

    Attributes:
        model, processor, book: See above. The book is a [`TagBook`].
        generate_options: The arguments of `generate` whose output a call reads.

    Raises:
        FileNotFoundError: There is no such book.
        ValueError: The book is damaged or was made with another model, or the model has no tag classifier.

    Example:

        >>> from modeling_optsg.book import BookTagger
        >>> tagger = BookTagger.from_pretrained("runs/open-book")  # doctest: +SKIP
        >>> inputs = tagger.processor(images=["photo.jpg"])  # doctest: +SKIP
        >>> outputs = tagger.model.generate(**inputs, **tagger.generate_options)  # doctest: +SKIP
        >>> [tags] = tagger(outputs, titles=[None])  # doctest: +SKIP
    """

    generate_options: Mapping[str, Any] = GENERATE_OPTIONS

    def __init__(self, model: OPTSGPreTrainedModel, processor: OPTSGProcessor, book: TagBook | str | os.PathLike):
        self.model, self.processor = model, processor
        self._read_outputs = ModelTagReader(model, processor)
        self._training_tags = set(map(normalize_tag, processor.label_vocabulary))
        fingerprint = encoder_fingerprint(model, processor)
        if not isinstance(book, TagBook):
            book = load_pretrained_book(book, fingerprint)
        elif book.fingerprint != fingerprint:
            raise ValueError("The book was made with another model. Make a book with this model.")
        self.book = book

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **hub_options: Any) -> "BookTagger":
        """Load a model, its processor and its book from one folder or repository.

        Args:
            name: Folder of a checkpoint with a book in its folder `index`, or its name on the Hub.
            hub_options: Arguments for the download, such as `revision` or `token`.

        Raises:
            FileNotFoundError: There is no such checkpoint, or it has no book.
            ValueError: As in the constructor.
            OSError: The folder or repository has no model or no processor.
        """
        book = load_pretrained_book(name, **hub_options)
        processor = OPTSGProcessor.from_pretrained(name, **hub_options)
        return cls(AutoModel.from_pretrained(name, **hub_options), processor, book)

    def save_pretrained(self, save_directory: str | os.PathLike, **save_options: Any) -> None:
        """Save the model, its processor and the book, for [`from_pretrained`] and for `optsg tag`.

        Args:
            save_directory: Folder of the checkpoint. The book is saved in its folder `index`.
            save_options: Arguments of the model's `save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: The folder `index` has a file `book.json` that does not belong to a book.
        """
        folder = Path(save_directory, INDEX_FOLDER)
        check_replaceable(folder)
        self.model.save_pretrained(save_directory, **save_options)
        self.processor.save_pretrained(save_directory)
        save_book(self.book, folder)

    def __call__(
        self,
        outputs: ModelOutput,
        titles: Sequence[str | None],
        own_ids: Sequence[str | None] | None = None,
        threshold: float | None = None,
        max_tags: int | None = None,
    ) -> list[list[dict]]:
        """Return the tags of a batch.

        Args:
            outputs: Output of `generate` with `generate_options`.
            titles: Title of each example.
            own_ids: See [`TagBook.look_up`].
            threshold: Minimum probability of a tag; by default that of the book.
            max_tags: Maximum number of tags per example.

        Returns:
            For each example its tags, the most probable first. A tag is a dict with

            - `"tag"`, `"score"` (its probability) and `"novel"` (no training example of the model has it, in any
              spelling that [`normalize_tag`] treats alike);
            - `"source"`: "pointed" if the book reader points at it with a larger probability than a slot generates it
              and than the tag classifier gives it; otherwise "generated" by a slot, "classified" (only a candidate of
              the tag classifier) or "book" (only from neighbours). A model without a book reader, and a book that is
              not fitted, have no "pointed" tags;
            - `"neighbours"`: the examples of the book that have it, as `{"id", "title", "score"}`. The score is the
              example's vote, which depends on its similarity.

        Raises:
            ValueError: `threshold` or `max_tags` is out of range.
        """
        check_threshold(self.book.threshold if threshold is None else threshold)
        check_positive_integer("max_tags", max_tags)
        queries, model_tags = self._read_outputs(outputs, titles)
        candidates = self.book.look_up(queries, own_ids)
        self._read_outputs.point(model_tags, candidates)
        threshold, tagged = self.book.threshold if threshold is None else threshold, []
        for own, found in zip(model_tags, candidates, strict=True):
            tags = [{"source": "book"} | tag for tag in self.book.predict(own, found) if tag["score"] >= threshold]
            tags = [tag | {"novel": normalize_tag(tag["tag"]) not in self._training_tags} for tag in tags]
            tagged.append(tags[:max_tags])
        return tagged
