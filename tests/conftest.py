import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.emoji.cases import synthetic_atlas
from tests.tiny import one_level_pipeline, tiny_pipeline
from wadi.files import save_tensors
from wadi.lorad import rotation

torch.set_num_threads(1)
ALLOWED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
# no limits of time: the machine may be busy
settings.register_profile("wadi", deadline=None, max_examples=25, suppress_health_check=ALLOWED)
settings.load_profile("wadi")


LONGEST = (
    "distill/test_regions.py",
    "backbones/test_end_to_end.py",
    "emoji/test_training.py",
    "emoji/test_subject.py",
    "distill/test_trainer.py",
    "distill/test_processes.py",
    "backbones/test_stock.py",
    "distill/test_objective.py",
    "backbones/test_base.py",
    "commands/test_dreambooth.py",
    "distill/test_plan.py",
    "experiments/test_stacked.py",
)
"""Files that take long. They begin first, so that none of them is left to one worker at the end."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order is by the number of tests
    gc.disable()  # until the tests are imported


def pytest_collection_finish():
    """Let the collector of circles pass over what is imported; searching it took 40 % of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(autouse=True, scope="module")
def pass_over_what_is_imported():
    """Also over what is imported when it is first used."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """Encoded prompts stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["WADI_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A tiny epsilon-predicting Stable Diffusion folder; read only."""
    folder = tmp_path_factory.mktemp("teacher") / "sd"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_teacher_folder(tmp_path_factory):
    """The same with a U-Net of half the blocks, for runs of many updates; read only."""
    folder = tmp_path_factory.mktemp("teacher") / "small"
    one_level_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def v_teacher_folder(tmp_path_factory):
    """The first, predicting v."""
    folder = tmp_path_factory.mktemp("teacher") / "sd-v"
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def atlas(tmp_path_factory):
    """The file of an atlas that needs no font; read only."""
    path = tmp_path_factory.mktemp("atlas") / "atlas.safetensors"
    save_tensors(path, {"atlas": synthetic_atlas()})
    return path


@pytest.fixture
def rotations(monkeypatch):
    """How often a weight's angles were computed."""
    counted = []
    total = rotation._total_angles

    def count(adapters, dtype):
        counted.append(1)
        return total(adapters, dtype)

    monkeypatch.setattr(rotation, "_total_angles", count)
    return counted
