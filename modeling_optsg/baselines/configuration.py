"""Configurations of the baselines."""

from modeling_optsg.configuration_optsg import OPTSGConfig


class ModelFConfig(OPTSGConfig):
    """Configuration of [`ModelFForTagGeneration`]: that of OP-TSG."""

    model_type = "optsg_model_f"


class ModelGConfig(OPTSGConfig):
    """Configuration of [`ModelGForTagClassification`].

    Args:
        num_tag_classes: number of train tags, each a class beside [PAD].
        text_classes: as in [`ASYConfig`].
    """

    model_type = "optsg_model_g"

    set_alignment: bool = False
    text_classes: bool = True


class ASYConfig(OPTSGConfig):
    """Configuration of [`ASYForTagClassification`].

    Args:
        num_prompts: queries that pool the memory; their outputs are averaged.
        num_tag_classes: number of train tags, each a class.
        text_classes: whether classes are compared with the item's direction and may be tied to their tags' texts
            ([`SimilarityClassifier`]); else a linear layer.
    """

    model_type = "optsg_asy"

    set_alignment: bool = False
    num_prompts: int = 1
    text_classes: bool = True


class OpenBookConfig(OPTSGConfig):
    """Configuration of [`OpenBookForTagGeneration`].

    Args:
        num_prompts: queries that pool the memory into the sequence's opening.
        num_book_items: neighbours whose tags are looked at and copied from; 0 for a generator without a book.
        max_book_tokens: most tokens of an item's retrieved tags; further tags are left out.
        max_sequence_tokens: most tokens of the sequence of all tags, [SEP]s and its end included.
        tag_order: order of an item's tags in the training sequence: "given", as in the data, or "shuffled", another
            one each time.
    """

    model_type = "optsg_open_book"

    set_alignment: bool = False
    num_prompts: int = 1
    num_book_items: int = 8
    max_book_tokens: int = 128
    max_sequence_tokens: int = 96
    tag_order: str = "given"

    def _check(self):
        super()._check()
        if self.tag_order not in ("given", "shuffled"):
            raise ValueError(f'tag_order={self.tag_order!r} must be "given" or "shuffled".')
        if self.num_book_items < 0:
            raise ValueError(f"num_book_items={self.num_book_items} must not be negative.")
        for name in ("max_book_tokens", "max_sequence_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 2.")


class KNNConfig(OPTSGConfig):
    """Configuration of [`KNNForTagVote`].

    Args:
        num_items: training items that vote.
        num_tag_classes: number of train tags.
        max_item_tags: most tags of a training item.
    """

    model_type = "optsg_knn"

    set_alignment: bool = False
    num_items: int = 0
    max_item_tags: int = 0
