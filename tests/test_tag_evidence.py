"""Evidence for tags: title and image stand alone, and familiarity tells how like the training images an image is."""

import copy

import pytest
import torch

from modeling_optsg import OPTSGConfig
from modeling_optsg.tag_evidence import EvidencePooler, ImageStandardizer

TEXT_SIZE, IMAGE_SIZE = 16, 200
HAS = torch.tensor([True, True, True])
HAS_NOT = torch.tensor([False, False, False])


def pool(pooler, images, has_image, titles, has_title):
    """Compute the evidence of images of one frame with one token, and of titles of one token."""
    tokens = [images[:, None], titles[:, None]]
    return pooler(images, tokens, [has_image[:, None], has_title[:, None]])


@pytest.fixture(scope="module")
def config(tower_configs):
    return OPTSGConfig(
        text_config=copy.deepcopy(tower_configs["bert"]),
        frame_feature_size=IMAGE_SIZE,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        num_tag_classes=3,
    )


@pytest.fixture(scope="module")
def pooler(config):
    torch.manual_seed(0)
    pooler = EvidencePooler(config).eval()
    torch.nn.init.normal_(pooler.attention_pooler.query)
    # The attention pooler has tests of its own below.
    return without_attention(pooler)


def without_attention(pooler):
    pooler = copy.deepcopy(pooler)
    pooler.attention_weight.data.zero_()
    return pooler


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(1)
    return torch.randn(3, IMAGE_SIZE), torch.randn(3, TEXT_SIZE)


# Evidence


@torch.no_grad()
@pytest.mark.parametrize("filler", [0.0, 7.0])
def test_title_and_image_alone_do_not_depend_on_each_other(pooler, features, filler):
    images, titles = features
    both = pool(pooler, images, HAS, titles, HAS)
    title_alone = pool(pooler, torch.full_like(images, filler), HAS_NOT, titles, HAS)
    image_alone = pool(pooler, images, HAS, torch.full_like(titles, filler), HAS_NOT)
    for name, alone in (("title_vectors", title_alone), ("image_vectors", image_alone)):
        torch.testing.assert_close(alone.vectors, getattr(both, name))
        torch.testing.assert_close(getattr(alone, name), getattr(both, name))
    assert not torch.allclose(both.vectors, both.title_vectors, atol=0.1)
    assert torch.equal(pooler.title_vectors(titles), both.title_vectors)


@torch.no_grad()
def test_a_closed_gate_leaves_the_title_alone(pooler, features):
    closed = copy.deepcopy(pooler)
    closed.gate_outer.bias.fill_(-1e4)
    images, titles = features
    has_image = torch.tensor([True, True, False])
    has_title = torch.tensor([True, False, True])
    found, trusted = (pool(part, images, has_image, titles, has_title) for part in (closed, pooler))
    assert found.image_gate.eq(0).all() and trusted.image_gate.gt(0.4).all()
    torch.testing.assert_close(found.vectors[0], found.title_vectors[0])
    assert not torch.allclose(found.vectors[0], trusted.vectors[0], atol=0.1)
    # Without both, the gate has no effect.
    torch.testing.assert_close(found.vectors[1:], trusted.vectors[1:])
    torch.testing.assert_close(found.vectors[1], found.image_vectors[1])


@torch.no_grad()
def test_without_trust_only_the_title_counts(pooler, features):
    images, titles = features
    closed = copy.deepcopy(pooler)
    closed.gate_outer.bias.fill_(-1e4)
    evidence = pool(closed, images, HAS, titles, HAS)
    torch.testing.assert_close(evidence.vectors, evidence.title_vectors)
    opened = copy.deepcopy(pooler)
    opened.gate_outer.bias.fill_(1e4)
    assert not torch.allclose(pool(opened, images, HAS, titles, HAS).vectors, evidence.vectors, atol=0.1)


@torch.no_grad()
def test_a_title_is_read_in_the_style_of_its_image(pooler, features):
    """The share of the image itself is the same for two titles, that of the style is not."""
    images, titles = features
    opened = copy.deepcopy(pooler)
    opened.gate_outer.weight.zero_()
    opened.gate_outer.bias.fill_(1e4)
    opened.log_image_weight.fill_(-1e4)
    style = torch.nn.functional.gelu(opened.style(opened.standardizer(images)))
    evidence = pool(opened, images, HAS, titles, HAS)
    torch.testing.assert_close(evidence.vectors, opened.title_vectors(titles, style))
    assert not torch.allclose(evidence.vectors, evidence.title_vectors, atol=0.05)


# Attention


