"""Folders of pictures: what is read, and what is said of those that cannot be."""

import json

import pytest
from PIL import Image

from wadi import WadiError
from wadi.tasks.exemplars import cropped, read_exemplars


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / name)
    return tmp_path


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def test_pictures_come_in_the_order_of_their_names_and_other_files_do_not_count(folder):
    (folder / "notes.md").write_text("nothing")
    exemplars = read_exemplars(folder)
    assert [path.name for path in exemplars.paths] == ["a.jpg", "b.png"]
    assert len(exemplars.images) == 2
    assert exemplars.images[1].getpixel((0, 0)) == (255, 0, 0)
    assert exemplars.captions is None


def test_captions_of_a_table_in_either_form_and_of_text_files(folder):
    rows = [{"file_name": "b.png", "text": "a  b\nc"}, {"file_name": "a.jpg", "text": "d"}]
    write_rows(folder, rows)
    assert read_exemplars(folder).captions == ("d", "a b c")
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\nb.png,"a, b"\na.jpg,d\n')
    assert read_exemplars(folder).captions == ("d", "a, b")
    (folder / "metadata.csv").unlink()
    (folder / "a.txt").write_text("e\n")
    (folder / "b.txt").write_text("f")
    assert read_exemplars(folder).captions == ("e", "f")


def test_a_picture_is_turned_upright_and_cut_to_its_middle(folder):
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(folder / "c.png", exif=exif)
    upright = read_exemplars(folder).images[2]
    assert upright.size == (10, 30)
    assert cropped(upright, 4, 5).size == (5, 4)
    assert max(cropped(upright, 5, 5).getpixel((2, 2))[1:]) < 10  # red, up to resampling


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "c.png").write_text("no picture"), "c.png: could not read"),
        (
            lambda f: write_rows(f, [{"file_name": "a.jpg", "text": "d"}]),
            "1 of 2 images have no caption, such as b",
        ),
        (lambda f: write_rows(f, [{"file": "a.jpg"}]), "every row needs file_name and text"),
        (lambda f: (f / "metadata.jsonl").write_text("{"), "line 1 is not valid JSON"),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xff"), "a.txt: is UTF-16 text"),
    ],
)
def test_what_cannot_be_read_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(WadiError, match=message):
        read_exemplars(folder)


def test_a_folder_without_pictures_and_no_folder(tmp_path):
    with pytest.raises(WadiError, match="has no images"):
        read_exemplars(tmp_path)
    with pytest.raises(WadiError, match="no such folder"):
        read_exemplars(tmp_path / "nowhere")
