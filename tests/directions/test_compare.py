"""Comparison of tiny real networks, and of the pair that comes with wadi."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.directions.cases import fine_tuned_pipeline
from tests.tiny import tiny_pipeline, tiny_pixart
from wadi import WadiError, emoji
from wadi.directions import compare_models, write_comparison
from wadi.directions.compare import layers_with_rows, table, type_of
from wadi.directions.figures import block_of
from wadi.outputs import MARKER


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Everything of the U-Net fine-tuned."""
    folder = tmp_path_factory.mktemp("compare") / "student"
    fine_tuned_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def comparison(teacher_folder, student):
    return compare_models(teacher_folder, student)


def brute_force(weight, target):
    """Row by row in float64, and an SVD of the direction residual."""
    w, w2 = (x.detach().flatten(1).double().numpy() for x in (weight, target))
    n, n2 = np.linalg.norm(w, axis=1), np.linalg.norm(w2, axis=1)
    cosine = (w * w2).sum(1) / (n * n2)
    energy = np.linalg.svd(w2 / n2[:, None] - w / n[:, None], compute_uv=False) ** 2
    return np.abs(n2 - n) / n, 1 - cosine, np.arccos(cosine), energy / energy.sum()


def test_every_layer_against_brute_force(comparison):
    before, after = (dict(p.unet.named_modules()) for p in (tiny_pipeline(), fine_tuned_pipeline()))
    names = {
        name for name, module in before.items() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert {layer.name for layer in comparison.layers} == names
    for layer in comparison.layers:
        norm, direction, angle, energy = brute_force(before[layer.name].weight, after[layer.name].weight)
        found = ((layer.norm, norm), (layer.direction, direction), (layer.angle, angle))
        for figure, values in found:
            assert (figure.mean, figure.std) == pytest.approx((values.mean(), values.std()), rel=1e-6)
        half = len(energy) / 2
        running = energy[: int(half)].sum() + (half % 1) * energy[min(int(half), len(energy) - 1)]
        assert layer.energy[25] == pytest.approx(running, abs=1e-5)
        assert layer.energy[-1] == pytest.approx(1, abs=1e-5)


def test_isotropic_noise_is_found_to_be_its_null(comparison):
    """The law that the nulls are for: noise changes directions far more than norms, and means nothing."""
    everything = comparison.overall()
    for over in ("direction", "angle"):
        found, null = everything.ratio(over)
        assert found == pytest.approx(null, rel=0.05)
    assert everything.ratio("angle")[0] > 5
    assert everything.energy == pytest.approx(everything.null_energy, abs=0.02)


def test_groups_are_means_over_changed_layers(comparison):
    for field in ("block", "type"):
        groups = comparison.by(field)
        assert sum(group.layers for group in groups) == len(comparison.layers)
        for group in groups:
            means = [la.angle.mean for la in comparison.layers if getattr(la, field) == group.name]
            assert group.angle.mean == pytest.approx(sum(means) / len(means))
    assert [group.name for group in comparison.by("block")] == [
        *("conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "mid_block"),
        *("up_blocks.0", "up_blocks.1", "conv_out"),
    ]
    assert "other" not in {layer.type for layer in comparison.layers}


def test_files(comparison, tmp_path):
    write_comparison(comparison, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("directions.json", "directions.csv", "scatter.png", "spectrum.png", MARKER)
    }
    for picture in ("scatter.png", "spectrum.png"):
        assert np.asarray(Image.open(tmp_path / "out" / picture)).std() > 5
    before, after = (p.unet.state_dict() for p in (tiny_pipeline(), fine_tuned_pipeline()))
    changed = [not torch.equal(w, after[key]) for key, w in before.items() if w.ndim < 2]
    values = json.loads((tmp_path / "out" / "directions.json").read_text())
    assert values["others_changed"] == sum(changed) > 0
    assert values["all"]["angle_over_norm"]["null"] == pytest.approx(comparison.overall().ratio("angle")[1])
    with (tmp_path / "out" / "directions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, layer, entry in zip(rows, comparison.layers, values["layers"], strict=True):
        assert row["name"] == layer.name == entry["name"]
        assert float(row["norm_null_std"]) == layer.norm.null_std == entry["norm"]["null_std"]
        assert float(row["energy_30"]) == layer.energy[15] == entry["energy"][15]
    with pytest.raises(WadiError, match="which is read"):
        write_comparison(comparison, comparison.student)


def test_a_model_against_itself(teacher_folder, tmp_path):
    comparison = compare_models(teacher_folder, teacher_folder)
    everything = comparison.overall()
    assert everything.unchanged == everything.layers == len(comparison.layers)
    assert everything.norm is everything.energy is None
    assert comparison.others_changed == 0
    assert "did not change" in table(comparison)
    write_comparison(comparison, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_student_of_the_emoji_world_keeps_its_norms():
    comparison = compare_models(emoji.teacher_folder(), emoji.student_folder())
    changed = [layer for layer in comparison.layers if layer.changed]
    assert len(changed) == 131
    assert max(layer.norm.mean for layer in changed) < 1e-7
    assert comparison.overall().angle.mean > 0.1
    assert re.search(r"^all +131 ", table(comparison), re.MULTILINE)


def test_pixart_is_compared(tmp_path):
    pipeline = tiny_pixart()
    pipeline.save_pretrained(tmp_path / "teacher")
    name = "transformer_blocks.0.ff.net.2"
    with torch.no_grad():
        pipeline.transformer.get_submodule(name).weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "student")
    comparison = compare_models(tmp_path / "teacher", tmp_path / "student")
    (layer,) = (layer for layer in comparison.layers if layer.changed)
    assert (layer.name, layer.block, layer.type) == (name, "transformer_blocks.0", "feed-forward")
    assert layer.norm.mean == layer.size == 1
    assert layer.angle.mean < 1e-6


def test_rows_of_zeros(teacher_folder, tmp_path):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.weight[:3] = 0
        pipeline.unet.conv_out.weight[:] = 0
    pipeline.save_pretrained(tmp_path / "student")
    layers = {layer.name: layer for layer in compare_models(teacher_folder, tmp_path / "student").layers}
    assert layers["conv_in"].rows_left_out == 3
    assert layers["conv_in"].norm.mean == 0
    assert layers["conv_in"].energy is None
    assert layers["conv_out"].norm is layers["conv_out"].size is None
    assert layers["conv_out"].changed


def test_names():
    assert block_of("transformer_blocks.11.attn1.to_q") == "transformer_blocks.11"
    assert block_of("mid_block.resnets.0.conv1") == "mid_block"
    assert type_of("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k") == "cross-attention"
    assert type_of("adaln_single.linear") == "time embedding"
    shapes = {f"up_blocks.{i}.resnets.0.conv1.weight": (2, 2) for i in (10, 9)}
    assert layers_with_rows({**shapes, "down_blocks.0.x.weight": (1, 1), "norm.weight": (3,)}) == [
        *("down_blocks.0.x", "up_blocks.9.resnets.0.conv1", "up_blocks.10.resnets.0.conv1")
    ]
