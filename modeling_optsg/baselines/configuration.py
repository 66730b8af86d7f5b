"""Configurations of the baselines."""

from modeling_optsg.configuration_optsg import OPTSGConfig


class ModelFConfig(OPTSGConfig):
    """Configuration of [`ModelFForTagGeneration`], identical to that of OP-TSG."""

    model_type = "optsg_model_f"


class ModelGConfig(OPTSGConfig):
    """Configuration of [`ModelGForTagClassification`].

    Args:
        num_tag_classes: Size of the label vocabulary. Each tag is a class, in addition to [PAD].
        cosine_classifier: Use a [`CosineClassifier`] instead of a linear layer.
    """

    model_type = "optsg_model_g"

    use_tag_classifier: bool = False
    cosine_classifier: bool = True


class ASYConfig(OPTSGConfig):
    """Configuration of [`ASYForTagClassification`].

    Args:
        num_tag_classes: Size of the label vocabulary. Each tag is a class.
    """

    model_type = "optsg_asy"
    keys_to_ignore_at_inference = []


class OpenBookConfig(OPTSGConfig):
    """Configuration of [`OpenBookForTagGeneration`].

    Args:
        num_prompts: Number of queries that pool the memory into the prompt of the sequence.
        num_book_examples: Number of neighbours whose tags are retrieved. With 0, the model has no book.
        max_book_tokens: Maximum number of tokens of an example's retrieved tags. Further tags are dropped.
        max_sequence_tokens: Maximum number of tokens of the sequence of all tags, including [SEP] and the end.
        tag_order: Order of the tags in the training sequence: "given" (as in the data) or "shuffled" (a new order each
            time).
    """

    model_type = "optsg_open_book"

    use_tag_classifier: bool = False
    num_prompts: int = 1
    num_book_examples: int = 8
    max_book_tokens: int = 128
    max_sequence_tokens: int = 96
    tag_order: str = "given"

    def _check(self) -> None:
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
        num_examples: Number of training examples.
        num_tag_classes: Size of the label vocabulary.
        max_tags_per_example: Maximum number of tags of a training example.
    """

    model_type = "optsg_knn"

    use_tag_classifier: bool = False
    num_examples: int = 0
    max_tags_per_example: int = 0
