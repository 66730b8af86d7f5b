r"""Compare moving averages of the weights with the last weights of one training run.

    python -m benchmarks.weight_average --config examples/configs/optsg-icon-small.json --train_ratio 0.25 \
        --num_train_epochs 10 --output results/training/weight_average.json

The training is `examples/train.py` with the arguments given here. Each average is fitted on the validation examples
like the last weights. After n steps the decay is min(decay, (1 + n) / (10 + n)), so that the average forgets the
initial weights.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.training import OPTSGTrainer, TrainingLoop, fit_best_model, parse_arguments, trainer

METRICS = ("full_f1", "rare_f1", "common_f1", "micro_f1")


class MovingAverages:
    """Exponential moving averages of the parameters of an optimizer.

    Args:
        decays: Decay of each average.
    """

    def __init__(self, decays: list[float]):
        self.decays, self.averages, self.parameters, self.steps = decays, {}, [], 0

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, *args: object) -> None:
        """Update the averages, as a hook after each step of the optimizer."""
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for decay in self.decays:
            if not self.steps:
                self.averages[decay] = [p.detach().clone() for p in self.parameters]
            current = min(decay, (1 + self.steps) / (10 + self.steps))
            get_ema_multi_avg_fn(current)(self.averages[decay], self.parameters, self.steps)
        self.steps += 1

    @torch.no_grad()
    def copy_to_parameters(self, decay: float) -> None:
        """Replace the parameters by an average."""
        for parameter, average in zip(self.parameters, self.averages[decay]):
            parameter.copy_(average)


class RecordedLoop(TrainingLoop):
    """Training loop that is available as `latest` after the training."""

    latest: TrainingLoop

    def run(self) -> dict:
        """Train the model."""
        RecordedLoop.latest = self
        return super().run()


def main() -> None:
    """Train, fit all averages and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.98, 0.99, 0.995, 0.999])
    own, others = parser.parse_known_args()

    averages, trainer.TrainingLoop = MovingAverages(own.decays), RecordedLoop
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse_arguments([*others, "--output_dir", folder])
        hook = register_optimizer_step_post_hook(averages.update)
        OPTSGTrainer(args=arguments).train()
        hook.remove()
        summary = json.loads(Path(folder, "training_summary.json").read_text(encoding="utf-8"))
        found, loop = {"last": summary["fits"]}, RecordedLoop.latest
        for decay in own.decays:
            averages.copy_to_parameters(decay)
            loop.args = dataclasses.replace(arguments, output_dir=str(Path(folder, str(decay))))
            loop.output_dir = Path(loop.args.output_dir)
            loop.save()
            examples, processor = loop.eval_dataset, loop.processing_class
            _, fits = fit_best_model(loop.args, processor, examples, loop.evaluator, loop.accelerator.device)
            found[f"average, decay {decay}"] = fits
    # The fit of the first decoding.
    found = {name: next(iter(fits.values()))["validation"] for name, fits in found.items()}
    found = {name: {metric: metrics[metric] for metric in METRICS} for name, metrics in found.items()}
    print(json.dumps(found, indent=1, allow_nan=False))
    result = {"steps": averages.steps, "examples": summary["examples"], "arguments": summary["arguments"]}
    result |= {"validation": found, **environment()}
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
