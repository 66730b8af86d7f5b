"""Text-initialised token and class embeddings.

In training, token embeddings are re-parametrised as a projection of text features plus an offset. A token and its
synonyms are therefore updated together, and rare tags benefit from frequent ones. Saved checkpoints have plain
embedding tables ([`copy_without_text_tying`]).
"""

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from modeling_optsg.base_models import OPTSGPreTrainedModel
from modeling_optsg.processing_optsg import OPTSGProcessor

from .lora import copy_adapters, merge_adapters


class TextTiedEmbedding(nn.Module):
    """Parametrization of an embedding table as a projection of fixed text features plus an offset per row.

    For `torch.nn.utils.parametrize`: the table holds the offsets.

    Args:
        features: Text features `[rows, text width]`; zero for a row without text.
        projection: Initial projection `[text width, width]`.
    """

    def __init__(self, features: torch.Tensor, projection: torch.Tensor):
        super().__init__()
        self.register_buffer("features", features)
        self.projection = nn.Parameter(projection.clone())

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        """Return the embedding table `[rows, width]` for offsets of the same shape."""
        return offsets + (self.features @ self.projection).to(offsets.dtype)


def text_directions(features: torch.Tensor, width: int) -> torch.Tensor:
    """Return a projection of centred features onto their principal components.

    The standard deviations of the components are replaced by their square roots, so that a few strong components do
    not dominate. The projected features have a standard deviation of 1.

    Args:
        features: Centred features `[texts, text width]`.
        width: Number of components. Those beyond the rank of the features are zero.

    Returns:
        The projection `[text width, width]`.
    """
    _, deviations, directions = torch.linalg.svd(features, full_matrices=False)
    # Components beyond the rank contain rounding errors, which the division would magnify.
    rank = min(width, int((deviations > 1e-4 * deviations[0]).sum()))
    projection = (directions[:rank] / deviations[:rank, None].sqrt()).T
    projection = projection / (features @ projection).std()
    return F.pad(projection, (0, width - rank))


@torch.no_grad()
def tie_tokens_to_text(
    model: OPTSGPreTrainedModel, processor: OPTSGProcessor, init_std: float, batch_size: int = 256
) -> None:
    """Tie the token embeddings, which are also the output layer's weights, to the text features of each token.

    Args:
        model: A model with a `tag_decoder`, in evaluation mode.
        processor: Its processor.
        init_std: Standard deviation of the embeddings. Special tokens, parts of characters and texts that the text
            tower does not know get random ones.
        batch_size: Number of texts per forward pass of the text tower.
    """
    embedding = model.tag_decoder.token_embeddings
    texts = token_texts(processor.tag_tokenizer)
    tokens = [token for token, text in enumerate(texts) if text is not None and _is_known(text, processor.tokenizer)]
    offsets = torch.randn_like(embedding.weight) * init_std
    if len(tokens) < 2:
        embedding.weight.copy_(offsets)
        return
    features = []
    for start in range(0, len(tokens), batch_size):
        batch = processor.tokenizer(
            [texts[token] for token in tokens[start : start + batch_size]],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(embedding.weight.device)
        features.append(model.model.embed_tags(batch["input_ids"], batch["attention_mask"]))
    features = torch.cat(features)
    features = features - features.mean(dim=0)
    projection = text_directions(features, embedding.embedding_dim)
    table = features.new_zeros(embedding.num_embeddings, features.shape[1])
    table[tokens] = features
    offsets[tokens] = 0.0
    embedding.weight.copy_(offsets)
    parametrize.register_parametrization(embedding, "weight", TextTiedEmbedding(table, projection * init_std))


def _is_known(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a text contains more than unknown tokens. All unknown texts have the same features."""
    ids = set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return not ids <= {tokenizer.unk_token_id}


def class_embeddings(model: OPTSGPreTrainedModel) -> nn.Linear | None:
    """Return the layer with the embeddings of the training tags that a model compares with, or `None`."""
    heads = (getattr(model, "tag_classifier", None), getattr(model, "classifier", None))
    return next((head.class_embeddings for head in heads if hasattr(head, "class_embeddings")), None)


@torch.no_grad()
def initialize_classes_from_text(model: OPTSGPreTrainedModel, features: torch.Tensor, init_title: bool = True) -> None:
    """Initialise the class embeddings, one per training tag, from the text features of the tags.

    Args:
        model: A model with class embeddings.
        features: Text features `[tags, text width]`. Classes beyond them start at zero.
        init_title: Initialise the title projection of the evidence pooler with the same projection, so that an example
            starts near the tags that resemble its title. `False` for a model that has already learned one.
    """
    embeddings = class_embeddings(model)
    features = features.float().to(embeddings.weight.device)
    features = F.layer_norm(features - features.mean(dim=0), features.shape[1:])
    # A random projection preserves angles. It is the same for all models, so that they can share an image warm-up.
    shape, generator = (features.shape[1], embeddings.in_features), torch.Generator().manual_seed(0)
    projection = torch.randn(shape, generator=generator).to(features) * features.shape[1] ** -0.5
    embeddings.weight.zero_()
    embeddings.weight[: len(features)] = F.normalize(features @ projection, dim=-1)
    pooler = model.model.multimodal_encoder.evidence_pooler
    if pooler is not None and init_title:
        pooler.title_projection.weight.copy_(projection.T)


@torch.no_grad()
def copy_without_text_tying(
    model: OPTSGPreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None
) -> OPTSGPreTrainedModel:
    """Return a copy of a model with plain embedding tables and merged adapters, as it is saved and validated.

    Args:
        model: The model.
        state_dict: Its full state. Default: `model.state_dict()`, which is not full if the model is sharded.

    Raises:
        ValueError: The state is incomplete.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Embedding) and parametrize.is_parametrized(module)):
            continue
        prefix = f"{name}.parametrizations.weight."
        tied = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        offsets = tied.pop("original")
        tied = {key.removeprefix("0."): tensor for key, tensor in tied.items()}
        state_dict[f"{name}.weight"] = functional_call(module.parametrizations.weight[0], tied, (offsets,))
    # Random initial weights are overwritten, and must not change the random state of the training.
    with torch.random.fork_rng(devices=[]), no_init_weights():
        copied = type(model)(copy.deepcopy(model.config))
        copy_adapters(model, copied)
    copied.tie_weights()
    shared = copied.all_tied_weights_keys
    copied.load_state_dict({name: tensor for name, tensor in state_dict.items() if name not in shared}, strict=False)
    if missing := copied.state_dict().keys() - state_dict.keys():
        raise ValueError(f"The state lacks {', '.join(sorted(missing)[:5])}.")
    copied.generation_config = copy.deepcopy(model.generation_config)
    copied.to(next(iter(state_dict.values())).device).train(model.training)
    merge_adapters(copied)
    return copied


def token_texts(tag_tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Return the text of every token; `None` for special tokens and for parts of characters."""
    special = set(tag_tokenizer.all_special_ids)
    texts = [tag_tokenizer.decode([token]).strip() for token in range(len(tag_tokenizer))]
    return [
        None if token in special or not text or "\N{REPLACEMENT CHARACTER}" in text else text
        for token, text in enumerate(texts)
    ]
