"""Angles on every layer, in the original layout: the same as merged in diffusers."""

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
)
from published import make_network

from integrations.comfyui.adapter import read_angles
from integrations.comfyui.keys import fitted, locate
from integrations.comfyui.rotation import turned
from tests.integrations.cases import NETWORKS, PREFIX, back, layout, ldm_names, merged, turned_network
from wadi.emoji import student_folder
from wadi.lorad import load_adapter, save_adapter


def shapes_of(tensors):
    return {key: tuple(value.shape) for key, value in tensors.items()}


def patched(tensors, layers, strength=1.0):
    """As ComfyUI patches a loaded model."""
    tensors = {key: value.clone() for key, value in tensors.items()}
    for target, (A, B) in fitted(layers, shapes_of(tensors), "adapter"):
        start = target.start or 0
        part = tensors[target.key].narrow(0, start, target.rows)
        part.copy_(turned(part, A, B, strength))
    return tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("family", NETWORKS)
def test_a_patched_model_is_the_merged_one_in_the_original_layout(family, tmp_path):
    network = NETWORKS[family]()
    base = {key: value.clone() for key, value in layout(network).items()}
    network, layers = turned_network(network)
    save_adapter(network, tmp_path / "adapter")
    angles = read_angles(tmp_path / "adapter")
    assert sorted(angles) == sorted(layers)

    found, expected = patched(base, angles), merged(network)
    assert sum(not torch.equal(found[key], base[key]) for key in base) > 10
    assert_same(found, layout(network))
    converted = back(network, dict(found))
    if converted is not None:
        assert_same(converted, expected)


def test_the_built_in_student_is_the_merged_one():
    network = NETWORKS["emoji"]()
    base = {key: value.clone() for key, value in layout(network).items()}
    load_adapter(network, student_folder())
    merged(network)
    assert_same(patched(base, read_angles(student_folder())), layout(network))


@pytest.mark.parametrize(("name", "count"), [("sd15", 686), ("sd21", 686), ("sdxl", 1680)])
def test_every_weight_of_a_published_unet_is_where_diffusers_converts_it_from(name, count):
    with torch.device("meta"):
        network = make_network(name)
    state, names = network.state_dict(), ldm_names(network)
    # the conversion only moves what it is given, so that names do for tensors
    moved = convert_ldm_unet_checkpoint({PREFIX + name: name for name in names.values()}, network.config)
    assert len(moved) == len(state) == count
    shapes = {name: tuple(state[key].shape) for key, name in names.items()}
    for key, value in state.items():
        if value.ndim > 1:
            target = locate(key.removesuffix(".weight"), shapes)
            assert (target.key, target.start, target.swapped) == (moved[key], None, False)
            assert target.rows == len(value)


def test_every_row_of_flux_is_where_diffusers_converts_it_from():
    tiny = layout(NETWORKS["flux-dev"]())
    # diffusers knows the published width alone: as many rows and inputs, each row told by its number
    width, shapes, rows = 3072, {}, {}
    for key, value in tiny.items():
        count = len(value) * width // 32 if len(value) % 32 == 0 else len(value)
        shapes[key] = (count, value.shape[1] * width // 32) if value.ndim > 1 else (count,)
        rows[key] = torch.arange(count)
    numbered = {key: torch.stack((torch.full_like(n, i), n), 1) for i, (key, n) in enumerate(rows.items())}
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(numbered))
    names, seen = list(rows), 0
    for key, found in converted.items():
        if not key.endswith(".weight") or len(shapes[names[found[0, 0]]]) < 2:
            continue
        target = locate(key.removesuffix(".weight"), shapes)
        expected = numbered[target.key].narrow(0, target.start or 0, target.rows)
        if target.swapped:
            expected = torch.cat(expected.chunk(2)[::-1])
        assert torch.equal(found, expected), key
        seen += 1
    assert seen == sum(isinstance(module, torch.nn.Linear) for module in NETWORKS["flux-dev"]().modules())


@pytest.mark.parametrize("family", [family for family in NETWORKS if family != "emoji"])
def test_an_adapter_of_another_family_is_refused(family):
    angles = read_angles(student_folder())
    with pytest.raises(
        ValueError, match=r"^emoji: .*load the checkpoint that the adapter was distilled from$"
    ):
        fitted(angles, shapes_of(layout(NETWORKS[family]())), "emoji")


def test_an_adapter_of_another_size_is_refused():
    shapes = shapes_of(layout(NETWORKS["emoji"]()))
    angles = {layer: (A[1:], B) for layer, (A, B) in read_angles(student_folder()).items()}
    with pytest.raises(ValueError, match="turns a weight of 63 x 64, and this model has 64 x 64"):
        fitted(angles, shapes, "emoji")
