"""`transformers.Trainer` with generated tags in evaluation, and the same loss for any number of processes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes
from torch import nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer

from modeling_optsg.batch_tags import NO_LABEL
from modeling_optsg.evaluation.metrics import TagEvaluator
from modeling_optsg.generation_optsg import OPTSGGenerateOutput
from modeling_optsg.generation_settings import generation_inputs
from modeling_optsg.processing_optsg import OPTSGProcessor

from .arguments import TOWER_LEARNING_RATE, OPTSGTrainingArguments
from .losses import global_loss_weights, weighted_losses
from .optimizer import parameter_groups


class TagMetrics:
    """Metrics of generated tags: `compute_metrics` of a [`TagTrainer`].

    The references are the `labels`, so an example with more tags than the model has prompts is compared with a random
    selection of them.

    Args:
        processor: The processor of the model. Its label vocabulary has the training counts.
        metric: The metric that selects the threshold, as in [`OPTSGTrainer`].

    Example:

        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from modeling_optsg import OPTSGProcessor, TagMetrics
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> labels = processor.encode_tag_sets([["bus", "transit"]])["labels"].numpy()
        >>> predictions = (labels, np.array([[0.9, 0.2]]))
        >>> TagMetrics(processor)(EvalPrediction(predictions=predictions, label_ids=labels))["full_f1"]
        100.0
    """

    def __init__(self, processor: OPTSGProcessor, metric: str = "full_f1"):
        self.processor, self.metric = processor, metric

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of [`TagEvaluator.score`] at the best threshold, and the threshold.

        Args:
            prediction: `predictions` are the tokens `[examples, tags, length]` and the scores `[examples, tags]` of
                the generated tags, and `label_ids` the tokens of the true tags, all padded with -100.

        Raises:
            ValueError: The metric needs tags that the examples do not have.
        """
        sequences, scores = (torch.as_tensor(values) for values in prediction.predictions)
        outputs = OPTSGGenerateOutput(sequences=sequences, tag_scores=scores.clamp(min=0))
        references = [[tag["tag"] for tag in tags] for tags in self.processor.batch_decode(prediction.label_ids)]
        evaluator = TagEvaluator(references, self.processor.label_vocabulary)
        evaluator.check_metric(self.metric)
        threshold, metrics = evaluator.best_threshold(self.processor.batch_decode(outputs), self.metric)
        metrics = {name: value for name, value in metrics.items() if value is not None}
        return {"threshold": threshold} | metrics


