"""The experiment on a smaller base: nf4's rounding, the blocks at the ends, a run, and its table."""

import copy

import base_precision as experiment
import pytest
import torch
from torch import nn

from wadi.errors import WadiError
from wadi.files import read_json, write_json


@pytest.fixture
def weight():
    return torch.randn(48, 70, generator=torch.Generator().manual_seed(0))


def test_nf4_takes_the_nearest_of_sixteen_values_and_keeps_the_largest_of_a_block(weight):
    rounded = experiment.nf4_rounded(weight)
    exact, found = (nn.functional.pad(w.flatten(), (0, 32)).view(-1, 64) for w in (weight, rounded))
    scale = exact.abs().amax(1, keepdim=True)
    assert torch.equal(found.abs().amax(1, keepdim=True), scale)
    distances = (exact[..., None] / scale[..., None] - experiment.NF4).abs().amin(-1)
    torch.testing.assert_close((exact - found).abs() / scale, distances, rtol=1e-4, atol=1e-6)
    assert torch.equal(experiment.nf4_rounded(rounded), rounded)
    assert torch.equal(experiment.nf4_rounded(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_nf4_is_that_of_bitsandbytes(weight):
    library = pytest.importorskip("bitsandbytes").functional
    packed, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(experiment.nf4_rounded(weight), library.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.0.a", "up_blocks.1.a"], (0, 4)),
        ([f"transformer_blocks.{i}.a" for i in range(12)], (0, 11)),
    ],
)
def test_the_blocks_at_the_ends(names, expected):
    assert experiment.outer(names) == [names[i] for i in expected]


@pytest.mark.parametrize("base", ["bf16", "int8", "nf4", "nf4, first and last block int8"])
def test_errors_of_the_bases_are_those_of_their_bits(base):
    exact = nn.Module()
    exact.transformer_blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 64)) for _ in range(3))
    network = copy.deepcopy(exact)
    network.dtype = torch.float32  # as models of diffusers say it
    names = [f"transformer_blocks.{i}.0" for i in range(3)]
    experiment.BASES[base](network, names)
    low, high = {"bf16": (1e-3, 2e-3), "int8": (3e-3, 7e-3), "nf4": (0.07, 0.11)}.get(base, (0.03, 0.09))
    assert low < experiment.weight_error(network, exact, names) < high


def test_a_student_is_trained_and_judged_on_the_full_base(tmp_path, monkeypatch, capsys):
    every = experiment.ablation.read_prompts
    monkeypatch.setattr(experiment.ablation, "read_prompts", lambda source: every(source)[:8])
    base = "nf4, then float32"
    options = experiment.Options(
        bases=(base,), seeds=(1,), out=tmp_path, max_train_steps=3, train_batch_size=1, num_samples=4
    )
    options.device = "cpu"
    experiment.main(options)
    (path,) = tmp_path.glob("base/*.json")
    result = read_json(path)
    assert result["base"] == base
    assert result["weight_error"] == 0.0  # the last updates were made on the full base
    assert result["exported"] == result["figures"]
    assert f"| {base} | 1 of 1 | 0.0000 |" in capsys.readouterr().out
    written = path.stat().st_mtime_ns
    experiment.main(options)
    assert path.stat().st_mtime_ns == written


def test_the_table_has_means_and_intervals(tmp_path):
    for seed, distance in ((1, 1.0), (2, 2.0)):
        figures = dict.fromkeys(experiment.FIGURES, 0.5) | {
            "frechet_distance": distance,
            "size_entropy": None,
        }
        result = {"base": "int8", "weight_error": 0.0064, "exported": figures}
        write_json(tmp_path / "base" / f"int8-seed{seed}.json", result)
    write_json(tmp_path / "base" / "int8-seed3.json", result | {"exported": None})
    row = experiment.table(tmp_path, "unet").splitlines()[2]
    assert row.startswith("| int8 | 2 of 3 | 0.0064 | 1.500 ± 6.353 | 0.500 ± 0.000 |")
    assert "| - |" in row


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bases": ("int4",)}, "--bases: 'int4' is unknown"), ({"num_samples": 0}, "--num-samples: must be")],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(WadiError, match=message):
        experiment.main(experiment.Options(**options))
