"""The atlas: drawn, written, read, and what is said when it cannot be."""

import pytest
import torch

from tests.emoji.cases import needs_font, synthetic_atlas
from wadi import cli
from wadi.emoji.glyphs import ATLAS_SIZE, NAMES, AtlasConfig, draw_atlas, load_atlas, save_atlas
from wadi.errors import WadiError
from wadi.files import save_tensors


def test_a_missing_font_is_named(tmp_path):
    with pytest.raises(WadiError, match=r"nowhere\.ttf: the emoji font is missing"):
        draw_atlas(tmp_path / "nowhere.ttf")


def test_another_font_is_refused(tmp_path):
    (tmp_path / "other.ttf").write_text("not a font")
    with pytest.raises(WadiError, match=r"other\.ttf: is not the bitmap font"):
        draw_atlas(tmp_path / "other.ttf")


def test_the_command_line_tells_of_a_missing_font(tmp_path, capsys):
    font = tmp_path / "nowhere.ttf"
    assert cli.main(["emoji", "atlas", "--out", str(tmp_path / "a.safetensors"), "--font", str(font)]) == 2
    assert capsys.readouterr().err.startswith(f"wadi: error: {font}: the emoji font is missing")
    assert not list(tmp_path.iterdir())


def test_an_atlas_file_is_read(tmp_path):
    save_tensors(tmp_path / "atlas.safetensors", {"atlas": synthetic_atlas()})
    assert torch.equal(load_atlas(tmp_path / "atlas.safetensors"), synthetic_atlas())


@pytest.mark.parametrize("tensors", [{"weights": torch.zeros(3)}, {"atlas": torch.zeros(3, 4, 96, 96)}])
def test_other_files_are_refused(tensors, tmp_path):
    save_tensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(WadiError, match=r"other\.safetensors: not an atlas"):
        load_atlas(tmp_path / "other.safetensors")


@needs_font
def test_the_drawn_atlas(tmp_path):
    save_atlas(AtlasConfig(out=tmp_path / "atlas.safetensors"))
    atlas = load_atlas(tmp_path / "atlas.safetensors")
    assert atlas.shape == (len(NAMES), 4, ATLAS_SIZE, ATLAS_SIZE)
    assert atlas.dtype == torch.uint8
    assert torch.equal(atlas, load_atlas())
    colour, alpha = atlas[:, :3].int(), atlas[:, 3:].int()
    # Premultiplied; Lanczos resizing overshoots a little at edges.
    assert ((colour - alpha).clamp(min=0) > 40).double().mean() < 1e-3
    covered = (alpha[:, 0] > 128).flatten(1).double().mean(1)
    assert covered.min() > 0.1
    # The longer side is filled: something near two opposite edges.
    opaque = alpha[:, 0] > 8
    rows, columns = opaque.any(2), opaque.any(1)
    near = [side[:, :4].any(1) & side[:, -4:].any(1) for side in (rows, columns)]
    assert (near[0] | near[1]).all()
    flat = atlas.flatten(1).float()
    assert torch.cdist(flat, flat).fill_diagonal_(float("inf")).min() > 1000
