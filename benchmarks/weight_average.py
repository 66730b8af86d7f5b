r"""Whether an exponential moving average of the weights pays: one training, and its averages beside its last weights.

    python benchmarks/weight_average.py --config examples/configs/optsg-icon-small.json --train_ratio 0.25 \
        --num_train_epochs 10 --output results/training/weight_average.json

The training is `examples/train.py` with the arguments given here; an average for each decay is kept beside it, and at
the end fitted on the validation examples as the last weights are. A decay begins lower, as min(decay, (1 + n) / (10 + n))
after n steps, so that the average forgets where training began.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train as training  # noqa: E402
from score import environment  # noqa: E402

from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.evaluation.calibration import fit_generation_config
from modeling_optsg.training import save_checkpoint, whole_state
from modeling_optsg.training.text_tied_embeddings import plain_copy

METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")


class Averages:
    """Moving averages of all that an optimizer steps."""

    def __init__(self, decays: list[float]):
        self.decays, self.kept, self.parameters, self.steps = decays, {}, [], 0

    @torch.no_grad()
    def note(self, optimizer, *_) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for decay in self.decays:
            if not self.steps:
                self.kept[decay] = [p.detach().clone() for p in self.parameters]
            now = min(decay, (1 + self.steps) / (10 + self.steps))
            get_ema_multi_avg_fn(now)(self.kept[decay], self.parameters, self.steps)
        self.steps += 1

    @torch.no_grad()
    def put(self, decay: float) -> None:
        for parameter, average in zip(self.parameters, self.kept[decay]):
            parameter.copy_(average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.98, 0.99, 0.995, 0.999])
    own, others = parser.parse_known_args()

    averages, known, learn = Averages(own.decays), {}, training.learn

    def learn_and_keep(*given):
        names = ("accelerator", "model", "processor", "tag_table", "train_examples")
        names += ("validation", "validation_examples", "evaluator", "arguments", "stop")
        known.update(zip(names, given))
        return learn(*given)

    training.learn = learn_and_keep
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [sys.argv[0], *others, "--output_dir", folder]
        hook = register_optimizer_step_post_hook(averages.note)
        arguments = training.parse_arguments()
        training.main(arguments)
        hook.remove()
        system = MODEL_TYPES[arguments.model_type]
        decoding = system.decodings[0]
        summary = json.loads(Path(folder, "training_summary.json").read_text(encoding="utf-8"))
        found = {"last": summary["fits"][decoding or "only"]["validation"]}
        for decay in own.decays:
            averages.put(decay)
            plain = plain_copy(known["model"], whole_state(known["model"]))
            save_checkpoint(plain, known["processor"], Path(folder, str(decay)), arguments.save_half_precision)
            model = system.model.from_pretrained(Path(folder, str(decay)))
            system.set_search(model, arguments.num_return_sequences, arguments.num_candidates)
            fit = fit_generation_config(
                model,
                known["processor"],
                known["validation_examples"],
                known["evaluator"],
                decoding=decoding,
                objective=arguments.metric_for_best_model,
                grid=system.grid(arguments.pad_biases),
            )
            found[f"average, decay {decay}"] = fit["validation"]
    found = {name: {figure: metrics[figure] for figure in METRICS} for name, metrics in found.items()}
    print(json.dumps(found, indent=1))
    result = {"steps": averages.steps, "examples": summary["examples"], "arguments": summary["arguments"]}
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text(
        json.dumps(result | {"validation": found} | environment(), indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
