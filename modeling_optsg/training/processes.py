"""How processes share a training: each with a copy of the model, or with a part of it (FSDP2), or of the optimiser
alone (DeepSpeed)."""

import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def make_accelerator(mixed_precision: str | None, **settings) -> tuple[Accelerator, str]:
    """What `accelerate launch` was asked for, and the precision: "no", "fp16" or "bf16".

    Args:
        mixed_precision: the launcher's if not given.
        settings: of [`Accelerator`].

    Raises:
        ValueError: fp16 where there is none.
    """
    mixed_precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and mixed_precision == "fp16":
        raise ValueError("fp16 with DeepSpeed is not supported; give --mixed_precision bf16.")
    accelerator = Accelerator(
        # DeepSpeed's own bf16 would round weights, and what frozen towers and tag features hold; see
        # `prepare_training`.
        mixed_precision="no" if deepspeed else mixed_precision,
        kwargs_handlers=[
            # Buffers, such as what is tied to text, are the same in all processes and stay so.
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
            # The others wait while the first builds the dataset and looks at every image.
            InitProcessGroupKwargs(timeout=timedelta(days=2)),
        ],
        **settings,
    )
    if mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"fp16 needs a GPU: on a {accelerator.device.type} accelerate would train in 32 bits and not say so. Give "
            "--mixed_precision bf16 or no."
        )
    return accelerator, mixed_precision


def refuse_unshared(accelerator: Accelerator, *folders: str | os.PathLike, patience: float = 5.0) -> None:
    """All processes call it.

    Args:
        folders: that all processes are to find the same files in; made if they are not there.
        patience: seconds until a file must be seen.

    Raises:
        ValueError: a process, of another machine, has a folder of its own by that name.
    """
    if accelerator.num_processes == 1:
        return
    (mark,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    for path in map(Path, folders):
        if accelerator.is_main_process:
            path.mkdir(parents=True, exist_ok=True)
            (path / mark).touch()
        accelerator.wait_for_everyone()
        deadline = time.monotonic() + patience
        while not (seen := (path / mark).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        seen = gather_object([(seen, socket.gethostname())])
        if accelerator.is_main_process:
            (path / mark).unlink()
        if missing := sorted({host for found, host in seen if not found}):
            raise ValueError(
                f"{path} is not the same folder on all machines: {', '.join(missing)} cannot see what the first one "
                "writes there. Give one on a disk that they share."
            )


def prepare_model(accelerator: Accelerator, model):
    """What must be done before the optimiser is made.

    Raises:
        ValueError: `accelerate` is configured for what is not supported.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("Models are divided by FSDP2 only; set fsdp_version: 2 in accelerate's configuration.")
        if plugin.activation_checkpointing:
            raise ValueError("Give --gradient_checkpointing True instead of fsdp_activation_checkpointing.")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError("Every process builds the model; set fsdp_cpu_ram_efficient_loading: false.")
        offload = {"offload_policy": plugin.cpu_offload} if plugin.cpu_offload else {}
        # It looks for classes that have another name once they are divided.
        plugin.auto_wrap_policy = None
        shard_model(model, bool(plugin.reshard_after_forward), **offload)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage > 2:
            raise ValueError("Of DeepSpeed's stages 0 to 2 are supported; use FSDP2 to divide the weights too.")
    return model


def prepare_training(
    accelerator: Accelerator,
    model,
    optimizer: torch.optim.Optimizer,
    *,
    micro_batch_size: int,
    max_grad_norm: float,
    mixed_precision: str,
):
    """`accelerator.prepare` of a model and its optimiser.

    Args:
        model: of [`prepare_model`].
        micro_batch_size: most examples that a process computes at once.
        mixed_precision: of [`make_accelerator`].
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            # It would divide a part's loss by their number; losses are weighted already.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            # As with the other ways weights stay in 32 bits and operations choose.
            "torch_autocast": {"enabled": mixed_precision == "bf16", "dtype": "bfloat16"},
        }
    trained = [list(group["params"]) for group in optimizer.param_groups]
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        # `accelerate` tells parameters apart by where they lie in memory, and empty parts of several lie nowhere.
        for group, parameters in zip(optimizer.param_groups, trained):
            group["params"] = parameters
    return wrapped, prepared


def shard_model(model, reshard_after_forward: bool = True, **settings):
    """Divides a model's parameters, in place: each module of its `_no_split_modules` by itself, and all that is
    outside them as one group, which stays whole for the length of a step: the output layer reads the token embeddings.

    `accelerate` would give embeddings and output layer groups of their own, which must not share weights.

    Args:
        model: of [`OPTSGPreTrainedModel`], before its optimiser is made.
        settings: of [`fully_shard`].

    Raises:
        ValueError: a parameter has no dimension to be divided along.
    """
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise ValueError(f"{', '.join(scalars)} cannot be divided among processes: no dimension.")
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, reshard_after_forward=reshard_after_forward, **settings)
    return fully_shard(model, **settings)


def whole_state(model) -> dict[str, torch.Tensor]:
    """A model's state with whole tensors, in every process; all processes call it."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
