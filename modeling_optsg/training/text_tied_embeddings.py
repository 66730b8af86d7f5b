"""Where tags begin: tokens and classes stand where the text tower puts their texts, and move together."""

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.initialization import no_init_weights


class TextTiedEmbedding(nn.Module):
    """An embedding table in training: a learned projection of fixed text features, and an offset of each row's own.

    What is learned of one token moves all that mean alike; a rare one is found from its neighbours. A parametrization
    of `torch.nn.utils.parametrize`: the table itself holds the offsets, and [`plain_copy`] makes it a plain one.

    Args:
        features: `[rows, text width]`; zero for a row without text.
        projection: `[text width, width]`, where it begins.
        normalize: whether projected features are made unit vectors, so that no text counts for more than another.
    """

    def __init__(self, features: torch.Tensor, projection: torch.Tensor, normalize: bool = False):
        super().__init__()
        self.register_buffer("features", features)
        self.projection = nn.Parameter(projection.clone())
        self.normalize = normalize

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        projected = (self.features @ self.projection).to(offsets.dtype)
        return offsets + (F.normalize(projected, dim=-1) if self.normalize else projected)


def text_directions(features: torch.Tensor, width: int) -> torch.Tensor:
    """A projection `[text width, width]` of centred features `[texts, text width]` onto their principal components.

    The components' standard deviations are drawn half-way (in logarithms) to equal ones, so that a few strong
    components do not decide alone; projected features have entries of about one.
    """
    _, deviations, directions = torch.linalg.svd(features, full_matrices=False)
    # Beyond the rank of the features there is only rounding, which the division would blow up.
    found = min(width, int((deviations > 1e-4 * deviations[0]).sum()))
    projection = (directions[:found] / deviations[:found, None].sqrt()).T
    projection = projection / (features @ projection).std()
    return F.pad(projection, (0, width - found))


@torch.no_grad()
def tie_tokens_to_text(model, processor, scale: float, batch_size: int = 256) -> None:
    """Ties a model's token embeddings to what the text tower makes of each token; they are also the output layer's
    weights.

    Args:
        model: one with a `tag_decoder`, in evaluation mode; processor: its [`OPTSGProcessor`].
        scale: standard deviation of the embeddings' entries. Special tokens and pieces of characters stay random.
    """
    embedding = model.tag_decoder.token_embeddings
    texts = token_texts(processor.tag_tokenizer)
    known = [token for token, text in enumerate(texts) if text is not None]
    found = []
    for start in range(0, len(known), batch_size):
        batch = processor.tokenizer(
            [texts[token] for token in known[start : start + batch_size]],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(embedding.weight.device)
        found.append(model.model.embed_tags(batch["input_ids"], batch["attention_mask"]))
    found = torch.cat(found)
    found = found - found.mean(dim=0)
    projection = text_directions(found, embedding.embedding_dim)
    features = found.new_zeros(embedding.num_embeddings, found.shape[1])
    features[known] = found
    offsets = torch.randn_like(embedding.weight) * scale
    offsets[known] = 0.0
    embedding.weight.copy_(offsets)
    parametrize.register_parametrization(embedding, "weight", TextTiedEmbedding(features, projection * scale))


@torch.no_grad()
def tie_classes_to_text(model, features: torch.Tensor, begin_title: bool = True) -> None:
    """Ties the weights of a model's classes, one a train tag, to the tags' text-tower features `[tags, text width]`,
    and begins the title's way into the example's summary with the same projection: an example begins near the tags that say
    what its title says (not with `begin_title=False`, where the model has learned one). Classes beyond the tags have
    no text."""
    classifier = model.classifier if hasattr(model, "classifier") else model.tag_classifier.classifier
    width = classifier.class_embeddings.embedding_dim
    features = features.float().to(classifier.bias.device)
    features = F.layer_norm(features - features.mean(dim=0), features.shape[1:])
    # A random projection keeps angles, and at first that is all there is to keep.
    projection = torch.randn(features.shape[1], width).to(features) * features.shape[1] ** -0.5
    others = classifier.class_embeddings.num_embeddings - len(features)
    classifier.class_embeddings.weight.zero_()
    tie = TextTiedEmbedding(F.pad(features, (0, 0, 0, others)), projection, normalize=True)
    parametrize.register_parametrization(classifier.class_embeddings, "weight", tie)
    encoder = model.model.multimodal_encoder
    summary = encoder.prompt_pooler if encoder.classifier_pooler is None else encoder.classifier_pooler
    if summary is not None and begin_title:
        summary.title_projection.weight.copy_(projection.T)


@torch.no_grad()
def plain_copy(model, state_dict: dict[str, torch.Tensor] | None = None):
    """A copy of a model as it is saved and as it writes: tied weights have become plain ones.

    Args:
        state_dict: the model's, where its own is divided among processes.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Embedding) and parametrize.is_parametrized(module)):
            continue
        prefix = f"{name}.parametrizations.weight."
        own = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        offsets = own.pop("original")
        own = {key.removeprefix("0."): tensor for key, tensor in own.items()}
        state_dict[f"{name}.weight"] = functional_call(module.parametrizations.weight[0], own, (offsets,))
    # What is drawn here is overwritten, and is not to change what the training draws next.
    with torch.random.fork_rng(devices=[]), no_init_weights():
        copied = type(model)(copy.deepcopy(model.config))
    copied.tie_weights()
    tied = copied.all_tied_weights_keys
    copied.load_state_dict({name: tensor for name, tensor in state_dict.items() if name not in tied}, strict=False)
    if lacking := copied.state_dict().keys() - state_dict.keys():
        raise ValueError(f"The state lacks {', '.join(sorted(lacking)[:5])}.")
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied.to(next(iter(state_dict.values())).device).train(model.training)


def token_texts(tag_tokenizer) -> list[str | None]:
    """The text of every token, `None` for special tokens and for pieces of characters."""
    special = set(tag_tokenizer.all_special_ids)
    texts = [tag_tokenizer.decode([token]).strip() for token in range(len(tag_tokenizer))]
    return [
        None if token in special or not text or "\N{REPLACEMENT CHARACTER}" in text else text
        for token, text in enumerate(texts)
    ]