class TagTrainer(Trainer):
    """`transformers.Trainer` for the models of this package.

    It differs in four ways:

    - `compute_metrics` gets the tags that the model generates, see [`TagMetrics`].
    - With several processes, the loss and the gradient are those of one process with the whole batch: the tags of all
      processes are candidates of the tag alignment, and the losses are means over all tokens, prompts or examples.
      This is exact with `num_sampled_tokens=0` in the configuration; otherwise each process samples tokens of its own.
      With gradient accumulation, it holds for each of the accumulated batches.
    - The optimizer has the parameter groups of `optsg train`: norms, biases and embeddings are not decayed, embeddings
      learn more slowly, and a tower that is trained has a learning rate of its own.
    - Each process reads its part of an iterable dataset itself. The batches of a dispatcher must not differ in shape.

    Args:
        args, kwargs: Arguments of [`Trainer`]. `data_collator` is an [`OPTSGDataCollator`].
        generate_kwargs: Settings of `generate` in evaluation.

    Raises:
        ValueError: `label_smoothing_factor` is set.

    Example:

        >>> import tempfile
        >>> from transformers import TrainingArguments
        >>> from modeling_optsg import OPTSGDataCollator, OPTSGForTagGeneration, OPTSGProcessor, TagMetrics, TagTrainer
        >>> model = OPTSGForTagGeneration.from_pretrained("checkpoints/optsg-icon-small")
        >>> processor = OPTSGProcessor.from_pretrained("checkpoints/optsg-icon-small")
        >>> rows = [{"title": "bus", "tags": ["bus"]}, {"title": "tent", "tags": ["tent"]}]
        >>> args = TrainingArguments(tempfile.mkdtemp(), report_to="none", disable_tqdm=True, use_cpu=True)
        >>> trainer = TagTrainer(
        ...     model, args, OPTSGDataCollator(processor), eval_dataset=rows, compute_metrics=TagMetrics(processor)
        ... )
        >>> trainer.evaluate()["eval_full_f1"]
        {'eval_loss': ...
        100.0
    """

    def __init__(self, *args: Any, generate_kwargs: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}: the losses of these models have no label "
                "smoothing; leave it at 0."
            )
        self.generate_kwargs = dict(generate_kwargs or {})
        # The collator reads columns that are not arguments of `forward`.
        self.args.remove_unused_columns = False
        if self.accelerator.dispatch_batches is None:
            self.accelerator.dataloader_config.dispatch_batches = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, with the parameter groups of `optsg train`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                tower_learning_rate=TOWER_LEARNING_RATE,
                embedding_lr_multiplier=OPTSGTrainingArguments.embedding_lr_multiplier,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the loss of this process; its mean over the processes is the loss of the whole batch."""
        processes = self.accelerator.num_processes
        if processes == 1 or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{**inputs, **self._tags_of_all_processes(inputs)})
        config = self.model.config
        (weights,) = global_loss_weights(self.accelerator, config, [inputs])
        loss = weighted_losses(config, outputs, weights)["loss"] * processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _tags_of_all_processes(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tags of all processes as negatives; the model leaves out those of its own examples."""
        labels, features = inputs["labels"], inputs.get("tag_features")
        if features is None and "tag_text_input_ids" not in inputs:
            return {}
        if features is None:
            texts = (inputs[f"tag_text_{name}"].flatten(0, 1) for name in ("input_ids", "attention_mask"))
            features = self.accelerator.unwrap_model(self.model).model.embed_tags(*texts)
            features = features.unflatten(0, labels.shape[:2])
        gathered = {"negative_input_ids": [labels], "negative_features": [features]}
        for name, values in gathered.items():
            if name in inputs:
                values.append(inputs[name])
            gathered[name] = torch.cat([self._of_all_processes(own) for own in values])
        return gathered

    @staticmethod
    def _of_all_processes(values: torch.Tensor) -> torch.Tensor:
        """Gather `[batch, tags, ...]` as `[rows, ...]`. Rows of padding are tags without tokens."""
        for dim in (0, 1):
            padding = 0.0 if values.is_floating_point() else NO_LABEL
            values = pad_across_processes(values, dim=dim, pad_index=padding)
        return gather(values.contiguous()).flatten(0, 1)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor | None]:
        """Compute the loss and generate tags.

        Returns:
            The loss; the tokens `[batch, tags, max_tag_tokens]` and the scores `[batch, tags]` of the generated tags;
            and the labels.
        """
        inputs = self._prepare_inputs(inputs)
        labels, loss = inputs.get("labels"), None
        if labels is not None:
            loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        generator = self.accelerator.unwrap_model(model)
        # `compute_metrics` chooses a threshold itself, so it needs all tags.
        settings, config = {"threshold": 0.0} | self.generate_kwargs, generator.generation_config
        if getattr(config, "num_candidates", None) and getattr(config, "fusion_weights", None) is None:
            # Candidates of the tag classifier need fusion weights, which are fitted after the training.
            settings = {"num_candidates": 0} | settings
        with self.compute_loss_context_manager():
            outputs = generator.generate(**generation_inputs(generator, inputs), **settings)
        # All processes gather the tokens, which must have the same length.
        sequences = outputs.sequences.masked_fill(outputs.tag_scores[..., None] == 0, NO_LABEL)
        missing = generator.config.max_tag_tokens - sequences.shape[-1]
        return loss, (F.pad(sequences, (0, missing), value=NO_LABEL), outputs.tag_scores.float()), labels
