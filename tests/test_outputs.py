"""Where a command may write: no file of the user is lost, whatever is named, and whatever fails."""

import errno
import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.files import full_disk
from wadi.errors import WadiError, WadiWarning
from wadi.onestep.grids import KINDS, image_output, save_image, write_image
from wadi.outputs import MARKER, Output, remove_written


def contents(folder):
    """Every name below a folder, with the bytes of files and the targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def write(path, text="new", command="export", **options):
    """What a command does: two files, one of them in a folder below."""
    with Output(path, command, **options).writing() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text)
        (folder / "index").write_text(text)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder of a user, with a home beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "before", ["absent", "below others that are absent", "empty", "link to an empty one"]
)
def test_new_and_empty_folders_are_written_and_say_by_whom(place, before):
    path = place / "a" / "b" if "below" in before else place / "out"
    if before == "empty":
        path.mkdir()
    if before.startswith("link"):
        (place / "elsewhere").mkdir()
        path.symlink_to("elsewhere")
    write(path)
    assert json.loads((path / MARKER).read_text()) == {"command": "export", "files": ["index", "sub/weights"]}
    assert path.is_symlink() == before.startswith("link")
    beside = {path.name, "elsewhere"} if path.is_symlink() else {path.name}
    assert {other.name for other in path.parent.iterdir()} == beside


def foreign(path):
    path.mkdir()
    (path / "letter.txt").write_text("mine")


def only_hidden(path):
    path.mkdir()
    (path / ".git").mkdir()


def of_another_command(path):
    write(path, command="average")


def with_an_addition(path):
    write(path)
    (path / "sub" / "notes.txt").write_text("mine")


def with_an_empty_folder_added(path):
    write(path)
    (path / "empty").mkdir()


def with_a_link_added(path):
    write(path)
    (path / "link").symlink_to("/")


def with_a_folder_moved_and_linked(path):
    write(path)
    shutil.move(path / "sub", path.parent / "moved")
    (path / "sub").symlink_to("../moved")


def with_a_broken_marker(path):
    write(path)
    (path / MARKER).write_text("{")


def a_marker_of_lies(path):
    foreign(path)
    (path / MARKER).write_text('{"command": "export", "files": ["../here", "/", ".."]}')


def a_file(path):
    path.write_text("mine")


def link_to_foreign(path):
    foreign(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


NEVER = [
    foreign,
    only_hidden,
    of_another_command,
    with_an_addition,
    with_an_empty_folder_added,
    with_a_link_added,
    with_a_folder_moved_and_linked,
    with_a_broken_marker,
    a_marker_of_lies,
    a_file,
    link_to_foreign,
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", NEVER, ids=lambda make: make.__name__)
def test_what_the_command_did_not_write_stays(place, make, overwrite):
    make(place / "out")
    before = contents(place)
    with pytest.raises(WadiError, match=r"out: ") as caught:
        write(place / "out", overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert contents(place) == before


@pytest.mark.parametrize(
    "spelling", ["out", "./out", "out/", "out/../out", "absent/../out", "link", "{place}/out"]
)
def test_its_own_folder_is_replaced_only_when_told(place, spelling):
    write(place / "out", "old")
    (place / "link").symlink_to("out")
    before, path = contents(place), spelling.format(place=place)
    with pytest.raises(WadiError, match="--overwrite"):
        write(path)
    assert contents(place) == before
    write(path, overwrite=True)
    assert contents(place) == before | {"out/index": b"new", "out/sub/weights": b"new"}


PROTECTED = [
    ".",
    "..",
    "/",
    "../here",
    "../here/",
    "../home",
    "~",
    "absent/..",
    "link",
    "../here/../here",
    "",
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("spelling", PROTECTED)
def test_the_current_folder_and_the_home_are_never_replaced(place, spelling, overwrite):
    (place / "link").symlink_to("..")
    with pytest.raises(WadiError, match=r"holds the (current|home) folder"):
        write(os.path.expanduser(spelling), overwrite=overwrite)


def test_not_even_where_they_are_empty_or_written_by_the_command(place, monkeypatch):
    write(place / "out" / "in", command="average")
    write(place / "out" / "own")
    for where in ("out/in", "out/own"):
        monkeypatch.chdir(place / where)
        with pytest.raises(WadiError, match="holds the current folder"):
            write(".", command="average", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "read"),
    [
        ("own", "own"),
        ("own", "own/sub"),
        ("own", "own/sub/weights"),
        ("own", "link"),
        ("link", "own"),
        ("own/sub/..", "own/index"),
        ("org/model", "org/model"),  # a hub id, of which the new folder would take the place
        ("org", "org/model"),
    ],
)
def test_what_is_read_is_never_replaced(place, out, read, overwrite):
    write(place / "own")
    (place / "link").symlink_to("own")
    before = contents(place)
    with pytest.raises(WadiError, match=r"is or holds .*, which is read"):
        write(out, inputs=(None, "other/hub-id", read), overwrite=overwrite)
    assert contents(place) == before


def test_another_name_of_the_same_folder_is_found_by_the_file_system(place, monkeypatch):
    """As where capitals do not count, which cannot be had here: two names of one folder."""
    write(place / "own")
    (place / "Own").symlink_to("own")
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    with pytest.raises(WadiError, match="is or holds Own, which is read"):
        Output("own", "export", inputs=("Own",), overwrite=True).check()


@pytest.mark.parametrize("name", ["a.safetensors", "a.png", "a.JSON", "deep/a.bin"])
def test_a_file_s_name_makes_no_folder(place, name):
    with pytest.raises(WadiError, match="a folder is written here; omit the"):
        write(name)
    assert contents(place) == {}
    write("stable-diffusion-v1.5")


def test_below_a_file_there_is_no_folder(place):
    (place / "a").write_text("")
    with pytest.raises(WadiError, match=r"a/out: .*a is a file"):
        write("a/out")


# --- failures ---


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), ValueError()]
)
def test_a_failure_while_writing_leaves_the_old_folder(place, failure):
    write("out", "old")
    before = contents(place)

    def fail():
        with Output("out", "export", overwrite=True).writing() as folder:
            (folder / "index").write_text("half of the n")
            raise failure

    with pytest.raises(WadiError if isinstance(failure, OSError) else type(failure)):
        fail()
    assert contents(place) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failing_rename_leaves_the_old_folder(place, monkeypatch, call):
    """The first one is the marker's, the second moves the old folder aside, the third brings the new one."""
    write("out", "old")
    before, rename, calls = contents(place), os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) == call:
            full_disk()
        rename(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(WadiError, match="No space left"):
        write("out", overwrite=True)
    monkeypatch.undo()
    assert contents(place) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_the_command_works_stays(place, overwrite):
    if overwrite:
        write("out", "old")
    (place / "out").mkdir(exist_ok=True)

    def work():
        with Output(place / "out", "export", overwrite=overwrite).writing() as folder:
            (folder / "index").write_text("new")
            (place / "out" / "letter.txt").write_text("mine")

    with pytest.raises(WadiError, match="out: "):
        work()
    assert (place / "out" / "letter.txt").read_text() == "mine"
    assert [path.name for path in place.iterdir()] == ["out"]


names = st.lists(st.sampled_from(["a", "b", "c/d", "c/e/f", "sub/weights", "index"]), unique=True)


@given(written=names, later=names, overwrite=st.booleans())
def test_a_folder_is_replaced_exactly_if_all_that_is_in_it_was_written(place, written, later, overwrite):
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    with Output(out, "export").writing() as folder:
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("old")
    for name in later:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = contents(out)
    if set(later) <= set(written) and (overwrite or not written):
        write(out, overwrite=overwrite)
        assert set(contents(out)) == {MARKER, "index", "sub", "sub/weights"}
    else:
        with pytest.raises(WadiError):
            write(out, overwrite=overwrite)
        assert contents(out) == before


def test_only_what_was_written_is_removed(place):
    write("out")
    assert remove_written(place / "out")
    write("out")
    (place / "out" / "letter.txt").write_text("mine")
    with pytest.warns(WadiWarning, match=r"kept, because it holds letter\.txt"):
        assert not remove_written(place / "out")
    assert (place / "out" / "index").exists()


# --- folders that are gone on with ---


def test_a_command_goes_on_only_in_its_own_folder(place):
    (place / "empty").mkdir()
    for name in ("new", "empty"):
        for _ in range(2):
            Output(name, "evaluate", resume=True).open()
            (place / name / "result").write_text("1")
    write("exported")
    (place / "foreign").mkdir()
    (place / "foreign" / "letter.txt").write_text("mine")
    for name in ("exported", "foreign", "."):
        with pytest.raises(WadiError, match=f"^{name}: "):
            Output(name, "evaluate", resume=True).open()


# --- files ---


def atlas(path, text="new", **options):
    with Output(path, "emoji atlas", suffixes=(".txt", ".csv"), **options).writing() as temporary:
        temporary.write_text(text)


def test_files_are_written_once_or_when_told(place):
    atlas("deep/a.txt", "old")
    with pytest.raises(WadiError, match=r"a\.txt: exists; give --overwrite"):
        atlas("deep/a.txt")
    assert (place / "deep" / "a.txt").read_text() == "old"
    atlas("deep/a.txt", overwrite=True)
    (place / "link.txt").symlink_to("deep/a.txt")
    atlas("link.txt", "through the link", overwrite=True)
    assert (place / "link.txt").is_symlink()
    assert (place / "deep" / "a.txt").read_text() == "through the link"


def test_a_file_that_appears_meanwhile_stays(place):
    def work():
        with Output("a.txt", "emoji atlas", suffixes=(".txt",)).writing() as temporary:
            temporary.write_text("new")
            (place / "a.txt").write_text("mine")

    with pytest.raises(WadiError, match="exists"):
        work()
    assert contents(place) == {"a.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a", r"must end in \.txt, \.csv"),
        ("a.png", r"must end in \.txt, \.csv"),
        ("folder", "is a folder; name a file"),
        ("..", "which is read"),
        ("pipe.txt", "no regular file"),
        ("read.txt", "which is read"),
        ("hard.txt", "which is read"),
    ],
)
def test_what_is_no_place_for_a_file(place, name, message):
    (place / "folder").mkdir()
    (place / "read.txt").write_text("mine")
    os.link("read.txt", "hard.txt")
    os.mkfifo("pipe.txt")
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(WadiError, match=message):
        atlas(name, inputs=("read.txt",), overwrite=True)
    assert sorted(path.name for path in place.iterdir()) == before


# --- images ---


@pytest.mark.parametrize("suffix", KINDS)
def test_an_image_says_which_command_wrote_it_and_that_may_replace_it(place, suffix):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    path = place / f"o{suffix}"

    def shown():
        with Image.open(path) as image:
            return image.convert("RGB").getpixel((4, 4))

    write_image(red, image_output(path, "generate"))
    write_image(blue, image_output(path, "generate"))
    assert shown()[2] > 200
    with pytest.raises(WadiError, match="exists; give --overwrite"):
        write_image(red, image_output(path, "control"))
    assert shown()[2] > 200
    write_image(red, image_output(path, "control", overwrite=True))
    assert shown()[0] > 200
    with pytest.raises(WadiError, match="which is read"):
        image_output(path, "control", inputs=(path,), overwrite=True).check()


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("kind", ["an image", "no image"])
def test_images_of_others_stay(place, suffix, kind):
    path = place / f"o{suffix}"
    if kind == "an image":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_text("mine")
    before = contents(place)
    with pytest.raises(WadiError, match="exists; give --overwrite"):
        save_image(Image.new("RGB", (8, 8)), path)
    assert contents(place) == before
    save_image(Image.new("RGB", (8, 8)), path, overwrite=True)
