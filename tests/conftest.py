import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import tiny_pipeline
from wadi.lorad import rotation

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


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
def v_teacher_folder(tmp_path_factory):
    """The same, predicting v."""
    folder = tmp_path_factory.mktemp("teacher") / "sd-v"
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(folder)
    return folder


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
