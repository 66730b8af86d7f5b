"""Starts the tag decoder's token embeddings from what the text tower makes of each token."""

import torch


@torch.no_grad()
def initialize_token_embeddings(model, processor, scale: float, batch_size: int = 256) -> None:
    """Gives tokens that mean alike embeddings that look alike, so that a rare one is found from its neighbours.

    The embeddings are also the output layer's weights: a token seen twice in training already stands where the text
    tower puts it. Features are centred and reduced to the model's width by PCA, with the components' standard
    deviations drawn half-way (in logarithms) to equal ones, so that a few strong components do not decide alone.

    Args:
        model: an [`OPTSGForTagGeneration`] in evaluation mode; processor: its [`OPTSGProcessor`].
        scale: standard deviation of the embeddings' entries. Special tokens and pieces of characters stay random.
    """
    weight = model.tag_decoder.token_embeddings.weight
    texts = token_texts(processor.tag_tokenizer)
    known = [token for token, text in enumerate(texts) if text is not None]
    features = []
    for start in range(0, len(known), batch_size):
        batch = processor.tokenizer(
            [texts[token] for token in known[start : start + batch_size]],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(weight.device)
        features.append(model.model.embed_tags(batch["input_ids"], batch["attention_mask"]))
    features = torch.cat(features)
    centred = features - features.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(centred, full_matrices=False)
    width = min(weight.shape[1], len(deviations))
    reduced = centred @ (directions[:width] / deviations[:width, None].clamp(min=1e-6).sqrt()).T
    embeddings = torch.randn_like(weight)
    embeddings[known] = torch.nn.functional.pad(reduced / reduced.std(), (0, weight.shape[1] - width))
    weight.copy_(embeddings * scale)


def token_texts(tag_tokenizer) -> list[str | None]:
    """The text of every token, `None` for special tokens and for pieces of characters."""
    special = set(tag_tokenizer.all_special_ids)
    texts = [tag_tokenizer.decode([token]).strip() for token in range(len(tag_tokenizer))]
    return [
        None if token in special or not text or "\N{REPLACEMENT CHARACTER}" in text else text
        for token, text in enumerate(texts)
    ]
