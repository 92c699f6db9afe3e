"""Stable Diffusion 3: what no prompt is, and what its folders must be."""

import json

import pytest
import torch

from tests.tiny import tiny_sd3
from wadi.backbones import SD3Backbone, load_backbone, load_prompt_encoder
from wadi.errors import WadiError
from wadi.onestep.loading import load_pipeline


@torch.no_grad()
def test_no_prompt_is_the_empty_one():
    pipeline = tiny_sd3()
    null = SD3Backbone(pipeline).null()
    _, states, _, pooled = pipeline.encode_prompt("a cat", None, None, device="cpu")
    assert torch.equal(null["encoder_hidden_states"], states)
    assert torch.equal(null["pooled_projections"], pooled)


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


BROKEN = {
    "other T5": (
        "transformer/config.json",
        {"joint_attention_dim": 48},
        "width 48 .joint_attention_dim.*give 64",
    ),
    "other pooled": (
        "text_encoder/config.json",
        {"projection_dim": 20},
        "width 40 .pooled_projection_dim.*give 44",
    ),
    "inpainting": ("transformer/config.json", {"in_channels": 33}, "takes 33 channels and gives 16"),
    "other latents": ("vae/config.json", {"latent_channels": 4}, "different models"),
    "no size": ("transformer/config.json", {"sample_size": None}, "sample_size is None"),
    "without T5": ("model_index.json", {"text_encoder_3": [None, None]}, "lists no text_encoder_3"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folders_that_cannot_be_used(tmp_path, kind):
    file, fields, message = BROKEN[kind]
    tiny_sd3().save_pretrained(tmp_path)
    edit(tmp_path / file, **fields)
    for loader in (load_pipeline, load_backbone, load_prompt_encoder):
        with pytest.raises(WadiError, match=message) as error:
            loader(tmp_path)
        assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_length_is_bound_in_the_pipeline_too(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    options = json.loads(file.read_text())
    options.pop("model_max_length")
    file.write_text(json.dumps(options))
    condition = load_prompt_encoder(tmp_path).encode(["a cat"])
    assert condition["encoder_hidden_states"].shape[1] == 32 + 256
