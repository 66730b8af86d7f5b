"""Makes a model with random weights that loads in a fraction of a second."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, ViTConfig, ViTImageProcessor

from benchmarks import small_run
from modeling_optsg import OPTSGConfig, OPTSGForTagGeneration, OPTSGProcessor, train_tag_tokenizer

TAGS = {"red": 9, "blue": 7, "colour": 6, "square": 3, "e-mail": 1, "创意美食": 2, "家常菜": 1}
IMAGE_SIZE, NUM_PROMPTS, MAX_TAG_TOKENS, NUM_FRAMES = 32, 4, 8, 4
THRESHOLD = 0.01


def make_model(folder: Path) -> None:
    """Save the model and its processor. It predicts tags for every image.

    Args:
        folder: The new checkpoint.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        small_run.make(Path(temporary), examples=8)
        tokenizer = AutoTokenizer.from_pretrained(Path(temporary, "tower"))
        text_config = BertConfig.from_pretrained(Path(temporary, "tower"))
    tag_tokenizer = train_tag_tokenizer(TAGS, vocab_size=300)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = OPTSGConfig(
        vision_config=ViTConfig(**shape, num_hidden_layers=1, image_size=IMAGE_SIZE, patch_size=16),
        text_config=text_config,
        num_encoder_layers=1,
        num_prompt_layers=1,
        num_prompts=NUM_PROMPTS,
        max_frames=NUM_FRAMES,
        max_tag_tokens=MAX_TAG_TOKENS,
        alignment_size=8,
        tag_vocab_size=len(tag_tokenizer),
        # Wide weights, so that the logits of an untrained model differ.
        initializer_range=0.3,
        **shape,
    )
    model = OPTSGForTagGeneration(config).eval()
    model.set_label_vocabulary([tag_tokenizer(tag)["input_ids"] for tag in TAGS], list(TAGS.values()))
    # Tags come from the classifier alone, because random slots generate unprintable bytes.
    model.generation_config.fusion_weights = [0.0, 1.0, 0.0, 0.0, -20.0]
    model.generation_config.num_candidates = len(TAGS)
    model.generation_config.threshold = THRESHOLD
    model.save_pretrained(folder)
    OPTSGProcessor(
        ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        tag_tokenizer,
        num_frames=NUM_FRAMES,
        num_prompts=NUM_PROMPTS,
        max_tag_tokens=MAX_TAG_TOKENS,
        label_vocabulary=TAGS,
    ).save_pretrained(folder)
    # As in the shipped checkpoint, there is no code.
    for path in folder.glob("*.py"):
        path.unlink()
