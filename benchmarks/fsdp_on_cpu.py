r"""Divides a tiny model among two processes (FSDP2 on gloo, no accelerator) and trains it beside one that is whole.

    python -m torch.distributed.run --nproc_per_node 2 benchmarks/fsdp_on_cpu.py

Checks what a CPU can: that `TransformerLayer`, the wrapping unit of `examples/accelerate/fsdp_8.yaml`, can be divided,
that losses over ten steps are those of the whole model, and that the weights gathered at the end are too. `accelerate`
itself needs an accelerator for FSDP, so its own path is not run.
"""

import copy
import json

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig

from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration
from modeling_optsg.transformer import TransformerLayer

STEPS = 10


def make() -> OPTSGForTagGeneration:
    torch.manual_seed(0)
    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    config = OPTSGConfig(
        text_config=text, frame_feature_size=8, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        num_prompts=4, tag_vocab_size=50, max_tag_tokens=4, dropout=0.0, attention_dropout=0.0, modality_dropout=0.0,
        parallel_share=1.0, num_encoder_layers=1, num_prompt_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    return OPTSGForTagGeneration(config).train()


def batch() -> dict[str, torch.Tensor]:
    return {
        "frame_features": torch.randn(8, 3, 8),
        "tag_input_ids": torch.randint(2, 50, (10, 3)),
        "tag_lengths": torch.randint(1, 4, (10,)),
        "tag_features": torch.randn(10, 16),
        "labels": torch.stack([torch.randperm(10)[:3] for _ in range(8)]),
    }


def main() -> None:
    dist.init_process_group("gloo")
    whole = make()
    divided = copy.deepcopy(whole)
    for module in divided.modules():
        if isinstance(module, TransformerLayer):
            fully_shard(module)
    fully_shard(divided)
    layer = next(module for module in divided.modules() if isinstance(module, TransformerLayer))
    local = sum(parameter.to_local().numel() for parameter in layer.parameters())
    share = local / sum(parameter.numel() for parameter in layer.parameters())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (whole, divided)]
    difference = 0.0
    for step in range(STEPS):
        torch.manual_seed(step)
        items = batch()
        losses = []
        for model, optimizer in zip((whole, divided), optimizers):
            loss = model(**items, decoding="parallel").loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        difference = max(difference, abs(losses[1] / losses[0] - 1))
    state = get_model_state_dict(divided, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        weights = max((state[name] - tensor).abs().max().item() for name, tensor in whole.state_dict().items())
        print(json.dumps({"share_of_a_layer": share, "losses": difference, "weights": weights}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
