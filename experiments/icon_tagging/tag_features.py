r"""Measures whether the second phase should compute the text features of tags again.

    python -m experiments.icon_tagging.recipe ladder --rows recipe --seeds 0 1
    python -m experiments.icon_tagging.tag_features --seeds 0 1 \
        --output experiments/icon_tagging/results/tag_features.json

In the second phase, slots are matched to tags by text features. OP-TSG in two phases, a row of the ladder, is trained
with two kinds of features:

- `kept`: those of the text tower before the first phase, as the recipe does;
- `refreshed`: those of the text tower that the first phase trained.

Checkpoints of the first phase are read from `--work_dir`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from experiments.icon_tagging.recipe import (
    CONFIG,
    WORK_DIR,
    describe_training,
    existing_runs,
    gather,
    in_fast_precision,
    ladder_rows,
    markdown_table,
    run_folder,
    training_arguments,
    training_command,
)
from experiments.icon_tagging.runs import make_parser, read_summary, write_result
from modeling_optsg.data.feature_cache import build_tag_table
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training import trainer
from modeling_optsg.training.arguments import OPTSGTrainingArguments
from modeling_optsg.training.preparation import PreparedTraining, prepare_training_run

ROW = "op-tsg-in-two-phases"
KINDS = {"kept": "features of the tower before the first phase", "refreshed": "features of the trained tower"}


def prepare_with_refreshed_features(arguments: OPTSGTrainingArguments, *others: object) -> PreparedTraining:
    """Prepare a training run whose tags have the features of the text tower that the first phase trained."""
    prepared = prepare_training_run(arguments, *others)
    folder = Path(arguments.cache_dir) / "features"
    table = build_tag_table(prepared.tag_table.tags, prepared.model.model, prepared.processor, folder)
    return dataclasses.replace(prepared, tag_table=table)


def train(kind: str, words: Sequence[object]) -> None:
    """Train with `kept` or `refreshed` features.

    Raises:
        RuntimeError: The training failed.
    """
    prepare = {"kept": prepare_training_run, "refreshed": prepare_with_refreshed_features}[kind]
    with mock.patch.object(trainer, "prepare_training_run", prepare):
        if status := trainer.run_command([str(word) for word in words]):
            raise RuntimeError(f"The training ended with status {status}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs that are not in the result file, and write it after each of them."""
    parser = make_parser(__doc__, has_dataset=False)
    parser.add_argument("--output", type=Path, required=True, help="result file")
    parser.add_argument("--work_dir", type=Path, default=WORK_DIR, help="folder of the checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args(argv)
    rows, runs = {name: {"what": what} for name, what in KINDS.items()}, existing_runs(arguments.output)
    row = ladder_rows()[ROW]
    row["arguments"] = in_fast_precision(row["arguments"])
    for seed in arguments.seeds:
        for kind in KINDS:
            if (kind, seed) in runs:
                continue
            folder = run_folder(f"tag-features-{kind}", arguments.work_dir, seed)
            words = training_arguments(row, CONFIG, arguments.work_dir, seed)
            train(kind, [*words, "--output_dir", folder, "--cache_dir", arguments.cache_dir])
            run = {"row": kind, "command": training_command(row, CONFIG, seed)}
            runs[kind, seed] = run | describe_training(read_summary(folder)) | environment()
            write_result(gather(rows, runs), arguments.output)
    print(markdown_table(gather(rows, runs), "validation"))


if __name__ == "__main__":
    main()
