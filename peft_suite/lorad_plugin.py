"""A pytest plugin for PEFT's tests: where they are parametrised over methods, LoRaD takes their place."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from wadi import LoRaDConfig

LAYERS = ["q_proj", "v_proj", "c_attn", "q", "v", "query", "value"]
TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}


def case(name: str, model: str, *targets: str, **options: Any) -> tuple[str, str, type, dict[str, Any]]:
    """A row of TEST_CASES in PEFT's tests/test_custom_models.py."""
    return f"{name} LoRaD", model, LoRaDConfig, {"target_modules": list(targets), **options}


CUSTOM_MODELS = [
    ("MLP as a string LoRaD", "MLP", LoRaDConfig, {"target_modules": "lin0"}),
    case("MLP first", "MLP", "lin0"),
    case("MLP second", "MLP", "lin1"),
    case("MLP both", "MLP", "lin0", "lin1"),
    case("MLP modules_to_save", "MLP", "lin0", modules_to_save=["lin1"]),
    case("MLP rank 2", "MLP", "lin0", "lin1", r=2),
    case("Conv1d", "Conv1d", "conv1d"),
    case("Conv1d bigger", "Conv1dBigger", "conv1d"),
    case("Conv2d odd fan-in", "Conv2d", "conv2d"),
    case("Conv2d odd fan-in and linear", "Conv2d", "conv2d", "lin0"),
    case("Conv2d even fan-in", "Conv2d2", "conv2d", "lin0"),
    case("Conv2d groups", "Conv2dGroups", "conv2d"),
    case("Conv2d more groups", "Conv2dGroups2", "conv2d"),
    case("Conv3d", "Conv3d", "conv3d"),
    # not with the target "emb": embeddings are not turned; tests/lorad/test_peft.py checks the error
    case("transformers Conv1D", "EmbConv1D", "conv1d"),
]
FIRST, SECOND = ({"target_modules": [name], "init_weights": False} for name in ("lin0", "lin1"))
TWO_ADAPTERS = [
    ("LoRaD same", "lorad", LoRaDConfig, FIRST, FIRST),
    ("LoRaD different", "lorad", LoRaDConfig, FIRST, SECOND),
]
STABLE_DIFFUSION = {
    "text_encoder": {
        "target_modules": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "init_weights": False,
    },
    "unet": {
        "target_modules": [
            *("proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
        ],
        "init_weights": False,
    },
}
# Parametrised over methods, but about what another method does, or in need of the real hub
NOT_OURS = (
    "default_target_modules",
    "cat_with_rank",
    "trainable_token",
    "add_weighted",
    "prompt_learning_with_gradient_checkpointing",
    "from_pretrained_cache_dir",
)


def rows(module: str, function: str, names: list[str]) -> Sequence[Any] | None:
    """The rows of LoRaD for a test of PEFT.

    Args:
        module, function: of the test.
        names: of the arguments that it is parametrised over.

    Returns:
        None where the test is not parametrised over methods, or is not about LoRaD.
    """
    if any(part in function for part in NOT_OURS):
        return None
    if function == "test_adapter_name_makes_no_difference" and names == ["config0"]:
        return [LoRaDConfig(**FIRST)]
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return CUSTOM_MODELS
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        return TWO_ADAPTERS
    if names == ["config_cls", "config_kwargs"]:
        if module == "test_stablediffusion":
            return [(LoRaDConfig, STABLE_DIFFUSION)]
        if module in TASKS:
            return [(LoRaDConfig, {"target_modules": LAYERS, "task_type": TASKS[module]})]
    if names == ["config_class", "mandatory_kwargs"] and module == "test_config":
        return [(LoRaDConfig, {})]
    if (module, names) in (("test_config", ["config_class"]), ("test_custom_models", ["config_cls"])):
        return [LoRaDConfig]
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put the rows of LoRaD in the place of PEFT's, and keep PEFT from asking the hub."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tests.") and hasattr(module, "hub_online_once"):
            module.hub_online_once = lambda *args, **kwargs: contextlib.nullcontext()
    marks = metafunc.definition.own_markers
    module = metafunc.module.__name__.rpartition(".")[2]
    for index, mark in enumerate(marks):
        if mark.name == "parametrize":
            names = mark.args[0]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            ours = rows(module, metafunc.function.__name__, names)
            if ours is not None:
                marks[index] = pytest.mark.parametrize(mark.args[0], ours).mark


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """PEFT's tests draw weights without a seed; a failure here must come again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _higher_rate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train at a rate of 10 where PEFT asks what moved: the test has such exceptions for other methods.

    A starts at zero, so that B hardly moves in the three steps of that test at its rate of 0.5.
    """
    if request.node.originalname == "test_only_params_are_updated":
        monkeypatch.setattr(torch.optim, "SGD", partial(_sgd, torch.optim.SGD))


def _sgd(kind: type[torch.optim.SGD], parameters: Iterable[torch.Tensor], lr: float) -> torch.optim.SGD:
    return kind(parameters, lr=10.0)


def is_ours(item: pytest.Item) -> bool:
    """Whether a test is about LoRaD, and a stand-in of its model was made."""
    values = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    name = values.get("model_id")
    if isinstance(name, str) and "/" in name:
        stand_in = Path(os.environ["HF_HOME"], "hub", f"models--{name.replace('/', '--')}")
        if not stand_in.is_dir():
            return False
    about = any(value is LoRaDConfig or isinstance(value, LoRaDConfig) for value in values.values())
    return about or item.originalname == "test_from_peft_type"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of other methods.

    Raises:
        UsageError: a file has no test of LoRaD left; PEFT parametrises it otherwise than this plugin knows.
    """
    kept = [item for item in items if is_ours(item)]
    if empty := {item.path.name for item in items} - {item.path.name for item in kept}:
        raise pytest.UsageError(
            f"no test for LoRaD in {', '.join(sorted(empty))}: see rows() in lorad_plugin.py"
        )
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
