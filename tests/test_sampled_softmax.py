"""Softmax over a sample of the tokens."""

import torch


@torch.no_grad()
def test_sampled_tokens_stand_for_the_whole_vocabulary(make_model):
    model = make_model(num_sampled_tokens=60).train()
    hidden_states, targets = torch.randn(5, 16), torch.tensor([7, 3, 7, 200, 12])
    full = torch.nn.functional.linear(hidden_states, model.tag_decoder.token_embeddings.weight, model.lm_head.bias)
    sums = []
    for _ in range(600):
        logits, columns, tokens = model._token_logits(hidden_states, targets)
        assert logits.shape == (5, 4 + 60) and len(tokens.unique()) == 64
        assert torch.equal(tokens[columns], targets)
        target_logits = logits[torch.arange(5), columns]
        torch.testing.assert_close(target_logits, full[torch.arange(5), targets], rtol=1e-4, atol=1e-5)
        sums.append(logits.exp().sum(dim=1))
    ratio = torch.stack(sums).mean(dim=0) / full.exp().sum(dim=1)
    torch.testing.assert_close(ratio, torch.ones(5), atol=0.05, rtol=0)


@torch.no_grad()
def test_evaluation_computes_all_tokens(make_model):
    model = make_model(num_sampled_tokens=60)
    hidden_states, targets = torch.randn(5, 16), torch.tensor([7, 3, 7, 200, 12])
    logits, columns, tokens = model._token_logits(hidden_states, targets)
    assert logits.shape == (5, model.config.tag_vocab_size) and tokens is None and torch.equal(columns, targets)
