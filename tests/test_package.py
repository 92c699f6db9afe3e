"""What `import wadi` does, and what it does not."""

import subprocess
import sys

import pytest

import wadi
from wadi.errors import WadiError


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_alone_loads_nothing_heavy_and_hooks_nothing():
    heavy = "{'torch', 'peft', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys; hooks = list(sys.meta_path); import wadi; print({heavy} & set(sys.modules)"
    assert python(f"{code}, hooks == sys.meta_path)") == "set() True"


OPTIONS = """
import sys
import wadi
from wadi.distill import DistillConfig, PRESETS
assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)
before = wadi.distill
assert callable(before)
"""
STOCK = """
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS


def stock():
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    configs = {t.value: (c.__module__, c.__name__) for t, c in CONFIGS.items() if t != "LORAD"}
    types = [(t.name, t.value) for t in PeftType if t != "LORAD"]
    return str((types, configs, [(n, p.tolist()) for n, p in model.named_parameters()]))
"""
PEFT = """
print(stock())
assert "LORAD" not in PeftType.__members__
import wadi.lorad
print(stock())
assert CONFIGS["LORAD"] is wadi.LoRaDConfig
"""
NAMES = """
from wadi import *
import wadi.distill.run
from wadi.onestep import export_pipeline
assert export is export_pipeline is wadi.export
assert distill is before is wadi.distill
assert set(wadi.__all__) <= set(dir(wadi))
assert all(getattr(wadi, name) is not None for name in wadi.__all__)
assert len(wadi.distill.PRESETS) > 5
"""


def test_imports_one_after_the_other():
    """In one process, because they take seconds.

    The options of a distillation load no diffusers. The tuners of PEFT are the same before `wadi.lorad` is
    imported, after that, and here, where wadi came first. Importing a module sets a name of its package, and
    one of the names is a room's too: it stays what it was.
    """
    here = {}
    exec(STOCK, here)
    assert python(OPTIONS + STOCK + PEFT + NAMES).splitlines() == [here["stock"]()] * 2


def test_calling_the_package_distils():
    with pytest.raises(WadiError, match="--prompts"):
        wadi.distill(wadi.DistillConfig.of(pretrained_model_name_or_path="nowhere"))


def test_wadi_distill_has_the_names_that_it_lists():
    import wadi.distill

    assert all(getattr(wadi.distill, name) is not None for name in wadi.distill.__all__)
    with pytest.raises(AttributeError, match="Distiller"):
        _ = wadi.distill.Distiller


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="LoRaX"):
        _ = wadi.LoRaX
