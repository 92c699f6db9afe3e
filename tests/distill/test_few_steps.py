"""Students of several steps: their roll-outs, their training, and what they export."""

import dataclasses
import json

import diffusers
import pytest
import torch

from tests.distill.test_resume import config
from tests.tiny import tiny_pipeline, tiny_pixart, tiny_sd3
from tests.tiny_flows import tiny_flux
from wadi.distill import distill
from wadi.onestep import OneStepPipeline
from wadi.onestep.loading import guidance_arguments, stock_arguments

FLOW = {"weighting": "normalized", "fake_weighting": "none"}
KINDS = {
    # name: pipeline, options of its distillation
    "epsilon": (tiny_pipeline, {}),
    "v": (lambda: tiny_pipeline(prediction_type="v_prediction"), {}),
    "pixart": (tiny_pixart, {"alpha_T_squared": 0.0047}),
    "sd3": (tiny_sd3, FLOW),
    "flux": (lambda: tiny_flux(dev=True), FLOW | {"resolution": 32}),
}


@dataclasses.dataclass
class Case:
    name: str
    teacher: object
    run: object


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """A run of 3 updates, whose student takes up to 4 steps."""
    make_pipeline, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline().save_pretrained(folder / "teacher")
    options = config(folder / "teacher", folder, "run", student_steps=4, **options)
    options = options.replace(max_train_steps=3, lr_decay_fraction=0, validation_steps=3)
    options = options.replace(validation_seeds=(0,))
    return Case(request.param, folder / "teacher", distill(options))


def stock(folder):
    """The folder in diffusers' own class of pipeline, without wadi."""
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


def drawn_from(pipeline, prompt, count, side):
    """The latents of the stock pipeline, whose global noise continues the call's generator."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.Generator.get_state
    options = stock_arguments(pipeline) | guidance_arguments(pipeline) | side
    step = pipeline.scheduler.step

    def seeded(*args, **kwargs):
        if "generator" in kwargs:
            return step(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(shared(generator))
            result = step(*args, **kwargs)
            generator.set_state(torch.get_rng_state())
        return result

    pipeline.scheduler.step = seeded
    return pipeline(
        prompt, num_inference_steps=count, generator=generator, output_type="latent", **options
    ).images


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_stock_diffusers_makes_the_students_images(case, count):
    """Bit for bit in float32, with nothing but the number of steps."""
    side = {"height": 32, "width": 32} if case.name == "flux" else {}
    expected = drawn_from(stock(case.run / "pipeline"), "a red cat", count, side)
    sources = (case.run / "pipeline",), (case.teacher, case.run / "adapter")
    for source in sources:
        student = OneStepPipeline.from_pretrained(*source)
        found = student("a red cat", seed=3, num_inference_steps=count, output_type="latent", **side)
        assert torch.equal(found, expected)
