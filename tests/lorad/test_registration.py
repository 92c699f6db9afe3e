"""Importing wadi.lorad adds one member to PEFT's enum and changes nothing else."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from wadi import LoRaDConfig, LoRaDModel


def test_the_member_is_a_member_like_any_other():
    member = PeftType.LORAD
    assert member is PeftType("LORAD") is PeftType["LORAD"]
    assert isinstance(member, PeftType)
    assert (member, member.value, member.name, str(PeftType.LORA).replace("LORA", "LORAD")) == (
        "LORAD",
        "LORAD",
        "LORAD",
        str(member),
    )
    assert list(PeftType).count(member) == 1
    assert member in PeftType.__members__.values()
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "LORAD"}'
    assert len({member, PeftType("LORAD")}) == 1
    with pytest.raises(AttributeError):
        PeftType.LORAD = "other"
    with pytest.raises(ValueError, match="LORADE"):
        PeftType("LORADE")


def test_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORAD] is LoRaDConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORAD] is LoRaDModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORAD] == "lorad_"


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
LATER = f"""{STOCK}
print(stock())
assert "LORAD" not in PeftType.__members__
import wadi.lorad
print(stock())
assert CONFIGS["LORAD"] is wadi.LoRaDConfig
"""


def test_stock_tuners_are_the_same_with_and_without_wadi():
    """Here, where wadi came first, and in a process that imports it last."""
    names = {}
    exec(STOCK, names)
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [names["stock"]()] * 2
