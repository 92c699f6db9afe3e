"""Images that are hardly what was asked for are told, and no others."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_pipeline
from wadi.errors import WadiWarning
from wadi.onestep import StudentPipeline
from wadi.onestep.output import tell_odd_images

NOISE = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
KINDS = {
    "pil": lambda arrays: [Image.fromarray((array * 255).astype(np.uint8)) for array in arrays],
    "np": np.stack,
    "pt": lambda arrays: torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2),
}


def told(images, flagged=None, names=()):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tell_odd_images(images, flagged, names)
    return [str(one.message) for one in found]


@pytest.mark.parametrize("kind", KINDS)
def test_black_and_uniform_images_are_told_by_number(kind):
    make = KINDS[kind]
    assert told(make([NOISE, NOISE])) == []
    black, red = np.zeros_like(NOISE), np.broadcast_to(np.float32([1, 0, 0]), NOISE.shape)
    lines = told(make([black, NOISE, red, black]))
    assert lines[0].startswith("image 1 of 4, image 4 of 4: black all over; half precision")
    assert lines[1] == "image 3 of 4: one colour all over"
    (flagged,) = told(make([NOISE, black]), [False, True], ["a", "b"])
    assert flagged.startswith("b: flagged by the model's safety checker")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["np", "pt"])
def test_what_is_no_number_is_told(kind, value):
    odd = NOISE.copy()
    odd[3, 3, 1] = value
    (line,) = told(KINDS[kind]([NOISE, odd]))
    assert line.startswith("image 2 of 2: has values that are not numbers")


class Flagging(torch.nn.Module):
    """Flags the first image, as diffusers' safety checkers do."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        images[0] = 0
        return images, [i == 0 for i in range(len(images))]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_flagged_image_is_told_by_the_pipeline(fast, output_type):
    pipeline = tiny_pipeline()
    student = StudentPipeline(pipeline)
    extractor = lambda images, return_tensors: _features(len(images))  # noqa: E731
    student.pipeline.safety_checker, student.pipeline.feature_extractor = Flagging(), extractor
    if fast:
        student.compile()
    with pytest.warns(WadiWarning, match="image 1 of 2: flagged by the model's safety checker"):
        student("a cat", seed=0, num_images_per_prompt=2, output_type=output_type)


def _features(count):
    features = SimpleNamespace(pixel_values=torch.zeros(count, 3, 2, 2))
    features.to = lambda *_: features
    return features


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_a_decoder_that_overflows_is_told(fast, output_type):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    student = StudentPipeline(pipeline)
    if fast:
        student.compile()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        student("a cat", seed=0, output_type=output_type)
    assert any("half precision overflows" in str(one.message) for one in found if one.category is WadiWarning)
