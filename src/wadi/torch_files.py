"""Read the weights in a file of `torch.save` without unpickling it.

A pickle is a program for a small stack machine, and unpickling runs the functions that it names. Here
`pickletools` lists the instructions, and `_Machine` follows only those that a state dict needs: they build
dicts, lists, tuples, texts, numbers and descriptions of tensors. A name in the stream is looked up in tables
of this file. It is never imported or called, and a name that is not in the tables is refused.
"""

from __future__ import annotations

import functools
import io
import mmap
import os
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wadi.errors import WadiError
from wadi.files import explain_os_errors

TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
"""Suffixes of files that `torch.save` writes."""
UNSAFE = (*TORCH_SUFFIXES, ".pkl", ".msgpack", ".h5")
"""Suffixes of files that are never loaded."""

_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before torch 1.6
_LEGACY_PICKLES = 3  # this number, the protocol, and facts about the system come before the content
_WRAPPERS = ("state_dict", "model", "module", "string_to_param")  # the last one is that of learned words

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_DTYPES = {str(dtype): dtype for dtype in (*_STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2)}
_DTYPES |= {str(dtype): dtype for dtype in (torch.uint16, torch.uint32, torch.uint64)}
_TYPES = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    **_DTYPES,
}
"""Names of storages and dtypes -> the dtype."""
_IGNORED = {"pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"}
_IGNORED |= {"pytorch_lightning.callbacks.ModelCheckpoint", "numpy.dtype", "_codecs.encode"}
_IGNORED |= {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "torch.device"}
_IGNORED |= {"__builtin__.set", "builtins.set"}
"""Names beside the weights in older files of Stable Diffusion; what they would make becomes ``None``."""
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING"}
_VALUES |= {"BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_DEEPEST = 4  # wrappers around a state dict that are opened


class _Name(NamedTuple):
    """A name in the stream. It stays a name."""

    name: str


class _Storage(NamedTuple):
    """The numbers that tensors are views of."""

    key: str
    dtype: torch.dtype
    start: int  # in numbers, from the beginning of the storage in the file
    count: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides in numbers of its dtype."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _RefusedError(Exception):
    """What the stream wants is not what state dicts need."""


def unsafe_message(path: Path, named: Path | None = None) -> str:
    """What to say about a file that is not loaded.

    Args:
        path: the file.
        named: the folder that the user named, if it was not the file; the whole of it is to be converted.
    """
    what = f"has its weights in {path.relative_to(named)}," if named else "is"
    said = f"{named or path}: {what} in a format that can run code"
    if path.suffix.lower() not in TORCH_SUFFIXES:
        return f"{said} when it is read; name a model with .safetensors weights"
    new = "NEW_FOLDER" if named else path.with_suffix(".safetensors")
    return f"{said} when it is read; convert it, which runs nothing: wadi convert {named or path} --out {new}"


def read_torch_file(path: str | os.PathLike) -> tuple[dict[str, Any], list[str]]:
    """Read the state dict in a file of `torch.save`, also of one from before torch 1.6, without unpickling.

    The file is mapped into memory, so a tensor takes memory only where its numbers are used.

    Args:
        path: the file.

    Returns:
        The state dict, with CPU tensors of the stored dtype and other entries as they are; and the names of
        the entries beside it, if it is itself an entry, such as `state_dict`.

    Raises:
        WadiError: the file cannot be read, is damaged, names something that no state dict needs, or holds no
            state dict.
    """
    with explain_os_errors(path, "read the file"):
        size = Path(path).stat().st_size
        if not size:
            raise WadiError(f"{path}: is empty; fetch the file again")
        with open(path, "rb") as opened:
            # a private copy, so that torch may call it writable
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        found, storages = _zipped(path, content) if content[:4] == _ZIP else _legacy(content)
        entries, beside = _state_dict(found)
        return {key: _value(value, content, storages) for key, value in entries.items()}, beside
    except _RefusedError as error:
        raise WadiError(f"{path}: {error}") from None
    except Exception as error:  # a stream that was made to confuse fails in many ways
        raise WadiError(
            f"{path}: is no file of torch.save, or is damaged ({type(error).__name__}); fetch it again or "
            "name another file"
        ) from error


def _state_dict(content: Any) -> tuple[dict[str, Any], list[str]]:
    beside: list[str] = []
    for _ in range(_DEEPEST):  # a dict may hold itself
        if not isinstance(content, Mapping):
            break
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        beside += [str(key) for key in content if key != wrapper]
        content = content[wrapper]
    names = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
    if not names or not any(isinstance(value, _Tensor) for value in content.values()):
        raise _RefusedError("holds no state dict (names and tensors); name a file of weights")
    return dict(content), beside


# where the numbers are


def _zipped(path: str | os.PathLike, content: mmap.mmap) -> tuple[Any, Callable[[str], tuple[int, int]]]:
    """The content of a zip file, and a function from a storage's key to its first byte and its length."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {record.filename: record for record in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise _RefusedError("is incomplete; fetch the file again") from error
    roots = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1]
    roots = [root for root in roots if root.endswith("/") and f"{root}data.pkl" in records]
    if len(roots) != 1:
        raise _RefusedError("is a zip file, but not of torch.save; name another file")

    @functools.cache
    def place(name: str) -> tuple[int, int]:
        record = records.get(f"{roots[0]}{name}")
        if record is None:
            raise _RefusedError(f"lacks its part {name[:100]!r}; fetch the file again")
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise _RefusedError("is compressed or encrypted; write it again with torch.save")
        lengths = struct.unpack_from("<HH", content, record.header_offset + 26)
        start = record.header_offset + 30 + sum(lengths)
        part = memoryview(content)[start : start + record.file_size]
        if len(part) != record.file_size or zlib.crc32(part) != record.CRC:
            raise _RefusedError(f"is damaged (checksum of its part {name[:100]!r}); fetch the file again")
        return start, record.file_size

    start, size = place("data.pkl")
    if f"{roots[0]}byteorder" in records:
        first, length = place("byteorder")
        if content[first : first + length].decode() != sys.byteorder:
            raise _RefusedError("was written on a machine with another order of bytes; write it again here")
    return _Machine().run(io.BytesIO(content[start : start + size])), lambda key: place(f"data/{key}")


def _legacy(content: mmap.mmap) -> tuple[Any, Callable[[str], tuple[int, int]]]:
    """The same for a file from before torch 1.6: pickles, a list of keys, then the numbers of each."""
    if _Machine().run(content) != _LEGACY_MAGIC:
        raise _RefusedError("is no file of torch.save; name another file")
    for _ in range(_LEGACY_PICKLES - 1):
        _Machine().run(content)
    machine = _Machine()
    found, keys = machine.run(content), _Machine().run(content)
    places = {}
    if not all(isinstance(key, str) for key in keys):
        raise TypeError("no keys")
    for key in keys:
        (count,), start = struct.unpack("<q", content.read(8)), content.tell()
        size = count * machine.dtypes[key].itemsize
        if count < 0 or start + size > len(content):
            raise _RefusedError("is incomplete; fetch the file again")
        places[key] = start, size
        content.seek(start + size)
    return found, places.__getitem__


def _value(value: Any, content: mmap.mmap, storages: Callable[[str], tuple[int, int]]) -> Any:
    """The tensor of a description; other values as they are."""
    if not isinstance(value, _Tensor):
        return value
    storage, itemsize = value.storage, value.dtype.itemsize
    if 0 in value.size:
        return torch.empty(value.size, dtype=value.dtype)
    first, length = storages(storage.key)
    start, end = (n * storage.dtype.itemsize for n in (storage.start, storage.start + storage.count))
    last = value.offset + sum((n - 1) * step for n, step in zip(value.size, value.stride, strict=True))
    if min(value.offset, storage.start, *value.size, *value.stride, 0) < 0 or end > length:
        raise _RefusedError("describes a tensor outside the file; fetch the file again")
    if start + (last + 1) * itemsize > end:
        raise _RefusedError("describes a tensor outside its storage; fetch the file again")
    numbers = torch.frombuffer(content, dtype=torch.uint8, offset=first + start, count=end - start)
    if numbers.data_ptr() % itemsize:
        numbers = numbers.clone()  # files from before torch 1.6 are not aligned
    whole = numbers[: len(numbers) // itemsize * itemsize].view(value.dtype)
    return whole.as_strided(value.size, value.stride, value.offset)


class _Machine:
    """The stack machine of pickles, without the instructions that import or call.

    Attributes:
        dtypes: by key, the dtypes of the storages that the stream has named.
    """

    def __init__(self) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        """What the stream describes; the stream is read up to its end mark."""
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif not self._build(opcode.name) and not self._remember(opcode.name, argument):
                self._resolve(opcode.name, argument)
        raise ValueError("no end mark")

    def _build(self, name: str) -> bool:
        """Dicts, lists and tuples; returns whether the instruction is one of theirs."""
        stack = self._stack
        if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"D": dict, "L": list, "T": tuple}[name[6]]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[5])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST"):
            items = self._since_mark()
            self._stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            if name == "DICT":
                self._stack.append({})
            self._top(dict).update(_dict(zip(items[::2], items[1::2], strict=True)))
        else:
            return False
        return True

    def _remember(self, name: str, argument: Any) -> bool:
        """Marks and the memo; returns whether the instruction is one of theirs."""
        if name == "MARK":
            self._marked.append(self._stack)
            self._stack = []
        elif name == "POP_MARK":
            self._since_mark()
        elif name == "POP":
            self._stack.pop()
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        else:
            return name in ("PROTO", "FRAME")
        return True

    def _resolve(self, name: str, argument: Any) -> None:
        """Names, and what would be made of them."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(_known(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_known(".".join(stack[-2:]))]
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_described(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes, such as the versions of a state dict's modules
        else:
            raise _RefusedError(
                f"has the instruction {name}, which no state dict needs; name a file of weights"
            )

    def _storage(self, named: Any) -> _Storage:
        kind, storage, key, _, count, *view = named
        dtype = _TYPES.get(storage.name)
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise _RefusedError(f"has a storage of the kind {storage.name}, which wadi cannot read")
        self.dtypes[key] = dtype
        start, count = view[0][1:] if view and view[0] is not None else (0, count)
        return _Storage(key, dtype, start, count)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError(f"no {kind.__name__}")
        return self._stack[-1]


def _known(name: str) -> _Name:
    """The name, if a state dict needs it; no other is looked at further."""
    if name not in _FUNCTIONS and name not in _TYPES and name not in _IGNORED:
        raise _RefusedError(
            f"names {name[:100]!r}, which no state dict needs; it was not run. Name a file that holds "
            "weights only"
        )
    return _Name(name)


def _dict(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict with plain keys, because Python crashes when it hashes a tuple that is nested too deeply."""
    pairs = list(pairs)
    if not all(isinstance(key, (str, int, _Name)) for key, _ in pairs):
        raise _RefusedError("has keys that are no names; name a file of weights")
    return dict(pairs)


def _described(function: _Name, arguments: tuple[Any, ...]) -> Any:
    """What a call would make, as a description."""
    if function.name in _IGNORED:
        return None
    return _FUNCTIONS[function.name](*arguments)


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *more: Any) -> _Tensor:
    """The arguments of torch's `_rebuild_tensor_v2`: needs a gradient, hooks, and bits of lazy views."""
    if len(more) > 2 and more[2]:
        raise _RefusedError("holds a tensor that is a negative or conjugate view; write it again, resolved")
    return _Tensor(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _typed_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *more: Any) -> _Tensor:
    """The arguments of torch's `_rebuild_tensor_v3`, which has the dtype after the hooks."""
    tensor = _tensor(storage, offset, size, stride, *more[:2], *more[3:])
    return tensor._replace(dtype=_DTYPES[more[2].name])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): _dict(pairs),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
"""Functions that a state dict names -> what stands here for what they would make."""
