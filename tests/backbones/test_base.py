"""What every backbone does alike: its blocks, its schedule, its encoding, images to latents and back."""

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image

from tests.onestep.test_pipeline import tiny_pixart
from tests.tiny import tiny_pipeline, tiny_sd3, tiny_sdxl
from wadi.backbones import BACKBONES, Backbone, load_backbone, load_prompt_encoder
from wadi.errors import WadiError
from wadi.onestep import OneStepPipeline
from wadi.onestep.loading import stock_arguments
from wadi.onestep.scheduler import one_step_scheduler
from wadi.prompts import Prompt, check_length


def tiny_sigma():
    """A PixArt-Sigma of the same parts as the tiny PixArt-alpha, whose tokenizer takes more tokens."""
    pipeline = PixArtSigmaPipeline(**tiny_pixart().components)
    pipeline.tokenizer.model_max_length = 512
    return pipeline


TINY = {
    "StableDiffusionPipeline": tiny_pipeline,
    "StableDiffusionXLPipeline": tiny_sdxl,
    "PixArtAlphaPipeline": tiny_pixart,
    "PixArtSigmaPipeline": tiny_sigma,
    "StableDiffusion3Pipeline": tiny_sd3,
}
every = pytest.mark.parametrize("kind", BACKBONES)


def make(kind: str) -> Backbone:
    return BACKBONES[kind](TINY[kind]())


def stock_images(pipeline, prompts, seed, **options):
    """What the stock pipeline makes in two steps of its own scheduler."""
    generator, options = torch.Generator().manual_seed(seed), options | stock_arguments(pipeline)
    return pipeline(prompts, num_inference_steps=2, generator=generator, **options).images


def one_step(pipeline):
    """The stock pipeline with the scheduler that its one-step student ships with."""
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler)
    return pipeline


@every
def test_blocks_are_in_the_network(kind):
    backbone = make(kind)
    found = {type(module).__name__ for module in backbone.network.modules()}
    assert backbone.blocks
    assert set(backbone.blocks) <= found


@every
def test_the_fake_models_layers_are_some_of_the_students(kind):
    backbone = make(kind)
    student, fake = backbone.student_layers(), backbone.fake_layers()
    assert fake
    assert set(fake) <= set(student)
    assert all(isinstance(backbone.network.get_submodule(name), torch.nn.Linear) for name in student)


@every
def test_latents_are_decoded_as_by_the_stock_pipeline(kind):
    backbone = make(kind)
    latents = stock_images(backbone.pipeline, ["a cat", "a dog"], 0, output_type="latent")
    stock = stock_images(backbone.pipeline, ["a cat", "a dog"], 0)
    assert all(np.array_equal(*pair) for pair in zip(backbone.decode(latents), stock, strict=True))


@every
def test_images_of_any_size_become_latents_of_their_middle(kind):
    backbone = make(kind)
    pipeline, (height, width) = backbone.pipeline, backbone.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, 2 * width, 3), dtype=np.uint8)
    found = backbone.encode_images([Image.fromarray(pixels)] * 2)
    assert found.shape == (2, *backbone.latent_shape)
    middle = torch.from_numpy(pixels[:, width // 2 : -(width // 2)]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = pipeline.vae.encode(middle).latent_dist.mean
    torch.testing.assert_close(backbone.unscaled(found[:1]), encoded, rtol=1e-4, atol=1e-5)


@every
def test_a_folder_gives_the_conditions_that_the_stock_pipeline_sees(kind, tmp_path):
    """Encoders that are loaded for as long as they work, with or without the network beside them."""
    pipeline = TINY[kind]()
    pipeline.save_pretrained(tmp_path)
    expected = BACKBONES[kind](pipeline).encode(["a cat", ""])
    backbone, encoder = load_backbone(tmp_path), load_prompt_encoder(tmp_path)
    assert expected.keys() == encoder.dimensions.keys()
    for text in (backbone.text, encoder):
        found = text.encode(["a cat", ""])
        assert all(getattr(text.pipeline, part) is None for part in text.parts)
        assert {name: tensor.ndim for name, tensor in found.items()} == encoder.dimensions
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every
def test_one_step_is_the_stock_pipelines_bit_for_bit(kind):
    """x0 of `predict` at the last time, from noise and `encode`, against the pipeline with its scheduler."""
    backbone, prompts = make(kind), ["a red cat", "a dog"]
    schedule, pipeline = backbone.schedule(), one_step(backbone.pipeline)
    z = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(5))
    t = schedule.last.expand(2)
    with torch.no_grad():
        prediction = backbone.predict(backbone.network, z, schedule.timestep(t), backbone.encode(prompts))
        options = {"guidance_scale": 1.0, "output_type": "latent", **stock_arguments(pipeline)}
        stock = pipeline(prompts, num_inference_steps=1, latents=z, **options).images
    assert torch.equal(schedule.x0(prediction, z, t), stock)


TOKENS = {
    "StableDiffusionPipeline": 32,
    "StableDiffusionXLPipeline": 32,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 256,  # of T5; what its CLIPs cut is still read
}
"""Most tokens of a prompt of the tiny pipelines."""


@every
def test_a_prompt_may_be_as_long_as_the_pipeline_reads(kind):
    backbone = make(kind)
    encoder, pipeline = backbone.text, OneStepPipeline(backbone.pipeline)
    assert encoder.limit == TOKENS[kind]
    usual = len(encoder.tokenizer("").input_ids)
    words = ["a"] * (encoder.limit - usual)
    while len(encoder.tokenizer(" ".join(words)).input_ids) > encoder.limit:
        words.pop()
    check_length([Prompt(" ".join(words), 1)], encoder.tokenizer, "prompts", limit=encoder.limit)
    assert len(pipeline(" ".join(words), seed=0, output_type="latent")) == 1
    longer = " ".join([*words, "a", "a"])
    with pytest.raises(WadiError, match=f"longer than the {encoder.limit} tokens"):
        check_length([Prompt(longer, 1)], encoder.tokenizer, "prompts", limit=encoder.limit)
    with pytest.raises(WadiError, match=f"tokens and the model takes {encoder.limit}; shorten it"):
        pipeline(longer, seed=0)


@pytest.mark.parametrize("loader", [load_backbone, load_prompt_encoder])
def test_other_pipelines_get_one_line(tmp_path, loader):
    tiny_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(
        index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionImg2ImgPipeline"')
    )
    with pytest.raises(WadiError, match=r"holds a StableDiffusionImg2Img.*; name one of StableDiff") as error:
        loader(tmp_path)
    assert all(name in str(error.value) for name in BACKBONES)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_network_gets_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(WadiError, match="FluxPipeline, and lists neither a U-Net nor a transformer; name a"):
        load_backbone(tmp_path)


@every
def test_times_end_at_pure_noise(kind):
    """The student's one step starts where the schedule has no signal left, or nearly none."""
    schedule = make(kind).schedule()
    alpha, sigma = schedule.levels(schedule.last[None])
    assert float(alpha) < 0.1 < 0.99 < float(sigma)
