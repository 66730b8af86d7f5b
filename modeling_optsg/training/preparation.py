"""What a training run needs before its first step: model, tags, and examples with the features of frozen towers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from dataset_scripts import example_groups
from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.baselines.retrieval import ExampleRetriever, ExamplesWithBook
from modeling_optsg.book.building import group_of
from modeling_optsg.book.nearest import import_faiss
from modeling_optsg.data.collator import TagTable
from modeling_optsg.data.data_check import check_data
from modeling_optsg.data.feature_cache import build_tag_table
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.evaluation.metrics import TagEvaluator
from modeling_optsg.processing_optsg import OPTSGProcessor

from .arguments import OPTSGTrainingArguments
from .data import cache_examples, fit_image_standardizer, load_extra_images, make_stream, without_untrainable_tags
from .image_augmentation import augment_images
from .image_warmup import warm_up_image_evidence
from .image_word_heads import embed_image_words
from .model_building import build_model, load_classifier, prepare_for_device
from .streaming import TaggedStream
from .text_tied_embeddings import class_embeddings, initialize_classes_from_text

logger = get_logger(__name__)


@dataclass
class PreparedTraining:
    """A training run before its first step.

    Args:
        model: The model to train.
        processor: Its processor.
        train: Training examples that can be read, without features.
        validation: Validation examples that can be read, without features.
        train_dataset: Training examples as the training loop reads them.
        eval_dataset: Validation examples as the training loop reads them.
        tag_table: Text features of all training tags.
        encoded: Training and validation examples, also those that cannot be read. Their features are cached.
        unreadable: Reasons for the examples that cannot be read.
        book: The examples that a model of the type open-book reads.
    """

    model: OPTSGPreTrainedModel
    processor: OPTSGProcessor
    train: Dataset
    validation: Dataset
    train_dataset: Sequence[Mapping] | TaggedStream
    eval_dataset: Sequence[Mapping]
    tag_table: TagTable
    encoded: tuple[Dataset, Dataset]
    unreadable: dict[str, str]
    book: ExampleRetriever | None = None

    @property
    def evaluator(self) -> TagEvaluator:
        """The evaluator of the validation examples."""
        return _make_evaluator(self.train, self.validation)


def prepare_training_run(
    args: OPTSGTrainingArguments,
    accelerator: Accelerator,
    train: Dataset,
    validation: Dataset,
    stream_shards: Sequence[IterableDataset] | None = None,
    given: tuple[OPTSGPreTrainedModel, OPTSGProcessor] | None = None,
) -> PreparedTraining:
    """Build the model, and compute the features of frozen towers or read them from the cache.

    Args:
        args: Training arguments.
        accelerator: The accelerator. All processes call this.
        train: Training examples.
        validation: Validation examples.
        stream_shards: The stream shards, with `args.streaming`.
        given: Model and processor to fine-tune, instead of those that `args` says.

    Raises:
        ValueError: There are no tags to train on, the model does not fit the arguments, a metric needs tags that the
            validation examples do not have, or too many examples cannot be read.
        ImportError: The model type needs a book, and `faiss` is not installed.
    """
    model_type = MODEL_TYPES[args.model_type]
    if model_type.needs_book:
        import_faiss()
    with accelerator.main_process_first():
        model, processor = build_model(args, train, validation, given)
        if accelerator.is_main_process:
            splits = {"train": train, "validation": validation}
            limits = (processor.tag_tokenizer, processor.max_tag_tokens, processor.num_prompts)
            report = check_data(splits, *limits, text_tokenizer=processor.tokenizer, read_files=False)
            logger.info("\n".join(report.lines()))
        train = without_untrainable_tags(train, processor)
    _make_evaluator(train, validation).check_metric(args.metric_for_best_model)  # before the towers run
    model.to(accelerator.device)
    tags = sorted({tag for example_tags in train["tags"] for tag in example_tags})
    with accelerator.main_process_first():
        tag_table = build_tag_table(tags, model.model, processor, Path(args.cache_dir) / "features")
    if args.embedding_init_std and class_embeddings(model) is not None:
        # A model to fine-tune has learned its title projection already.
        initialize_classes_from_text(model, tag_table.features, init_title=not (args.checkpoint or given))
    load_classifier(model, args)
    if args.classifier_checkpoint:
        # Its text tower may be another one. A frozen tower embeds the words only here.
        embed_image_words(model.model, processor.tokenizer)

    encoded = (train, validation)
    eval_dataset, validation, unreadable = cache_examples(validation, model, processor, args)
    if stream_shards is not None:
        train_dataset = make_stream(stream_shards, train, tags, args.shuffle_buffer_size)
        fit_image_standardizer(model, processor, eval_dataset)
    else:
        train_dataset, train, unreadable_train = cache_examples(train, model, processor, args)
        unreadable |= unreadable_train
        fit_image_standardizer(model, processor, train_dataset)
    prepare_for_device(model, args, accelerator.device)
    book = None
    if model_type.needs_book:
        groups = list(map(group_of, train["id"], train["title"], example_groups(train, args.dataset)))
        book = ExampleRetriever.from_examples(groups, train["tags"], train_dataset, model.config)
        train_dataset = ExamplesWithBook(train_dataset, book, model.config, processor.tag_tokenizer, groups)
        eval_dataset = ExamplesWithBook(eval_dataset, book, model.config, processor.tag_tokenizer)
    elif model_type.is_trained and stream_shards is None:
        extra_images = load_extra_images(train, model, processor, args)
        with accelerator.main_process_first():
            warm_up_image_evidence(model, args, tags, train_dataset, extra_images)
        train_dataset = augment_images(train_dataset, extra_images, model, args)
    return PreparedTraining(
        model, processor, train, validation, train_dataset, eval_dataset, tag_table, encoded, unreadable, book
    )


def _make_evaluator(train: Dataset, validation: Dataset) -> TagEvaluator:
    return TagEvaluator(validation["tags"], Counter(tag for own in train["tags"] for tag in set(own)))
