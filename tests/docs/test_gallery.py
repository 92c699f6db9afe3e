"""The gallery runs the commands that it shows, and the page in the repository is what they are."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wadi.errors import WadiError

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


def test_what_trains_is_shown_and_not_run(gallery, tmp_path, monkeypatch):
    trained = gallery.Entry("trained", "T", "Words.", ("wadi no-such",), made_by="python benchmarks/t.py")
    monkeypatch.setattr(gallery, "ENTRIES", (trained,))
    with pytest.raises(WadiError, match=r"trained\.jpg: is missing; run python benchmarks/t\.py"):
        gallery.main(gallery.Options(out=tmp_path))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "trained.jpg")
    gallery.main(gallery.Options(out=tmp_path))
    page = (tmp_path / "gallery.md").read_text()
    assert "the gallery did not run it. The image is from `python benchmarks/t.py`" in page
    assert "![T.](images/trained.jpg)" in page


def test_without_an_optional_library_the_picture_stays_or_is_left_out(gallery, tmp_path, monkeypatch, capsys):
    cv = gallery.Entry("cv", "C", "W.", ("wadi no-such",), module="no_such_module", package="it")
    monkeypatch.setattr(gallery, "ENTRIES", (cv,))
    gallery.main(gallery.Options(out=tmp_path))
    told = "cv: needs no_such_module (pip install it); "
    assert capsys.readouterr().err == told + "it is left out\n"
    assert "images/gallery" not in (tmp_path / "gallery.md").read_text()
    kept = tmp_path / "images" / "gallery" / "cv.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"as it was")
    gallery.main(gallery.Options(out=tmp_path))
    assert capsys.readouterr().err == told + "its image is left as it is\n"
    assert "![C.](images/gallery/cv.jpg)" in (tmp_path / "gallery.md").read_text()
    assert kept.read_bytes() == b"as it was"


def test_a_command_that_fails_writes_nothing(gallery, tmp_path, monkeypatch):
    bad = gallery.Entry("bad", "Bad", "", ('wadi generate "a cat" --guidance-scale 3 --out bad.png',))
    monkeypatch.setattr(gallery, "ENTRIES", (bad,))
    start = Path.cwd()
    with pytest.raises(WadiError, match="ended with status 2; nothing was written"):
        gallery.main(gallery.Options(out=tmp_path))
    assert not list(tmp_path.iterdir())
    assert Path.cwd() == start
    other = gallery.Entry("other", "", "", ("python -c pass",))
    monkeypatch.setattr(gallery, "ENTRIES", (other,))
    with pytest.raises(WadiError, match=r"other: its commands wrote no other\.jpg"):
        gallery.main(gallery.Options(out=tmp_path))
    with pytest.raises(WadiError, match="--only: no entry 'panda'; known are other"):
        gallery.chosen(["panda"])