@torch.no_grad()
def test_the_attention_pooler_reads_visible_tokens_only(config, features):
    torch.manual_seed(2)
    pooler = EvidencePooler(config).eval()
    torch.nn.init.normal_(pooler.attention_pooler.query)
    pooler.attention_weight.fill_(1.0)
    images, titles = features
    opened, closed = copy.deepcopy(pooler), copy.deepcopy(pooler)
    opened.gate_outer.bias.fill_(1e4)
    closed.gate_outer.bias.fill_(-1e4)
    with_image, ignored = (pool(part, images, HAS, titles, HAS) for part in (opened, closed))
    alone = pool(opened, images, HAS_NOT, titles, HAS)
    # Frames of an ignored image are hidden.
    torch.testing.assert_close(ignored.vectors, alone.vectors)
    assert not torch.allclose(with_image.vectors, alone.vectors, atol=0.1)
    attended = alone.vectors - alone.title_vectors
    torch.testing.assert_close(attended, opened.attention_pooler([None, titles[:, None]], [None, HAS[:, None]]))
    # The order of tokens does not matter, their content does.
    tokens = torch.randn(3, 4, TEXT_SIZE)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    first = opened.attention_pooler([None, tokens], [None, mask])
    torch.testing.assert_close(opened.attention_pooler([None, tokens.flip(1)], [None, mask.flip(1)]), first)
    tokens[~mask] = 9.0
    torch.testing.assert_close(opened.attention_pooler([None, tokens], [None, mask]), first)
    tokens[0, 1] = 9.0
    assert not torch.allclose(opened.attention_pooler([None, tokens], [None, mask])[0], first[0], atol=1e-3)


# Familiarity


def draw_images(number, mixing, seed):
    """Draw images that vary in a few directions only, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, len(mixing), generator=generator) @ mixing
    return 5 + images + 0.05 * torch.randn(images.shape, generator=generator)


@pytest.fixture(scope="module")
def mixing():
    return torch.randn(10, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))


def test_before_fitting_every_image_is_familiar(config):
    standardizer = ImageStandardizer(config)
    images = 1e3 * torch.randn(4, IMAGE_SIZE)
    assert standardizer.familiarity(images).eq(1).all()


def test_training_images_are_familiar_and_others_are_not(config, mixing):
    standardizer = ImageStandardizer(config)
    images = draw_images(1000, mixing, 0)
    standardizer.fit(images)
    standardized = standardizer(images)
    torch.testing.assert_close(standardized.mean(dim=0), torch.zeros(IMAGE_SIZE), atol=1e-2, rtol=0)
    torch.testing.assert_close(standardized.std(dim=0), torch.ones(IMAGE_SIZE), atol=1e-2, rtol=0)
    familiar = standardizer.familiarity(images)
    assert familiar.min() > 0.8 and familiar.median() > 0.95
    assert standardizer.familiarity(draw_images(50, mixing, 1)).min() > 0.5, "new images of the kind"
    far = 5 + torch.randn(50, IMAGE_SIZE, generator=torch.Generator().manual_seed(2)) * images.std(dim=0)
    assert standardizer.familiarity(far).max() < 0.01


def test_few_training_images_make_images_of_their_kind_familiar(config, mixing):
    standardizer = ImageStandardizer(config)
    standardizer.fit(draw_images(60, mixing, 0))
    assert standardizer.familiarity(draw_images(50, mixing, 1)).min() > 0.5
    far = 100 * torch.randn(50, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    assert standardizer.familiarity(far).max() < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_equal_training_images_can_be_fitted(config, seed):
    standardizer = ImageStandardizer(config)
    standardizer.fit(torch.randn(1, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed)).repeat(3, 1))
    assert all(buffer.isfinite().all() for buffer in standardizer.buffers())
    images = torch.randn(4, IMAGE_SIZE, requires_grad=True)
    familiarity = standardizer.familiarity(images)
    assert ((familiarity >= 0) & (familiarity <= 1)).all()


def test_an_image_at_half_distance_is_half_familiar(config, mixing):
    standardizer = ImageStandardizer(config)
    standardizer.fit(draw_images(1000, mixing, 0))
    direction = torch.randn(1, IMAGE_SIZE, generator=torch.Generator().manual_seed(4))
    distance = standardizer.distances(direction)
    halfway = direction * (standardizer.half_familiar_distance / distance).sqrt()

    def familiarity(standardized):
        return standardizer.familiarity(standardized * standardizer.scale + standardizer.mean).item()

    assert familiarity(halfway) == pytest.approx(0.5, abs=1e-3)
    # The distance is squared: twice the deviation is four times the distance.
    assert familiarity(2 * halfway) == pytest.approx(1 / (1 + 4**4), rel=1e-2)


def test_standardized_features_are_clipped(config, mixing):
    standardizer = ImageStandardizer(config)
    standardizer.fit(draw_images(100, mixing, 0))
    assert standardizer(torch.full((1, IMAGE_SIZE), 1e6)).eq(5).all()
