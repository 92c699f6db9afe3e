"""Teachers with random weights: the published sizes, and folders that load."""

import pytest
import torch
from teachers import Options, write_teacher

from wadi.backbones import load_backbone
from wadi.backbones.outline import outline
from wadi.errors import WadiError

COUNTS = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sd3-medium": 2_028_328_000}


@pytest.mark.parametrize("name", COUNTS)
def test_configurations_are_those_of_the_published_models(tmp_path, name):
    write_teacher(Options(name, tmp_path / name, weights=False))
    backbone = outline(tmp_path / name, torch.bfloat16)
    assert sum(p.numel() for p in backbone.network.parameters()) == COUNTS[name]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_teacher_loads_and_reads_prompts(tmp_path):
    write_teacher(Options("tiny", tmp_path / "teacher"))
    backbone = load_backbone(tmp_path / "teacher", torch.bfloat16)
    (states,) = backbone.encode(["a cat"]).values()
    assert states.shape == (1, 77, 32)
    assert all(p.isfinite().all() for p in backbone.network.parameters())
    with pytest.raises(WadiError, match="exists"):
        write_teacher(Options("tiny", tmp_path / "teacher"))
