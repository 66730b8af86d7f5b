"""Tag alignment: the matching against all permutations, and the loss against its definition."""

import itertools
import math

import pytest
import torch

from modeling_optsg.tag_alignment import match_prompts_to_tags

NUM_PROMPTS = 5


@pytest.fixture(scope="module")
def alignment(make_model):
    torch.manual_seed(0)
    return make_model(None, frame_feature_size=6, num_prompts=NUM_PROMPTS, no_object_weight=0.3).tag_alignment


def best_total(similarity, tags):
    """Returns the largest total similarity of all one-to-one assignments of the padded tags to the prompts."""
    padded = [*tags, *[similarity.shape[1] - 1] * (len(similarity) - len(tags))]
    return max(
        sum(similarity[prompt, column].item() for prompt, column in enumerate(order))
        for order in set(itertools.permutations(padded))
    )


def total(similarity, assignment):
    # The last column, -1, is [PAD].
    return sum(similarity[prompt, tag].item() for prompt, tag in enumerate(assignment.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_the_matching_equals_the_best_permutation(seed):
    torch.manual_seed(seed)
    similarity = torch.randn(6, NUM_PROMPTS, 8) * 3
    # The similarity to [PAD] differs between prompts; without it the matching would be another.
    similarity[..., -1] += torch.randn(6, NUM_PROMPTS) * 5
    labels = torch.full((6, NUM_PROMPTS), -100)
    for example in range(6):
        labels[example, :example] = torch.randperm(7)[:example]
    assignment = match_prompts_to_tags(similarity, labels)
    for example in range(6):
        tags = labels[example, :example].tolist()
        assert sorted(tag for tag in assignment[example].tolist() if tag >= 0) == sorted(tags)
        assert total(similarity[example], assignment[example]) == pytest.approx(
            best_total(similarity[example], tags), abs=1e-4
        )


def test_the_matching_takes_the_similarity_to_pad_into_account():
    """The prompt that is most similar to the tag is even more similar to [PAD]."""
    similarity = torch.tensor([[[5.0, 9.0], [4.0, 0.0]]])
    assert match_prompts_to_tags(similarity, torch.tensor([[0]])).tolist() == [[-1, 0]]


def test_labels_may_have_gaps():
    torch.manual_seed(0)
    similarity = torch.randn(2, NUM_PROMPTS, 7)
    gaps = torch.tensor([[-100, 3, -100, 0, 5], [2, -100, -100, -100, 4]])
    dense = torch.tensor([[3, 0, 5], [2, 4, -100]])
    assert torch.equal(match_prompts_to_tags(similarity, gaps), match_prompts_to_tags(similarity, dense))


def test_as_many_tags_as_prompts_leave_no_pad_slot():
    torch.manual_seed(0)
    labels = torch.randperm(9)[:NUM_PROMPTS][None]
    assignment = match_prompts_to_tags(torch.randn(1, NUM_PROMPTS, 10), labels)
    assert assignment.sort().values.tolist() == labels.sort().values.tolist()


@pytest.mark.parametrize("labels", [torch.full((2, 3), -100), torch.empty(2, 0, dtype=torch.long)])
def test_an_example_without_tags_has_only_pad_slots(labels):
    assert match_prompts_to_tags(torch.randn(2, NUM_PROMPTS, 4), labels).eq(-1).all()


def test_more_tags_than_prompts_are_reported():
    labels = torch.stack([torch.arange(6), torch.full((6,), -100)])
    with pytest.raises(ValueError, match=f"6 tags.*num_prompts={NUM_PROMPTS}"):
        match_prompts_to_tags(torch.randn(2, NUM_PROMPTS, 9), labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_similarities_that_are_not_finite_are_reported(value):
    similarity = torch.zeros(1, NUM_PROMPTS, 4)
    similarity[0, 2, 1] = value
    with pytest.raises(FloatingPointError, match="contain NaN or inf"):
        match_prompts_to_tags(similarity, torch.tensor([[1]]))


@pytest.mark.parametrize("label", [8, 9, 100])
def test_a_label_out_of_range_is_reported(label):
    """Column 8 is [PAD], which is not a candidate tag."""
    with pytest.raises(ValueError, match=f"Label {label} is out of range: there are 8 candidate tags"):
        match_prompts_to_tags(torch.randn(1, NUM_PROMPTS, 9), torch.tensor([[0, label]]))


def test_similarity_is_the_scaled_cosine(alignment):
    prompts, tags = torch.randn(2, NUM_PROMPTS, 16), torch.randn(6, 16)
    similarity = alignment.similarity(prompts, tags)
    candidates = [*alignment.tag_projection(tags), alignment.pad_embedding]
    for example, prompt, column in itertools.product(range(2), range(NUM_PROMPTS), range(7)):
        projected = alignment.prompt_projection(prompts[example, prompt])
        cosine = torch.cosine_similarity(projected, candidates[column], dim=0)
        torch.testing.assert_close(similarity[example, prompt, column], alignment.logit_scale[0].exp() * cosine)
    assert alignment.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_the_logit_scale_is_bounded(alignment):
    before = alignment.logit_scale.item()
    try:
        torch.nn.init.constant_(alignment.logit_scale, 50.0)
        assert alignment.similarity(torch.randn(1, NUM_PROMPTS, 16), torch.randn(3, 16)).abs().max() <= 100.001
    finally:
        torch.nn.init.constant_(alignment.logit_scale, before)


def test_the_loss_is_the_cross_entropy_with_weighted_pad_slots(alignment):
    torch.manual_seed(1)
    prompts, tags = torch.randn(3, NUM_PROMPTS, 16), torch.randn(6, 16)
    labels = torch.tensor([[0, 1, 2], [3, -100, -100], [5, 4, -100]])
    outputs = alignment(prompts, tags, labels)
    assert torch.equal(outputs.assignment, match_prompts_to_tags(outputs.logits, labels))
    losses, weights = [], []
    for example, prompt in itertools.product(range(3), range(NUM_PROMPTS)):
        logits = outputs.logits[example, prompt].tolist()
        tag = outputs.assignment[example, prompt].item()
        losses.append(math.log(sum(math.exp(x) for x in logits)) - logits[tag])
        weights.append(0.3 if tag < 0 else 1.0)
    expected = sum(x * w for x, w in zip(losses, weights)) / sum(weights)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-4)


def test_every_parameter_has_a_gradient(alignment):
    alignment.zero_grad()
    alignment(torch.randn(2, NUM_PROMPTS, 16), torch.randn(4, 16), torch.tensor([[0, 1], [2, -100]])).loss.backward()
    for name, parameter in alignment.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
