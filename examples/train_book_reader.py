r"""Add a book of the training examples, and a trained book reader, to a checkpoint.

    python examples/train_book_reader.py --checkpoint checkpoints/optsg-icon-small --output_dir runs/open-book
    optsg tag --model runs/open-book --book runs/open-book photo.jpg

The folder `--output_dir` is a checkpoint with the weights of `--checkpoint` and of the reader. Its folder `index`
contains the book. Without the book, it tags as `--checkpoint` does. The fusion of model and book is fitted on the
validation split.
"""

import argparse
import json
import logging
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from dataset_scripts import example_groups, load_tagging_dataset
from dataset_scripts.column_names import add_column_arguments, column_arguments
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.book import (
    ModelTagReader,
    TagBook,
    embed_examples,
    encoder_fingerprint,
    save_book,
)
from modeling_optsg.book.book_files import INDEX_FOLDER
from modeling_optsg.book.building import group_of
from modeling_optsg.book.example_rows import check_unique
from modeling_optsg.data.feature_cache import CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.metrics import parse_metric
from modeling_optsg.hub.commits import HTTP_LOGGERS
from modeling_optsg.training.book_reader_training import train_book_reader

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of a model with a tag classifier")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to save the checkpoint in")
    parser.add_argument("--dataset", default="icon_tagging", help="benchmark, folder or Hub name of the dataset")
    add_column_arguments(parser)
    parser.add_argument(
        "--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser(), help="cache folder for tower features"
    )
    parser.add_argument("--num_train_epochs", type=float, default=2.0, help="passes over the training examples")
    parser.add_argument("--num_neighbours", type=int, default=40, help="number of similar examples per source")
    parser.add_argument("--num_candidates", type=int, default=100, help="maximum number of their tags per example")
    parser.add_argument("--batch_size", type=int, default=64, help="number of examples per step")
    parser.add_argument("--metric", default="full_f1+micro_f1", help="validation metric to maximise")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args()
    parse_metric(args.metric)
    return args


def main(args: argparse.Namespace) -> None:
    """Make the book, train the reader, fit both and save them."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in HTTP_LOGGERS:
        # They log every request, some with signed URLs.
        logging.getLogger(name).setLevel(logging.WARNING)
    model = OPTSGForTagGeneration.from_pretrained(args.checkpoint).eval().to(Accelerator().device)
    processor = OPTSGProcessor.from_pretrained(args.checkpoint)
    # Computed first, because it fails for a model that cannot have a book.
    fingerprint = encoder_fingerprint(model, processor)
    splits = load_tagging_dataset(args.dataset, **column_arguments(args))
    if missing := {"train", "validation"} - set(splits):
        raise ValueError(f"{args.dataset} has no {' and no '.join(sorted(missing))} split.")
    train, tagged = splits["train"], [row for row, tags in enumerate(splits["train"]["tags"]) if tags]
    if len(tagged) < len(train):
        train = train.select(tagged)
    ids = list(map(str, train["id"] if "id" in train.column_names else range(len(train))))
    check_unique(ids)
    validation = splits["validation"]
    features = {
        name: CachedFeatures(cache_tower_features(rows, model.model, processor, args.cache_dir / "features"))
        for name, rows in (("train", train), ("validation", validation))
    }
    titles = [title or "" for title in train["title"]]
    groups = list(map(group_of, ids, titles, example_groups(train, args.dataset)))
    columns = {"id": ids, "title": titles, "tags": train["tags"][:], "group": groups}
    train_queries = embed_examples(model, processor, features["train"])
    numbers = {"num_neighbours": args.num_neighbours, "num_candidates": args.num_candidates}
    book = TagBook(Dataset.from_dict(columns), train_queries, fingerprint, **numbers)

    reader = ModelTagReader(model, processor)
    queries, model_tags = reader.read_examples(features["validation"], validation["title"][:])
    options = {"metric": args.metric}
    without = book.fit(queries, validation["tags"][:], model_tags, **options)
    training = train_book_reader(
        model,
        processor,
        book,
        train_queries,
        features["train"],
        num_epochs=args.num_train_epochs,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    metrics = book.fit(queries, validation["tags"][:], model_tags, reader=reader, **options)
    # Without this reader, what was fitted is of no use.
    book.fingerprint = encoder_fingerprint(model, processor)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    save_book(book, args.output_dir / INDEX_FOLDER)
    summary = {"training": training, "validation": {"without_reader": without, "with_reader": metrics}}
    (args.output_dir / "book_summary.json").write_text(
        json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    if metrics is not None:
        logger.info(f"Validation: Full F1 {metrics['full_f1']:.1f}, micro F1 {metrics['micro_f1']:.1f}.")


if __name__ == "__main__":
    main(parse_arguments())
