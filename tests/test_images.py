"""One reader of images and masks: what a file shows does not depend on how it was saved."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from PIL import Image

from wadi.errors import WadiError, WadiWarning
from wadi.images import image_files, open_image, open_mask

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))
COLOURS = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], axis=-1)


def shown(path):
    """What `open_image` reads, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        return np.asarray(open_image(path)).astype(int)


GREYS = {
    "8 bits": ("a.png", lambda: Image.fromarray(RAMP)),
    "16 bits": ("a.png", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "16 bits, TIFF": ("a.tif", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "16 bits, big endian": ("a.tiff", lambda: Image.fromarray(RAMP.astype(">u2") * 257)),
    "32 bits": ("a.tif", lambda: Image.fromarray(RAMP.astype(np.int32) * 257)),
    "floating point": ("a.tif", lambda: Image.fromarray(RAMP.astype(np.float32) / 255)),
    "opaque alpha": ("a.png", lambda: Image.fromarray(np.stack([RAMP, np.full_like(RAMP, 255)], -1), "LA")),
    "palette": ("a.png", lambda: Image.fromarray(RAMP).convert("P")),
    "upper-case suffix": ("A.PNG", lambda: Image.fromarray(RAMP)),
    "another format than its suffix": ("a.bmp", lambda: Image.fromarray(RAMP)),
}


@pytest.mark.parametrize("kind", GREYS)
def test_the_same_greys_of_every_kind_of_file(tmp_path, kind):
    name, make = GREYS[kind]
    make().save(tmp_path / name, "PNG" if name.lower().endswith(("png", "bmp")) else "TIFF")
    found = shown(tmp_path / name)
    assert abs(found - RAMP[..., None].astype(int)).max() <= 1
    assert abs(np.asarray(open_mask(tmp_path / name)).astype(int) - RAMP).max() <= 1


@given(values=arrays(np.uint16, (3, 5)))
def test_sixteen_bits_are_scaled_not_clipped(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("images") / "depth.png"
    Image.fromarray(values).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WadiWarning)  # some are nearly black
        found = np.asarray(open_image(path))[..., 0]
    assert abs(found - values / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (np.array([[0, 5e4, 1e5]], np.int32), 0, 1e5),
        (np.array([[-10, 0, 10]], np.int32), -10, 10),
        (np.array([[0.5, 2, 8]], np.float32), 0.5, 8),
    ],
)
def test_values_beyond_the_usual_range_are_scaled_and_told(tmp_path, values, low, high):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.warns(WadiWarning, match=r"a\.tif: its values from .* are scaled"):
        found = np.asarray(open_image(tmp_path / "a.tif"))[..., 0]
    assert abs(found - (values - low) / (high - low) * 255).max() <= 0.5


def test_a_nearly_black_one_is_told(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "a.png")
    with pytest.warns(WadiWarning, match="at most 200 of 65535, so it is nearly black"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """A black image whose left half is transparent, by alpha or by a colour that stands for nothing."""
    alpha = np.full((4, 8), 255, np.uint8)
    alpha[:, :4] = 0
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 4))
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / "a.png")
    else:
        image = Image.fromarray(255 - alpha).convert(mode)  # white where it is transparent
        clear = {"P": image.getpixel((0, 0)), "RGB": (255, 255, 255)}.get(mode, 255)
        image.save(tmp_path / "a.png", transparency=clear)
    found = shown(tmp_path / "a.png")
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_masks_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS[:4, ::8]).save(tmp_path / "a.png", exif=exif)
    turned = orientation >= 5
    assert open_image(tmp_path / "a.png").size == ((4, 8) if turned else (8, 4))
    assert open_mask(tmp_path / "a.png").size == ((4, 8) if turned else (8, 4))


