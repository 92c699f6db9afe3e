"""Encoded prompts on the disk: safetensors shards that are written one by one and read by memory mapping.

    <folder>/<key>/index.json                   how many prompts, and how many a shard
    <folder>/<key>/shard-000000.safetensors     the tensors of a `Condition`, first dimension: prompts

The key is a hash of this format, the text encoder, its tokenizer, the dtype, and the prompts: where one of
them differs the entry is another, and none is ever out of date. Where there is a mask, what a shard has of
each token ends with its longest prompt; the mask is whole and tells how long it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from wadi.backbones import PromptEncoder
from wadi.backbones.condition import MASK, PER_TOKEN, Condition, used_tokens, whole_shape, without_padding
from wadi.errors import WadiError
from wadi.files import cache_folder, load_tensors, save_tensors, write_json
from wadi.outputs import Output
from wadi.progress import progress

SHARD_SIZE = 256
"""Prompts a shard: 30 MB of SD 1.5's in bfloat16, of T5-XXL's 2 MB for each token of the longest. A multiple
of the encoder's batch."""
FORMAT = 2
"""Format number of the shards: 1 had embeddings of the full length."""


class Embeddings:
    """Conditions of many prompts on the CPU, in shards of equal length but for the last.

    Shards from `EmbeddingCache` are memory-mapped: what is not drawn is not read.
    """

    def __init__(self, shards: Sequence[Condition]) -> None:
        self.shards = list(shards)
        self.lengths = [len(next(iter(shard.values()))) for shard in self.shards]

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def bytes_a_prompt(self) -> int:
        """Size of one prompt's condition at its full length."""
        return sum(tensor[0].nbytes for tensor in self.take(torch.tensor([0])).values())

    def waits(self, step: int) -> bool:
        """Whether `take` may wait or fail at a step: never, because all prompts are here."""
        return False

    def close(self) -> None:
        """Nothing works in the background."""

    def take(self, indices: torch.Tensor, pin_memory: bool = False, step: int = 0) -> Condition:
        """Conditions of the prompts (N,) in that order, copied once, into pinned memory if asked for.

        Embeddings that were cut are of full length again: zeros, where the mask lets nobody look.

        Args:
            indices: numbers of the prompts, int64 on the CPU.
            pin_memory: whether a GPU will copy them.
            step: the step of the training that draws them; it makes no difference here.
        """
        rows = [divmod(index, self.lengths[0]) for index in indices.tolist()]
        result = {}
        for name, like in self.shards[0].items():
            shape = (len(rows), *whole_shape(self.shards[0], name))
            pinned = pin_memory and like.device.type == "cpu"
            result[name] = torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=pinned)
            for target, (shard, row) in zip(result[name], rows, strict=True):
                source = self.shards[shard][name][row]
                if source.shape == target.shape:
                    target.copy_(source)
                else:
                    target[: len(source)].copy_(source)
                    target[len(source) :].zero_()
        return result


def cache_output(folder: str | Path, *inputs: str | None) -> Output:
    """The rule for a folder that the user names for the entries: new, empty, or filled by wadi before."""
    return Output(folder, "prompts encode", inputs, resume=True, option="--embeddings-dir")


class EmbeddingCache:
    """A folder of encoded prompts.

    Args:
        encoder: is loaded only when something is missing.
        folder: where the entries are; that of `cache_folder` when ``None``.

    Raises:
        WadiError: `folder` is used for something else.
    """

    def __init__(self, encoder: PromptEncoder, folder: str | Path | None = None) -> None:
        self.encoder = encoder
        self.output = None if folder is None else cache_output(folder)
        if self.output is not None:
            self.output.check()
        self.folder = cache_folder("prompts") if folder is None else Path(folder)
        self._identity = encoder.identity()

    def entry(self, prompts: Sequence[str]) -> Path:
        """Folder of these prompts, whether it exists or not."""
        digest = hashlib.sha256(json.dumps([self._identity, FORMAT, SHARD_SIZE, list(prompts)]).encode())
        return self.folder / digest.hexdigest()[:32]

    def missing(self, prompts: Sequence[str]) -> list[int]:
        """Numbers of the shards that are absent, damaged, or not of the kind that most are."""
        entry = self.entry(prompts)
        shards = [self._read(entry, i, length) for i, length in enumerate(_lengths(prompts))]
        kinds = [None if shard is None else _kind(shard) for shard in shards]
        usual = Counter(kind for kind in kinds if kind is not None).most_common(1)
        missing = [i for i, kind in enumerate(kinds) if kind is None or kind != usual[0][0]]
        for i in missing:
            if _path(entry, i).exists():
                tqdm.write(f"{_path(entry, i)}: damaged; encoding its prompts again", file=sys.stderr)
        return missing

    def encode(self, *sets: Sequence[str]) -> list[Embeddings]:
        """Conditions of each set of prompts; what the disk lacks is encoded, with the encoder loaded once.

        Each shard is complete or absent, so an interrupted encoding goes on where it stopped.

        Raises:
            WadiError: the encoder cannot be loaded, the disk is full, or a file cannot be written.
        """
        missing = [self.missing(prompts) for prompts in sets]
        if any(missing):
            count = sum(_lengths(sets[i])[shard] for i, shards in enumerate(missing) for shard in shards)
            with (
                self.encoder.loaded(),
                progress(total=count, desc="encoding prompts", unit="prompt") as bar,
            ):
                for prompts, shards in zip(sets, missing, strict=True):
                    entry = self.entry(prompts)  # once: it takes a second for a million prompts
                    for shard in shards:
                        bar.update(self._write(entry, prompts, shard))
        return [self._open(prompts) for prompts in sets]

    def _write(self, entry: Path, prompts: Sequence[str], shard: int) -> int:
        part = list(prompts[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE])
        if not (entry / "index.json").exists():
            if self.output is not None:
                self.output.open()
            write_json(entry / "index.json", {"prompts": len(prompts), "shard_size": SHARD_SIZE})
        save_tensors(_path(entry, shard), without_padding(self.encoder.encode(part)))
        return len(part)

    def _open(self, prompts: Sequence[str]) -> Embeddings:
        entry, shards = self.entry(prompts), []
        for i, length in enumerate(_lengths(prompts)):
            shard = self._read(entry, i, length)
            if shard is None:
                raise WadiError(f"{_path(entry, i)}: damaged as soon as it was written; check the disk")
            shards.append(shard)
        return Embeddings(shards)

    def _read(self, entry: Path, shard: int, length: int) -> Condition | None:
        """Memory-map a shard; None where it is absent, cut short, of another length, or of other tensors."""
        if not _path(entry, shard).is_file():
            return None
        try:
            tensors = load_tensors(_path(entry, shard))
        except WadiError:
            return None
        if {name: tensor.ndim for name, tensor in tensors.items()} != self.encoder.dimensions:
            return None
        whole = all(len(tensor) == length for tensor in tensors.values())
        ends = MASK not in tensors or all(
            tensors[name].shape[1] == used_tokens(tensors[MASK]) for name in PER_TOKEN & tensors.keys()
        )
        return tensors if whole and ends else None


def _lengths(prompts: Sequence[str]) -> list[int]:
    return [min(SHARD_SIZE, len(prompts) - start) for start in range(0, len(prompts), SHARD_SIZE)]


def _path(entry: Path, shard: int) -> Path:
    return entry / f"shard-{shard:06d}.safetensors"


def _kind(shard: Condition) -> tuple:
    """What shards of one entry have in common: names, dtypes, and all dimensions but the prompts and cuts."""
    return tuple(sorted((name, str(shard[name].dtype), *whole_shape(shard, name)) for name in shard))
