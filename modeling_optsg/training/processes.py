"""Several processes: copies of the model (DDP), a sharded model (FSDP2) or a sharded optimizer (DeepSpeed)."""

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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.data.process_logging import get_logger
from modeling_optsg.layers import TransformerLayer
from modeling_optsg.towers import HALVES

from .precision import is_bfloat16_fast

logger = get_logger(__name__)


def make_accelerator(mixed_precision: str | None, **kwargs: object) -> tuple[Accelerator, str]:
    """Create the accelerator that `accelerate launch` was configured for.

    Args:
        mixed_precision: "no", "fp16" or "bf16"; `None` for the launcher's setting.
        kwargs: Other arguments of [`Accelerator`].

    Returns:
        The accelerator and the precision.

    Raises:
        ValueError: Fp16 is not supported on this device or with DeepSpeed.
    """
    mixed_precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and mixed_precision == "fp16":
        raise ValueError("fp16 with DeepSpeed is not supported; give --mixed_precision bf16.")
    accelerator = Accelerator(
        # DeepSpeed's own bf16 would round weights, frozen towers and tag features; see `prepare_training`.
        mixed_precision="no" if deepspeed else mixed_precision,
        kwargs_handlers=[
            # Buffers, such as text features, are the same in all processes.
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
            # The others wait while the first process builds the dataset and checks every image.
            InitProcessGroupKwargs(timeout=timedelta(days=2)),
        ],
        **kwargs,
    )
    if mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"fp16 needs a GPU: on a {accelerator.device.type} accelerate would silently train in 32 bits. Give "
            "--mixed_precision bf16 or no."
        )
    if mixed_precision == "bf16" and not is_bfloat16_fast(accelerator.device):
        logger.warning(
            "bf16 is much slower than 32 bits on this processor or GPU, which has no fast products in bf16. For a "
            "faster training, give --mixed_precision no."
        )
    return accelerator, mixed_precision


def start_trackers(accelerator: Accelerator, report_to: list[str], config: dict) -> None:
    """Start the trackers of accelerate.

    Args:
        accelerator: Made with `log_with=report_to`.
        report_to: Names of the trackers.
        config: Training arguments. Numbers and strings among them are reported.

    Raises:
        ValueError: A tracker is not installed.
    """
    if not report_to:
        return
    # accelerate ignores trackers that are not installed.
    installed = {tracker.value for tracker in accelerator.log_with}
    if missing := sorted(set(report_to) - installed):
        raise ValueError(f"--report_to {' '.join(missing)}: not installed.")
    reported = {name: value for name, value in config.items() if isinstance(value, str | int | float)}
    accelerator.init_trackers("optsg", reported)


def check_shared_folders(accelerator: Accelerator, *folders: str | os.PathLike, timeout: float = 5.0) -> None:
    """Check that all processes see the same files in some folders. All processes call this.

    Args:
        accelerator: The accelerator.
        folders: The folders. Missing ones are created.
        timeout: Seconds to wait for a file to become visible.

    Raises:
        ValueError: A process on another machine has its own folder of that name.
    """
    if accelerator.num_processes == 1:
        return
    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    for path in map(Path, folders):
        if accelerator.is_main_process:
            path.mkdir(parents=True, exist_ok=True)
            (path / name).touch()
        accelerator.wait_for_everyone()
        deadline = time.monotonic() + timeout
        while not (found := (path / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        results = gather_object([(found, socket.gethostname())])
        if accelerator.is_main_process:
            (path / name).unlink()
        if missing := sorted({host for found, host in results if not found}):
            raise ValueError(
                f"{path} is not the same folder on all machines: {', '.join(missing)} cannot see the files that the "
                "first machine writes there. Use a folder on a disk that all machines share."
            )


def prepare_model(accelerator: Accelerator, model: OPTSGPreTrainedModel) -> OPTSGPreTrainedModel:
    """Shard the model if accelerate is configured for FSDP2. Called before the optimizer is made.

    Raises:
        ValueError: The configuration of accelerate is not supported.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("FSDP1 is not supported; set fsdp_version: 2 in accelerate's configuration.")
        if plugin.activation_checkpointing:
            raise ValueError("Give --gradient_checkpointing True instead of fsdp_activation_checkpointing.")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError("Every process builds the model; set fsdp_cpu_ram_efficient_loading: false.")
        offload = {"offload_policy": plugin.cpu_offload} if plugin.cpu_offload else {}
        # It looks for classes by names that sharding has changed.
        plugin.auto_wrap_policy = None
        shard_model(model, bool(plugin.reshard_after_forward), **offload)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage > 2:
            raise ValueError("DeepSpeed is supported up to stage 2; use FSDP2 to shard the weights as well.")
    return model


def prepare_training(
    accelerator: Accelerator,
    model: OPTSGPreTrainedModel,
    optimizer: torch.optim.Optimizer,
    *,
    micro_batch_size: int,
    max_grad_norm: float,
    mixed_precision: str,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Call `accelerator.prepare` for a model and its optimizer.

    Args:
        accelerator: The accelerator.
        model: From [`prepare_model`].
        optimizer: Its optimizer.
        micro_batch_size: Maximum number of examples per forward pass.
        max_grad_norm: Maximum norm of the gradient, which DeepSpeed applies itself.
        mixed_precision: From [`make_accelerator`].

    Returns:
        The wrapped model and the wrapped optimizer.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            # More steps would divide the loss by their number, but the losses are already weighted.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            # As with the other strategies, weights keep 32 bits and autocast chooses per operation.
            "torch_autocast": {"enabled": mixed_precision == "bf16", "dtype": "bfloat16"},
        }
    parameters = [list(group["params"]) for group in optimizer.param_groups]
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        # accelerate identifies parameters by their memory address, which empty shards do not have.
        for group, own in zip(optimizer.param_groups, parameters):
            group["params"] = own
    return wrapped, prepared


def shard_model(model: OPTSGPreTrainedModel, reshard_after_forward: bool = True, **kwargs: object) -> FSDPModule:
    """Shard the parameters of a model among processes, in place.

    Each transformer layer, and each layer of the towers, is a group of its own. All other parameters are one group,
    which stays gathered during a step because the output layer reads the token embeddings. (accelerate would make two
    groups of these.)

    Args:
        model: The model, before its optimizer is made.
        reshard_after_forward: Free gathered parameters after the forward pass.
        kwargs: Other arguments of [`fully_shard`].

    Raises:
        ValueError: A parameter is a scalar.
    """
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise ValueError(f"Scalar parameters cannot be sharded: {', '.join(scalars)}.")
    towers = (getattr(model.model, f"{half}_tower") for half in HALVES)
    layers = {TransformerLayer.__name__}.union(*(t._no_split_modules or () for t in towers if t is not None))
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=reshard_after_forward, **kwargs)
    return fully_shard(model, **kwargs)


def full_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state with unsharded tensors, in every process. All processes call this."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
