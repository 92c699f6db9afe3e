"""Files are written whole or not at all, whatever fails, and every failure is one line."""

import os

import pytest
import torch

from tests.files import full_disk
from wadi.errors import WadiError
from wadi.files import (
    load_tensors,
    read_json,
    replacing_file,
    save_tensors,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_json_and_tensors_come_back(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "grüße\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "grüße\n".encode()
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    tensors = {"w": torch.randn(3, 4).T, "b": torch.zeros(2, dtype=torch.bfloat16)}  # w is not contiguous
    save_tensors(tmp_path / "a.safetensors", tensors, {"who": "me"})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert names(tmp_path) == ["a.json", "a.safetensors", "deep"]


@pytest.mark.parametrize("failure", [full_disk, KeyboardInterrupt, ValueError])
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted():
        with replacing_file(path) as temporary:
            temporary.write_text("half of the n")
            if failure is full_disk:
                full_disk()
            raise failure

    with pytest.raises(WadiError if failure is full_disk else failure):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("broken", ["os.replace", "pathlib.Path.mkdir"])
def test_failing_system_calls_are_one_line(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(broken, full_disk)
    with pytest.raises(WadiError, match=r"new/a\.txt: could not write the file: No space left") as caught:
        write_text(tmp_path / "new" / "a.txt", "text")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / "a.txt").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path):
    def fill():
        with replacing_file(tmp_path / "a.txt") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x" * 100_000)

    with pytest.raises(WadiError, match="No space left on device"):
        fill()
    assert names(tmp_path) == []


def test_tensors_on_a_full_disk(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(WadiError, match="No space left"):
        save_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    assert load_tensors(tmp_path / "a.safetensors")["w"].tolist() == [1, 1]
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("reader", [read_json, load_tensors])
@pytest.mark.parametrize("content", [None, b"", b"{not json", b"\x80\x04pickle"])
def test_unreadable_files_are_one_line(tmp_path, reader, content):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WadiError, match=str(path)) as caught:
        reader(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_tensors_are_written_with_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
