"""Settings of `generate`: checks, values per decoding, and `generation_config`."""

import json
import math
import warnings

import pytest
import torch
from reference_search import TAG_VOCAB_SIZE, make_slot_inputs, make_slot_model
from transformers import GenerationConfig

from modeling_optsg import OPTSGForTagGeneration


@pytest.fixture(scope="module")
def model(make_model):
    return make_slot_model(make_model)


@pytest.fixture(scope="module")
def inputs():
    return make_slot_inputs()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": "serial"}, "decoding='serial' must be one of"),
        ({"threshold": 1.5}, "threshold=1.5 .* between 0 and 1"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": math.nan}, "threshold=nan must be a finite number"),
        ({"threshold": "0.5"}, "threshold='0.5'"),
        ({"threshold": {"paralel": 0.5}}, "paralel"),
        ({"threshold": {"parallel": 2.0}}, "threshold=2.0"),
        ({"pad_bias": math.nan}, "pad_bias=nan"),
        ({"pad_bias": "-1"}, "pad_bias='-1'"),
        ({"max_tags": 0}, "max_tags=0 must be an integer of at least 1"),
        ({"max_tags": -1}, "max_tags=-1"),
        ({"max_tags": 1.5}, "max_tags=1.5"),
        ({"max_tags": True}, "max_tags=True must be an integer"),
        ({"num_candidates": True}, "num_candidates=True must be an integer"),
        ({"threshold": {"image+title": 0.5, 5: 0.5}}, r"threshold has the keys \['image\+title', 5\]"),
        ({"tag_vocabulary": 5}, "tag_vocabulary is of type int; expected the token ids"),
        ({"tag_vocabulary": {"dog": 1}}, "tag_vocabulary is of type dict"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 1.5}, "num_beams=1.5"),
        ({"num_beams": TAG_VOCAB_SIZE + 1}, "num_beams=13 exceeds tag_vocab_size=12"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 and do_sample=True"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences=0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"min_beam_probability": -0.1}, r"min_beam_probability=-0.1 must lie in \[0, 1\)"),
        ({"min_beam_probability": 1.0}, "min_beam_probability=1.0"),
        ({"min_beam_probability": math.nan}, "min_beam_probability=nan"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_k": -1, "do_sample": True}, "top_k"),
        ({"top_p": -0.5, "do_sample": True}, "top_p"),
        ({"numbeams": 2}, r"unknown settings \['numbeams'\]"),
        ({"labels": torch.ones(4, 1)}, "labels"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"eos_token_id": 5}, "eos_token_id"),
    ],
)
def test_a_bad_setting_is_reported(model, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **settings)


def test_a_setting_of_one_decoding_does_not_affect_the_other(model, inputs):
    settings = {"threshold": {"parallel": 0.0, "sequential": 1.0}, "pad_bias": {"parallel": -9.0, "sequential": 9.0}}
    config = GenerationConfig(**settings)
    assert model.generate(**inputs, generation_config=config, decoding="parallel").slots.ge(0).any()
    assert model.generate(**inputs, generation_config=config, decoding="sequential").slots.eq(-1).all()
    assert config.threshold == settings["threshold"], "the caller's object is unchanged"


def test_generation_config_is_saved_and_loaded(model, inputs, tmp_path, monkeypatch):
    settings = {
        "threshold": {"parallel": 0.002, "sequential": 0.001},
        "pad_bias": {"parallel": -1.0, "sequential": -2.0},
        "decoding": "sequential",
        "max_tags": 3,
        "num_beams": 2,
    }
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**settings))
    model.save_pretrained(tmp_path)
    assert settings.items() <= json.loads((tmp_path / "generation_config.json").read_text()).items()
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path)
    arguments = settings | {"threshold": 0.001, "pad_bias": -2.0}
    expected = model.generate(**inputs, **arguments, generation_config=GenerationConfig())
    for outputs in (model.generate(**inputs), loaded.generate(**inputs)):
        assert torch.equal(outputs.sequences, expected.sequences)
        assert torch.equal(outputs.tag_scores, expected.tag_scores)
    assert loaded.generate(**inputs, max_tags=1, num_beams=1).sequences.shape[1] == 1, "arguments override it"


def test_sampling_settings_without_do_sample_have_no_effect(model, inputs):
    expected = model.generate(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model.generate(**inputs, temperature=9.0, top_k=1, top_p=0.1)
    assert torch.equal(outputs.sequences, expected.sequences) and torch.equal(outputs.tag_scores, expected.tag_scores)