def test_damaged_exif_does_not_hide_an_image(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert open_image(tmp_path / "a.jpg").size == (64, 8)


def test_cmyk_has_its_colours(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, *others = open_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 220
    assert max(others) < 60


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_of_several_images_in_a_file_the_first_is_read_and_it_is_told(tmp_path, suffix):
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == ".webp" else {}
    pages[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=pages[1:], **options)
    with pytest.warns(WadiWarning, match="holds 3 images; only the first is read"):
        assert open_image(tmp_path / f"a{suffix}").getpixel((4, 4)) == (255, 0, 0)


def test_the_preview_that_a_camera_puts_into_a_jpeg_is_not_told(tmp_path):
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    images[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=images[1:])
    assert abs(shown(tmp_path / "a.jpg") - (255, 0, 0)).max() < 5


def whole(suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tif"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.7])
@pytest.mark.parametrize("read", [open_image, open_mask])
def test_a_truncated_file_is_one_line(tmp_path, suffix, share, read):
    content = whole(suffix)
    (tmp_path / f"a{suffix}").write_bytes(content[: int(share * len(content))])
    with pytest.raises(WadiError, match=rf"a\{suffix}: ") as error:
        read(tmp_path / f"a{suffix}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "could not read the image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "could not read the image"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ", "could not read the image"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(WadiError, match=message):
        open_image(tmp_path / "a.png")
    with pytest.raises(WadiError, match="no such image"):
        open_image(tmp_path / "none.png")
    with pytest.raises(WadiError, match="could not read the image"):
        open_image(tmp_path)


def test_an_image_that_would_fill_the_memory_is_one_line(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(WadiError, match=r"more than .* million pixels; make it smaller"):
        open_image(tmp_path / "a.png")


# --- masks ---

SHAPE = np.zeros((8, 8), np.uint8)
SHAPE[2:5, 3:7] = 255
PHOTO = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def layers(colours, alpha):
    colours = np.broadcast_to(np.asarray(colours, np.uint8), (8, 8, 3))
    return Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8), "RGBA")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(SHAPE), None),
        (layers(SHAPE[..., None], np.full((8, 8), 255)), None),
        (layers((255, 255, 255), SHAPE), "one colour"),
        (layers((200, 0, 0), SHAPE), "one colour"),
        (layers((0, 0, 0), SHAPE), "one colour"),
        (
            layers(
                np.where(SHAPE[..., None] > 0, 255, 0),
                np.where(np.arange(8) > 0, 255, 0)[None] * np.ones((8, 1)),
            ),
            "black and white",
        ),
        (layers(PHOTO, 255 - SHAPE), "image with transparent parts"),
    ],
    ids=["grey", "opaque", "white layer", "red layer", "black layer", "black and white", "photo with a hole"],
)
def test_a_mask_means_the_same_shape_however_it_is_drawn(tmp_path, mask, message):
    mask.save(tmp_path / "mask.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = np.asarray(open_mask(tmp_path / "mask.png"))
    assert (found == SHAPE).all()
    assert [message in str(one.message) for one in told] == ([True] if message else [])


def test_a_mask_on_which_nothing_is_drawn(tmp_path):
    layers((255, 255, 255), np.zeros((8, 8))).save(tmp_path / "mask.png")
    with pytest.raises(WadiError, match="is completely transparent"):
        open_mask(tmp_path / "mask.png")


# --- folders ---


def test_only_the_images_of_a_folder_are_listed(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.TIF"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    for name in ("._a.jpeg", ".hidden.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\x05\x16\x07")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        found = image_files(tmp_path)
        assert [path.name for path in found] == ["a.jpeg", "b.PNG", "c.TIF"]
        assert image_files(tmp_path, below=True) == found


def test_images_that_are_not_read_are_told(tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "more" / "b.png")
    with pytest.raises(WadiError, match=r"has no images .* it has 1 images in sub-folders, such as more"):
        image_files(tmp_path)
    assert [path.name for path in image_files(tmp_path, below=True)] == ["b.png"]
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.warns(WadiWarning, match="1 images in sub-folders are skipped"):
        assert [path.name for path in image_files(tmp_path)] == ["a.png"]
    (tmp_path / "c.HEIC").write_bytes(b"x")
    with pytest.warns(WadiWarning, match="1 images of a format that is not read are skipped, such as c.HEIC"):
        image_files(tmp_path, below=True)
    with pytest.raises(WadiError, match="no such folder"):
        image_files(tmp_path / "none")
