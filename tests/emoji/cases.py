"""Captions as a strategy, and an atlas that needs no font."""

from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from wadi.emoji.captions import COLOURS, LEADS, PLACES, RELATIONS, SIZES, Caption
from wadi.emoji.glyphs import ATLAS_SIZE, FONT_FILE, NAMES

needs_font = pytest.mark.skipif(not Path(FONT_FILE).is_file(), reason=f"needs {FONT_FILE}")


def _index(values):
    return st.integers(0, len(values) - 1)


_names, _leads, _colours = _index(NAMES), _index(LEADS), st.none() | _index(COLOURS)
captions = st.builds(
    Caption,
    emoji=st.tuples(_names),
    size=st.none() | _index(SIZES),
    place=st.none() | _index(PLACES),
    background=_colours,
    lead=_leads,
) | st.builds(
    Caption,
    emoji=st.tuples(_names, _names),
    relation=_index(RELATIONS),
    background=_colours,
    lead=_leads,
)


def synthetic_atlas():
    """Opaque white squares, of emoji 1 only the left half; emoji 2 is half-clear red; uint8."""
    atlas = torch.full((len(NAMES), 4, ATLAS_SIZE, ATLAS_SIZE), 255, dtype=torch.uint8)
    atlas[1, :, :, ATLAS_SIZE // 2 :] = 0
    atlas[2] = torch.tensor([128, 0, 0, 128], dtype=torch.uint8)[:, None, None]
    return atlas
