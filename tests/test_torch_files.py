"""Weights are read from files of torch.save as data, and nothing in such a file is run."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wadi.errors import WadiError
from wadi.torch_files import read_torch_file

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16]
FORMS = [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}, {"pickle_protocol": 5}]


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].double(), tensor.detach().double()), name


@st.composite
def states(draw):
    """State dicts whose tensors may be views of the same numbers."""
    storages = [
        (torch.rand(draw(st.integers(1, 30))) * 100).to(draw(st.sampled_from(DTYPES)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    state = OrderedDict()
    for number in range(draw(st.integers(1, 6))):
        whole = draw(st.sampled_from(storages))
        size = draw(st.lists(st.integers(0, 3), max_size=3))
        stride = draw(st.lists(st.integers(0, 3), min_size=len(size), max_size=len(size)))
        last = sum(max(n - 1, 0) * step for n, step in zip(size, stride, strict=True))
        view = whole
        if last < len(whole):
            view = whole.as_strided(size, stride, draw(st.integers(0, len(whole) - 1 - last)))
        if view.is_floating_point() and view.dtype.itemsize > 1 and draw(st.booleans()):
            view = torch.nn.Parameter(view)
        state[draw(st.text(min_size=1, max_size=5)) + str(number)] = view
    return state


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states(), st.sampled_from(FORMS), st.sampled_from([None, "state_dict", "model"]))
def test_what_torch_saved_is_read(tmp_path, state, form, wrapper):
    content = (
        state if wrapper is None else {"epoch": 3, "lr": 0.1, wrapper: state, "by": [None, (True, b"x")]}
    )
    torch.save(content, tmp_path / "x.pt", **form)
    found, beside = read_torch_file(tmp_path / "x.pt")
    check_equal(found, state)
    assert beside == ([] if wrapper is None else ["epoch", "lr", "by"])


def test_a_module_with_buffers_and_versions(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    torch.save(module.state_dict(), tmp_path / "x.bin")
    check_equal(read_torch_file(tmp_path / "x.bin")[0], module.state_dict())


class Calls:
    """Unpickling calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["tensor", "beside", "whole"])
@pytest.mark.parametrize(
    ("function", "named"), [(os.system, "system"), (eval, "eval"), (torch.load, "torch.serialization.load")]
)
def test_nothing_is_run(tmp_path, form, place, function, named):
    run = tmp_path / "run"
    argument = f"touch {run}" if function is os.system else f"open({str(run)!r}, 'w')"
    wrong = Calls(function, argument)
    state = {"weight": torch.ones(3)}
    content = {"tensor": {**state, "b": wrong}, "beside": {"state_dict": state, "b": wrong}, "whole": wrong}
    torch.save(content[place], tmp_path / "x.ckpt", **form)
    with pytest.raises(WadiError, match=rf"x.ckpt: names '\S*{named}', which no state dict needs") as raised:
        read_torch_file(tmp_path / "x.ckpt")
    assert "\n" not in str(raised.value)
    assert not run.exists()


def test_whole_modules_and_sparse_tensors_are_refused(tmp_path):
    for content, named in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(WadiError, match=f"names '.*{named}'"):
            read_torch_file(tmp_path / "x.pt")


