"""Examples to look up in a book."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modeling_optsg.tag_evidence import TagEvidence

from .votes import VECTOR_SOURCES


@dataclass
class BookQueries:
    """Examples to look up.

    Args:
        vectors: Vectors `[examples, width]` of each source in `VECTOR_SOURCES`; zeros for a missing modality.
        titles: Title of each example; an empty string if it has none.
    """

    vectors: dict[str, torch.Tensor]
    titles: list[str]

    @classmethod
    def from_evidence(cls, evidence: TagEvidence, titles: Sequence[str | None]) -> "BookQueries":
        """Make the queries of a batch from its evidence and its titles."""
        vectors = {"image": evidence.image_features, "title": evidence.title_features, "joint": evidence.vectors}
        vectors = {name: vector.detach().float().cpu() for name, vector in vectors.items()}
        return cls(vectors, [title or "" for title in titles])

    @classmethod
    def concatenate(cls, parts: Sequence["BookQueries"]) -> "BookQueries":
        """Concatenate the queries of several batches."""
        vectors = {name: torch.cat([part.vectors[name] for part in parts]) for name in VECTOR_SOURCES}
        return cls(vectors, [title for part in parts for title in part.titles])

    def select(self, rows: Sequence[int]) -> "BookQueries":
        """Return the queries of some rows."""
        vectors = {name: vectors[list(rows)] for name, vectors in self.vectors.items()}
        return BookQueries(vectors, [self.titles[row] for row in rows])

    def check_widths(self, vectors: Mapping[str, torch.Tensor], image_width: int) -> None:
        """Check that the vectors can be compared with those of a book.

        Args:
            vectors: The vectors of the book.
            image_width: Width of image vectors before their reduction.

        Raises:
            ValueError: A width differs.
        """
        for name, rows in vectors.items():
            width = image_width if name == "image" else rows.shape[1]
            if (own := self.vectors[name].shape[1]) != width:
                raise ValueError(
                    f"The {name} vectors have {own} dimensions, but those of the book have {width}. Compute them with "
                    "the model that the book was made with."
                )

    def __len__(self) -> int:
        return len(self.titles)
