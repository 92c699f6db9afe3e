"""The gallery runs the commands that it shows, and the committed page is what it writes."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def gallery(monkeypatch):
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gallery", module)
    spec.loader.exec_module(module)
    return module


def test_page_and_pictures_are_there(gallery):
    assert (DOCS / "gallery.md").read_text() == gallery.page(gallery.ENTRIES)
    pictures = {entry.picture for entry in gallery.ENTRIES}
    assert all((DOCS / picture).is_file() for picture in pictures)
    gone = {f"images/gallery/{path.name}" for path in (DOCS / "images" / "gallery").iterdir()} - pictures
    assert not gone


def test_entries_write_their_own_pictures(gallery):
    names = [entry.name for entry in gallery.ENTRIES]
    assert len(set(names)) == len(names)
    for number, entry in enumerate(gallery.ENTRIES):
        assert entry.made_by or entry.commands[-1].endswith(f"--out {entry.file}")
        assert set(entry.needs) <= set(names[:number])


def test_a_part_of_it(gallery, tmp_path):
    gallery.main(gallery.Options(out=tmp_path, only=("image-to-image",)))
    page = (tmp_path / "gallery.md").read_text()
    assert page.count("![") == 3  # before and after, panda, image to image
    assert 'wadi image-to-image panda.png --prompt "a tiger"' in page
    pictures = {path.stem: Image.open(path) for path in (tmp_path / "images" / "gallery").iterdir()}
    assert set(pictures) == {"panda", "image-to-image"}
    assert pictures["panda"].size == (64, 64)
    assert np.asarray(pictures["image-to-image"]).std() > 30
    shown = Image.open(DOCS / "images" / "gallery" / "panda.png")
    difference = np.asarray(pictures["panda"]).astype(int) - np.asarray(shown)
    assert np.abs(difference).max() <= 2  # of 255: another machine rounds otherwise
