"""Configurations of the baselines."""

from modeling_optsg.configuration_optsg import OPTSGConfig


class ModelFConfig(OPTSGConfig):
    """Configuration of [`ModelFForTagGeneration`]: that of OP-TSG."""

    model_type = "optsg_model_f"


class ModelGConfig(OPTSGConfig):
    """Configuration of [`ModelGForTagClassification`].

    Args:
        num_tag_classes: number of train tags, each a class beside [PAD].
        cosine_classifier: as in [`ASYConfig`].
    """

    model_type = "optsg_model_g"

    use_tag_classifier: bool = False
    cosine_classifier: bool = True


class ASYConfig(OPTSGConfig):
    """Configuration of [`ASYForTagClassification`].

    Args:
        num_prompts: queries that pool the memory; their outputs are averaged.
        num_tag_classes: number of train tags, each a class.
        cosine_classifier: whether classes are compared with the example's direction and may be tied to their tags' texts
            ([`CosineClassifier`]); else a linear layer.
    """

    model_type = "optsg_asy"

    use_tag_classifier: bool = False
    num_prompts: int = 1
    cosine_classifier: bool = True


class OpenBookConfig(OPTSGConfig):
    """Configuration of [`OpenBookForTagGeneration`].

    Args:
        num_prompts: queries that pool the memory into the sequence's opening.
        num_book_examples: neighbours whose tags are looked at and copied from; 0 for a generator without a book.
        max_book_tokens: most tokens of an example's retrieved tags; further tags are left out.
        max_sequence_tokens: most tokens of the sequence of all tags, [SEP]s and its end included.
        tag_order: order of an example's tags in the training sequence: "given", as in the data, or "shuffled", another
            one each time.
    """

    model_type = "optsg_open_book"

    use_tag_classifier: bool = False
    num_prompts: int = 1
    num_book_examples: int = 8
    max_book_tokens: int = 128
    max_sequence_tokens: int = 96
    tag_order: str = "given"

    def _check(self):
        super()._check()
        if self.tag_order not in ("given", "shuffled"):
            raise ValueError(f'tag_order={self.tag_order!r} must be "given" or "shuffled".')
        if self.num_book_examples < 0:
            raise ValueError(f"num_book_examples={self.num_book_examples} must not be negative.")
        for name in ("max_book_tokens", "max_sequence_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 2.")


class KNNConfig(OPTSGConfig):
    """Configuration of [`KNNForTagVote`].

    Args:
        num_examples: training examples that vote.
        num_tag_classes: number of train tags.
        max_tags_per_example: most tags of a training example.
    """

    model_type = "optsg_knn"

    use_tag_classifier: bool = False
    num_examples: int = 0
    max_tags_per_example: int = 0