def as_zip(content, path, records=(), root="archive"):
    """A file in the form of torch.save, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", content)
        for name, value in dict(records).items():
            archive.writestr(f"{root}/{name}", value)


def described(size=(2,), stride=(1,), offset=0, count=4, key="0", more=()):
    """The pickle of one float tensor, with any numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", count) if value is described else None

    arguments = described, offset, size, stride, False, OrderedDict(), *more
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": Calls(torch._utils._rebuild_tensor_v2, *arguments)})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": (5,)}, "outside its storage"),
        ({"stride": (4,)}, "outside its storage"),
        ({"offset": 3}, "outside its storage"),
        ({"offset": -1}, "outside"),
        ({"size": (2, 2), "stride": (1, -1), "offset": 2}, "outside"),
        ({"size": (-1,)}, "outside"),
        ({"count": 8}, "outside the file"),
        ({"count": -1}, "outside"),
        ({"key": "1"}, "lacks its part 'data/1'"),
        ({"key": "../../x\n"}, r"lacks its part 'data/../../x\\n'"),
        ({"size": (2, 2)}, "damaged"),
        ({"size": ("2",)}, "damaged"),
        ({"size": (2**70,)}, "outside its storage"),
        ({"size": (0, 2**70)}, "damaged"),
        ({"more": ({"neg": True},)}, "negative or conjugate"),
    ],
)
def test_contradictions(tmp_path, wrong, said):
    as_zip(described(), tmp_path / "x.pt", {"data/0": torch.arange(4.0).numpy().tobytes()})
    check_equal(read_torch_file(tmp_path / "x.pt")[0], {"a": torch.arange(2.0)})
    as_zip(described(**wrong), tmp_path / "x.pt", {"data/0": bytes(16)})
    with pytest.raises(WadiError, match=said) as raised:
        read_torch_file(tmp_path / "x.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", FORMS[:2])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_has_the_shapes_and_types(tmp_path, form, data):
    """Cut or changed anywhere: one line, or a state dict. A zip file has a checksum of its numbers too."""
    state = {"a": torch.arange(40.0), "b": torch.ones(3, 4)}
    torch.save(state, tmp_path / "x.pt", **form)
    content = bytearray((tmp_path / "x.pt").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if cut := data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "x.pt").write_bytes(content)
    refused = ""
    try:
        found, _ = read_torch_file(tmp_path / "x.pt")
    except WadiError as error:
        refused, found = str(error), state
    assert refused.startswith(f"{tmp_path / 'x.pt'}: ") or not (refused or cut)
    assert "\n" not in refused
    assert all(isinstance(name, str) for name in found)
    if not form and found.keys() == state.keys():
        check_equal(found, state)


def nested(depth):
    """A pickle that hashes a tuple of this depth."""
    return b"\x80\x02}" + b")" + b"\x85" * depth + b"K\x01s."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "no file of torch.save"),
        (b"<!DOCTYPE html>", "no file of torch.save"),
        (pickle.dumps({"a": 1}), "no file of torch.save"),
        (pickle.dumps(os.system), "names '.*system'"),
        (nested(1_000_000), "keys that are no names"),
        (b"\x80\x02" + b"]q\x00" + b"h\x00a" * 10 + b".", "no file of torch.save"),
        (b"\x80\x02Ibuiltins\n.", "no file of torch.save"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f", "no file of torch.save"),
        (b"\x80\x02iposix\nsystem\n.", "instruction INST"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, content, said):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(WadiError, match=said) as raised:
        read_torch_file(tmp_path / "x.bin")
    assert "\n" not in str(raised.value)


def test_other_zip_files(tmp_path):
    content = {"epoch": 1}
    as_zip(pickle.dumps(content | {"state_dict": content}, 2), tmp_path / "empty.pt")
    content["state_dict"] = content
    as_zip(pickle.dumps(content, 2), tmp_path / "circle.pt")
    as_zip(pickle.dumps({"a": 1}, 2), tmp_path / "numbers.pt")
    as_zip(described(), tmp_path / "big.pt", {"data/0": bytes(16), "byteorder": "big"})
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", described())
    for name, said in (
        ("numbers", "holds no state dict"),
        ("empty", "holds no state dict"),
        ("circle", "holds no state dict"),
        ("big", "another order of bytes"),
        ("other", "is a zip file, but not of torch.save"),
        ("small", "is compressed"),
    ):
        with pytest.raises(WadiError, match=f"{name}.pt: .*{said}"):
            read_torch_file(tmp_path / f"{name}.pt")
    with pytest.raises(WadiError, match="could not read the file"):
        read_torch_file(tmp_path / "nowhere.pt")
    with pytest.raises(WadiError, match="could not read the file"):
        read_torch_file(tmp_path)
