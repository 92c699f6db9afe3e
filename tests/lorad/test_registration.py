"""Importing wadi.lorad adds one member to PEFT's enum and changes nothing else."""

import copy
import json
import pickle

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
