"""Stable Diffusion XL: two encoders, a pooled embedding, sizes, the zeroed prompt."""

import json

import numpy as np
import pytest
import torch

from tests.files import edit
from tests.tiny import tiny_sdxl
from wadi.backbones import SDXLBackbone, load_backbone, load_prompt_encoder
from wadi.distill.presets import FITS, PRESETS
from wadi.errors import WadiError
from wadi.onestep import load_pipeline
from wadi.prompts import EmbeddingCache, encode_prompts


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "sdxl"
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("force_zeros", [True, False])
def test_no_prompt_is_what_the_pipeline_makes_of_it(force_zeros):
    pipeline = tiny_sdxl(force_zeros)
    null = SDXLBackbone(pipeline).null()
    _, states, _, pooled = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(null["encoder_hidden_states"], states)
    assert torch.equal(null["text_embeds"], pooled)
    assert bool(states.any()) is not force_zeros


@pytest.mark.parametrize("cached", [False, True])
def test_training_is_given_the_null_of_the_pipeline(sdxl_folder, tmp_path, cached):
    encoder = load_prompt_encoder(sdxl_folder)
    cache = EmbeddingCache(encoder, tmp_path / "cache") if cached else None
    encoded = encode_prompts(encoder, ["a cat", "a dog"], ["a dog"], cache)
    assert not any(tensor.any() for tensor in encoded.null.values())
    taken, whole = encoded.embeddings.take(torch.tensor([1])), encoder.encode(["a dog"])
    for name, tensor in whole.items():
        torch.testing.assert_close(taken[name], tensor)
        assert torch.equal(encoded.validation[name], taken[name])


def test_the_network_is_told_pooled_embedding_and_trained_size():
    backbone = SDXLBackbone(tiny_sdxl())
    condition, x, t = backbone.encode(["a cat", "a dog"]), torch.randn(2, 4, 8, 8), torch.tensor([7, 999])
    unet, states = backbone.network, condition["encoder_hidden_states"]
    ids = torch.tensor([[16.0, 16.0, 0, 0, 16.0, 16.0]] * 2)

    def predict(pooled, ids):
        added = {"text_embeds": pooled, "time_ids": ids}
        return unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample

    with torch.no_grad():
        ours = backbone.predict(unet, x, t, condition)
        assert torch.equal(ours, predict(condition["text_embeds"], ids))
        assert not torch.allclose(ours, predict(condition["text_embeds"], 2 * ids))
        assert not torch.allclose(ours, predict(-condition["text_embeds"], ids))


def test_latents_of_a_vae_with_statistics_are_decoded_as_by_the_stock_pipeline():
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    backbone, latents = SDXLBackbone(pipeline), torch.randn(1, 4, 8, 8)
    stock = pipeline("a cat", num_inference_steps=1, latents=latents, output_type="latent").images
    image = pipeline("a cat", num_inference_steps=1, latents=latents).images[0]
    assert np.array_equal(backbone.decode(stock)[0], image)
    torch.testing.assert_close(backbone.scaled(backbone.unscaled(latents)), latents)


BROKEN = {
    "other sum": ("unet", {"cross_attention_dim": 64}, "width 64 .cross_attention_dim.*give 40"),
    "other pooled": ("text_encoder_2", {"projection_dim": 20}, "width 72 .projection_class.*give 68"),
    "no sizes": ("unet", {"addition_embed_type": None}, "addition_embed_type None, and a StableDiffusionXL"),
    "inpainting": ("unet", {"in_channels": 9}, "takes 9 channels and gives 4"),
    "LCM": ("unet", {"time_cond_proj_dim": 32}, "latent consistency"),
    "other latents": ("vae", {"latent_channels": 16}, "different models"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folders_that_cannot_be_used(tmp_path, kind):
    part, fields, message = BROKEN[kind]
    tiny_sdxl().save_pretrained(tmp_path)
    edit(tmp_path / part / "config.json", **fields)
    for loader in (load_pipeline, load_backbone, load_prompt_encoder):
        with pytest.raises(WadiError, match=message) as error:
            loader(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_pipeline_without_one_of_its_text_parts_is_refused(tmp_path, part):
    """Such as the refiner, which has no first encoder."""
    tiny_sdxl().save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", **{part: [None, None]})
    for loader in (load_pipeline, load_backbone, load_prompt_encoder):
        with pytest.raises(WadiError, match=f"lists no {part}; name a whole pipeline"):
            loader(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("length", [None, 20])
def test_the_shorter_tokenizer_bounds_prompts(tmp_path, part, length):
    tiny_sdxl().save_pretrained(tmp_path)
    file = tmp_path / part / "tokenizer_config.json"
    options = json.loads(file.read_text()) | {"model_max_length": length}
    file.write_text(json.dumps({key: value for key, value in options.items() if value is not None}))
    encoder = load_prompt_encoder(tmp_path)
    assert encoder.limit == (length or 32)


def test_the_preset_fits_its_teacher():
    preset, fit = PRESETS["sdxl"], FITS["sdxl"]
    assert (fit.pipeline, fit.prediction, fit.resolution) == ("StableDiffusionXLPipeline", "epsilon", 1024)
    assert (preset.student.rank, preset.fake.rank, preset.fake.layers) == (64, 64, "student")
