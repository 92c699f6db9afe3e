"""Sizes, seeds, numbers and prompts of a call: done as asked, or one line that says what is possible."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, StableDiffusionImg2ImgPipeline
from PIL import Image

from tests.tiny import tiny_pipeline
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline
from wadi.onestep.arguments import check_seed, generators_of, image_size, own_size, size_step


def oblong(height=8, width=12):
    """A tiny pipeline whose own images are not square."""
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=(height, width))
    return pipeline


def transformer(sample_size=16, patch_size=2):
    """As much of a pipeline as decides sizes."""

    class Pipeline(DiffusionPipeline):
        vae_scale_factor = 8

    pipeline = Pipeline()
    pipeline.transformer = PixArtTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        cross_attention_dim=8,
        sample_size=sample_size,
        patch_size=patch_size,
        caption_channels=8,
    )
    return pipeline


@pytest.fixture(scope="module")
def student():
    return StudentPipeline(tiny_pipeline())


@pytest.mark.parametrize("pipeline", [tiny_pipeline(), oblong(), transformer()], ids=["SD", "oblong", "DiT"])
def test_a_side_that_is_not_given_is_the_models_own(pipeline):
    (height, width), step = own_size(pipeline), size_step(pipeline)
    assert image_size(pipeline) == (height, width)
    assert image_size(pipeline, height=2 * height) == (2 * height, width)
    assert image_size(pipeline, width=width + step) == (height, width + step)
    assert image_size(pipeline, np.int64(step), torch.tensor(16 * width)) == (step, 16 * width)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("pipeline", [tiny_pipeline, oblong], ids=["square", "oblong"])
def test_images_have_the_size_that_was_asked_for(pipeline, fast):
    student = StudentPipeline(pipeline())
    if fast:
        student.compile()
    height, width = own_size(student.pipeline)
    for sides in ({}, {"height": 32}, {"width": 32}, {"height": 8, "width": 40}):
        (image,) = student("a cat", seed=0, **sides)
        assert image.size == (sides.get("width", width), sides.get("height", height)), sides


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize(
    ("side", "message"),
    [
        (-8, "-8: must be at least 1"),
        (0, "0: must be at least 1"),
        (17, "17: must be a multiple of 8; use 16 or 24"),
        (1, "1: must be a multiple of 8; use 8"),
        (16.0, "16.0: must be one whole number"),
        ("16", "'16': must be one whole number"),
        (True, "True: must be one whole number"),
        (10**9, "1000000000: is more than 16 times the model's own 16 pixels"),
    ],
)
def test_a_size_that_is_not_possible_is_one_line(student, name, side, message):
    for call in (image_size, lambda _, **sides: student("a cat", **sides)):
        with pytest.raises(WadiError, match=f"--{name} {message}"):
            call(student.pipeline, **{name: side})
    fast = StudentPipeline(student.pipeline).compile()
    with pytest.raises(WadiError, match=f"--{name} {message}"):
        fast.fast.warm_up(1, **{name: side})


def test_what_a_network_cannot_grow_to_is_not_allowed():
    assert size_step(transformer()) == 16
    pipeline = tiny_pipeline()
    pipeline.vae_scale_factor = 8
    assert size_step(pipeline) == 8  # its blocks are told the size to grow to
    pipeline.unet.up_blocks[0].__class__ = type("SimpleCrossAttnUpBlock2D", (torch.nn.Module,), {})
    assert size_step(pipeline) == 16  # these double it, on the one level that shrinks


def test_image_to_image_takes_the_size_of_its_image(student):
    parts = inspect.signature(StableDiffusionImg2ImgPipeline.__init__).parameters
    stock = StableDiffusionImg2ImgPipeline(
        **{name: part for name, part in student.pipeline.components.items() if name in parts},
        requires_safety_checker=False,
    )
    other = StudentPipeline(stock)
    image = Image.new("RGB", (24, 8), "red")
    (made,) = other("a cat", seed=0, image=image, strength=1.0)
    assert made.size == image.size
    with pytest.raises(WadiError, match="has the size of the image that it is given; omit them"):
        other("a cat", image=image, strength=1.0, height=16)


def test_seeds_of_any_whole_number_are_the_same_noise(student):
    made = [
        student("a cat", seed=kind(7), output_type="np") for kind in (int, np.int32, np.uint8, torch.tensor)
    ]
    assert all((made[0] == other).all() for other in made)
    generators = generators_of(2**63 - 2, None, 2)
    assert [each.initial_seed() for each in generators] == [2**63 - 2, 2**63 - 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, r"seed \[1, 2\]: must be one whole number.*give `generator`"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed 9223372036854775807: must be .* less than"),
        ({"seed": 1.5}, "seed 1.5: must be one whole number"),
        ({"seed": "1"}, "seed '1': must be one whole number"),
        ({"seed": 0, "generator": torch.Generator()}, "give only one of the two"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images; give one for each"),
        ({"generator": []}, "0 generators for 1 images"),
        ({"generator": [1]}, "must be a torch.Generator"),
        ({"generator": 3}, "must be a torch.Generator"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0: must be at least 1"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt 1.5: must be one whole number"),
        ({"output_type": "jpg"}, "output_type: 'jpg' is unknown; use one of pil, np, pt, latent"),
        ({"guidance_scale": "7"}, "guidance_scale '7': must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan: must be a finite number"),
        ({"guidance_scale": None}, "guidance_scale None: must be a number"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"prompt": None}, "prompt None: must be text"),
        ({"prompt": ["a cat", 3]}, "prompt: number 2 of 2 must be text, but is 3"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_an_argument_that_is_not_possible_is_one_line(student, arguments, message, fast):
    called = StudentPipeline(student.pipeline)
    if fast:
        called.compile()
    with pytest.raises(WadiError, match=message) as error:
        called(**{"prompt": "a cat", **arguments})
    assert "\n" not in str(error.value)


def test_the_seed_of_the_last_image_counts():
    assert check_seed(2**63 - 8, 8) == 2**63 - 8
    with pytest.raises(WadiError, match=r"--seed 9223372036854775801: .* less than 9223372036854775801"):
        check_seed(2**63 - 7, 8, "--seed")
