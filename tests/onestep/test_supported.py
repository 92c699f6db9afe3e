"""Pipelines whose scheduler is for another kind of model are told of before weights are read."""

import json

import diffusers
import pytest

from tests.backbones.cases import CASES
from wadi.errors import WadiError
from wadi.onestep import load_pipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}, False),
    "LCM": ("LCMScheduler", {}, False),
    "DPM": ("DPMSolverMultistepScheduler", {}, False),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, True),
    "flow of LCM": ("FlowMatchLCMScheduler", {}, True),
    "flow of DPM": ("DPMSolverMultistepScheduler", FLOW, True),
    "flow of UniPC": ("UniPCMultistepScheduler", FLOW, True),
}


BETAS = ("sd", "sdxl", "pixart-alpha")


@pytest.fixture(scope="module", params=[*BETAS, "sd3", "flux-dev", "sana", "klein", "z-image", "qwen-image"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / request.param
    CASES[request.param]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_is_of_its_pipelines_kind(folder, kind):
    name, options, flow = SCHEDULERS[kind]
    getattr(diffusers, name)(**options).save_pretrained(folder / "scheduler")
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scheduler": ["diffusers", name]}))
    if flow == (folder.name not in BETAS):
        assert type(load_pipeline(folder, without=("vae", "text_encoder")).scheduler).__name__ == name
        return
    is_one, needs = ("rectified flow", "schedule of betas")[:: 1 if flow else -1]
    with pytest.raises(
        WadiError, match=rf"is a {name} of a {is_one}, and a .* a scheduler of a {needs}"
    ) as e:
        load_pipeline(folder)
    assert "\n" not in str(e.value)
