"""Folders of rectified flows that cannot be used are refused in one line, before weights are read."""

import json

import pytest

from tests.backbones.cases import CASES
from wadi.backbones import load_backbone, load_prompt_encoder
from wadi.errors import WadiError
from wadi.onestep.loading import load_pipeline

OTHER_TEXT = "takes text embeddings of width {} .{}.*give {}; they are from different models"
BROKEN = [
    ("flux-dev", "transformer", {"joint_attention_dim": 48}, OTHER_TEXT.format(48, "joint_att", 32)),
    ("flux-dev", "transformer", {"pooled_projection_dim": 8}, OTHER_TEXT.format(8, "pooled_proj", 16)),
    ("flux-schnell", "transformer", {"in_channels": 384, "out_channels": 64}, "takes 384 channels and gives"),
    (
        "flux-dev",
        "vae",
        {"latent_channels": 4},
        "latents of 16 channels.* gives 4",
    ),
    ("flux-dev", "model_index", {"text_encoder": [None, None]}, "lists no text_encoder"),
    ("sana", "transformer", {"caption_channels": 8}, OTHER_TEXT.format(8, "caption_channels", 16)),
    ("sana", "transformer", {"guidance_embeds": True}, "takes the guidance as an input"),
    ("sana", "transformer", {"sample_size": None}, "sample_size is None"),
    ("sana", "vae", {"latent_channels": 16}, "different models"),
    ("klein", "transformer", {"joint_attention_dim": 64}, OTHER_TEXT.format(64, "joint_att", 48)),
    ("klein", "transformer", {"guidance_embeds": True}, "takes the guidance as an input"),
    ("klein", "text_encoder", {"num_hidden_layers": 20}, "has 20 layers.* reads the states of the 27th"),
    ("klein", "vae", {"latent_channels": 16}, "latents of 32 channels.* gives 16"),
    ("z-image", "transformer", {"cap_feat_dim": 8}, OTHER_TEXT.format(8, "cap_feat_dim", 16)),
    ("z-image", "vae", {"latent_channels": 4}, "different models"),
    ("qwen-image", "transformer", {"joint_attention_dim": 8}, OTHER_TEXT.format(8, "joint_att", 16)),
    ("qwen-image", "transformer", {"guidance_embeds": True}, "takes the guidance as an input"),
    ("qwen-image", "transformer", {"out_channels": 8}, "takes 64 channels and gives 32"),
    ("qwen-image", "vae", {"z_dim": 4}, "latents of 16 channels.* gives 4"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny pipelines by case, each made once; the configurations of a broken one are written back."""
    made = {}

    def folder(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case) / "model"
            CASES[case]().save_pretrained(made[case])
        return made[case]

    return folder


@pytest.mark.parametrize(("case", "part", "fields", "message"), BROKEN)
def test_folders_that_cannot_be_used(folders, case, part, fields, message):
    folder = folders(case)
    file = folder / "model_index.json" if part == "model_index" else folder / part / "config.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | fields))
    try:
        for loader in (load_pipeline, load_backbone, load_prompt_encoder):
            with pytest.raises(WadiError, match=message) as caught:
                loader(folder)
            assert "\n" not in str(caught.value)
    finally:
        file.write_text(whole)
    load_prompt_encoder(folder)
