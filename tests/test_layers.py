"""The transformer layer against torch's own."""

import pytest
import torch
from torch import nn

from modeling_optsg.layers import TransformerLayer


def copy_weights(layer, reference):
    """Copies the weights of a layer into a layer of torch."""
    attentions = {"self_attn": layer.self_attention}
    norms = [layer.self_norm, layer.feed_forward_norm]
    if hasattr(layer, "cross_attention"):
        attentions["multihead_attn"] = layer.cross_attention
        norms.insert(1, layer.cross_norm)
    for name, attention in attentions.items():
        target = getattr(reference, name)
        for kind in ("weight", "bias"):
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            joined = torch.cat([getattr(projection, kind) for projection in projections])
            getattr(target, f"in_proj_{kind}").data.copy_(joined)
        target.out_proj.load_state_dict(attention.out_proj.state_dict())
    for number, norm in enumerate(norms, start=1):
        getattr(reference, f"norm{number}").load_state_dict(norm.state_dict())
    reference.linear1.load_state_dict(layer.feed_forward[0].state_dict())
    reference.linear2.load_state_dict(layer.feed_forward[2].state_dict())
    return reference.eval()


@torch.no_grad()
@pytest.mark.parametrize("cross_attention", [False, True])
def test_a_layer_equals_the_pre_norm_layer_of_torch(make_model, cross_attention):
    torch.manual_seed(0)
    layer = TransformerLayer(make_model().config, cross_attention).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer_class = nn.TransformerDecoderLayer if cross_attention else nn.TransformerEncoderLayer
    reference = copy_weights(layer, layer_class(16, 2, 32, activation="gelu", batch_first=True, norm_first=True))
    hidden_states, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask, memory_mask = torch.ones(5, 5).tril().bool(), torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool()
    if cross_attention:
        actual, _ = layer(hidden_states, mask, memory, memory_mask[:, None, None])
        expected = reference(hidden_states, memory, ~mask, memory_key_padding_mask=~memory_mask)
    else:
        actual, _ = layer(hidden_states, mask)
        expected = reference(hidden_states, ~mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
