"""Checkpoints are whole or absent, checked when read, and pruned oldest first."""

import errno

import pytest
import safetensors.torch
import torch

from wadi.distill.checkpoint import FORMAT, latest_checkpoint, load_checkpoint, save_checkpoint
from wadi.errors import WadiError, WadiWarning
from wadi.outputs import MARKER

GROUPS = {"student": {"a": torch.arange(3.0)}, "fake": {"b": torch.ones(2, 2)}}


def save(folder, step, limit=None, groups=GROUPS):
    return save_checkpoint(folder, step, groups, {"config": "abc", "seconds": 1.5}, limit)


def test_round_trip(tmp_path):
    path = save(tmp_path / "checkpoints", 7)
    assert {p.name for p in path.iterdir()} == {
        "fake.safetensors",
        "state.json",
        "student.safetensors",
        MARKER,
    }
    groups, state = load_checkpoint(path, GROUPS, "abc")
    assert state == {"format": FORMAT, "step": 7, "config": "abc", "seconds": 1.5}
    assert all(torch.equal(groups[g][k], GROUPS[g][k]) for g in GROUPS for k in GROUPS[g])


def test_oldest_go_first_whatever_their_number_of_digits(tmp_path):
    for step in (2, 999_999, 10, 1_000_000):
        save(tmp_path, step)
    save(tmp_path, 1_000_001, limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    assert latest_checkpoint(tmp_path).name == "step-1000001"


def test_an_old_checkpoint_with_a_file_of_the_user_stays(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-000000").mkdir()
    (tmp_path / "step-000000" / "letter.txt").write_text("mine")
    with pytest.warns(WadiWarning, match=r"kept, because it holds (notes|letter)\.txt"):
        save(tmp_path, 3, limit=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000", "step-000001", "step-000003"]
    assert (tmp_path / "step-000001" / "student.safetensors").exists()


def test_half_written_folders_do_not_count(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-000009.xyz.tmp").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-000001"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_full_disk_leaves_one_line_and_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = safetensors.torch.save_file

    def save_file(tensors, path, metadata=None):
        if "b" in tensors:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(WadiError, match="No space left on device") as error:
        save(tmp_path, 2, limit=1)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "state.json").unlink(), "state.json"),
        (lambda path: (path / "state.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "state.json").write_text("[1]"), "is damaged, because it holds no"),
        (
            lambda path: (path / "state.json").write_text(f'{{"format": {FORMAT}, "step": 1}}'),
            "other options",
        ),
        (
            lambda path: (path / "state.json").write_text('{"step": 1, "config": "abc"}'),
            "another version of wadi .checkpoint format 0, not 2.; start a new run",
        ),
        (
            lambda path: (path / "state.json").write_text('{"format": 1, "config": "abc"}'),
            "another version of wadi .checkpoint format 1, not 2.; start a new run",
        ),
        (lambda path: (path / "fake.safetensors").unlink(), "fake.safetensors"),
        (lambda path: (path / "fake.safetensors").write_bytes(b"\0" * 20), "fake.safetensors"),
        (
            lambda path: save(path.parent, 7, groups={**GROUPS, "fake": {"b": torch.ones(2, 3)}}),
            "does not fit",
        ),
        (
            lambda path: save(path.parent, 7, groups={**GROUPS, "fake": {"c": torch.ones(2, 2)}}),
            "does not fit",
        ),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, damage, message):
    path = save(tmp_path, 7)
    damage(path)
    with pytest.raises(WadiError, match=message) as error:
        load_checkpoint(path, GROUPS, "abc")
    assert "\n" not in str(error.value)
