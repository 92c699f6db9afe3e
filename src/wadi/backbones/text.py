"""The text half of a pipeline: tokenizers and text encoders, the latter loaded only while they are used."""

from __future__ import annotations

import gc
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from wadi.backbones.condition import MASK, STATES, Condition, concatenate
from wadi.errors import WadiError
from wadi.files import explain_os_errors
from wadi.onestep.loading import call_default, load_pipeline, pipeline_folder, prompt_reader
from wadi.onestep.supported import NETWORKS

SAMPLED_BEYOND = 2**30
"""Bytes: of larger files only a sample is hashed."""
_SAMPLE, _STRIDE = 2**16, 2**22


class PromptEncoder(ABC):
    """Turns prompts into conditions as the stock pipeline does.

    Args:
        pipeline: holds the tokenizers; its networks are not touched.
        dtype: of the conditions.
        device: where the text encoders work.
        folder: pipeline folder to load the text encoders from for as long as they are used; ``None`` for a
            pipeline that holds them, where they then rest on the CPU.

    Attributes:
        tokenizer: by which the length of a prompt is measured; see `prompt_reader`.
        length: `max_sequence_length` of the stock pipeline's call, to which embeddings are padded or cut;
            ``None`` if the call has no such argument.
        limit: most tokens of a prompt.
    """

    parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Names of the text encoders in the pipeline."""
    large: ClassVar[str | None] = None
    """Which of them is a language model of billions of weights, if any."""
    no_prompt: ClassVar[str] = ""
    """What `encode` takes for no prompt."""
    dimensions: ClassVar[dict[str, int]] = {STATES: 3}
    """Names of a condition's tensors, and how many dimensions each has, the prompts included."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.pipeline, self.dtype, self.device, self.folder = pipeline, dtype, torch.device(device), folder
        self.tokenizer, self.limit = prompt_reader(pipeline)
        self.length: int | None = call_default(type(pipeline), "max_sequence_length")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PromptEncoder:
        """Load the tokenizers of a pipeline folder or hub id, and no weights yet.

        Raises:
            WadiError: no such folder or id, or a missing sub-folder.
        """
        folder = pipeline_folder(name_or_path)
        pipeline = load_pipeline(folder, without=(*NETWORKS, "vae", *cls.parts))
        return cls(pipeline, dtype, device, folder)

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Condition:
        """Conditions of one batch, with the text encoders on the device; any device and float dtype."""

    def null(self, empty: Condition | None = None) -> Condition:
        """What the pipeline uses where there is no prompt, first dimension 1.

        Args:
            empty: what `encode` gives for [`no_prompt`], where the caller has it; encoded when ``None``.
        """
        return self.encode([self.no_prompt]) if empty is None else empty

    def facts(self) -> list[object]:
        """What decides a condition beside the prompt and the files of encoders and tokenizers."""
        kind = type(self.pipeline).__name__
        return [kind, self.dtype, self._encoder_dtypes, self.limit, self.length]

    def identity(self) -> str:
        """Hash of everything that decides a condition but the prompt: encoders, tokenizers, class, dtypes.

        Weight files above `SAMPLED_BEYOND` are hashed by their size and 64 KiB of every 4 MiB.

        Raises:
            WadiError: the pipeline has no folder, or a file cannot be read.
        """
        if self.folder is None:
            raise WadiError("the pipeline was not loaded from a folder, so its prompts cannot be cached")
        digest = hashlib.sha256(repr(self.facts()).encode())
        for encoder in self.parts:
            tokenizer = encoder.replace("text_encoder", "tokenizer")
            for part in (tokenizer, encoder):
                for path in sorted(p for p in (self.folder / part).rglob("*") if p.is_file()):
                    if part == tokenizer or path.suffix in (".json", ".safetensors"):
                        digest.update(path.name.encode())
                        _hash_file(path, digest)
        return digest.hexdigest()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Hold the text encoders in memory for the block, and on the device the one that works.

        Afterwards nothing holds them, or the CPU does where the pipeline has them.

        Raises:
            WadiError: their weights are missing or unreadable.
        """
        pipeline = self.pipeline
        absent = getattr(pipeline, self.parts[0]) is None
        if absent:
            whole = load_pipeline(self.folder, self._encoder_dtypes, without=(*NETWORKS, "vae"))
            for part in self.parts:
                setattr(pipeline, part, getattr(whole, part).requires_grad_(False).eval())
            del whole
        elif self.folder is not None:  # in a block of this kind already
            yield
            return
        try:
            with self._one_on_the_device():
                yield
        finally:
            if absent:
                for part in self.parts:
                    setattr(pipeline, part, None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def _one_on_the_device(self) -> Iterator[None]:
        """Each text encoder comes to the device when it is called, and the others leave it before."""
        encoders = [getattr(self.pipeline, part) for part in self.parts]

        def come(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            for other in encoders:
                if other is not module:
                    other.to("cpu")
            module.to(self.device)
            return send_to_device((args, kwargs), self.device)

        handles = [encoder.register_forward_pre_hook(come, with_kwargs=True) for encoder in encoders]
        try:
            yield
        finally:
            for handle, encoder in zip(handles, encoders, strict=True):
                handle.remove()
                encoder.to("cpu")

    @torch.no_grad()
    def encode(self, prompts: list[str], batch_size: int = 128) -> Condition:
        """Conditions of `prompts`, on the CPU, padded as diffusers pads them; embeddings in `dtype`."""
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        with self.loaded():
            return concatenate([self._kept(self._encode(batch)) for batch in batches])

    def _kept(self, condition: Condition) -> Condition:
        """What is kept of a batch: masks as truth values, all else in the dtype of the conditions."""
        dtypes = {MASK: torch.bool}
        return {name: tensor.cpu().to(dtypes.get(name, self.dtype)) for name, tensor in condition.items()}

    @property
    def _encoder_dtypes(self) -> dict[str, torch.dtype]:
        """float32, or bfloat16 where the conditions of a large one are: T5-XXL in float32 takes 19 GB."""
        dtypes = {"default": torch.float32}
        if self.large is not None and self.dtype == torch.bfloat16:  # T5 overflows float16
            dtypes[self.large] = torch.bfloat16
        return dtypes


def padded(states: Sequence[torch.Tensor], length: int) -> Condition:
    """States (N, `length`, D), filled up with zeros, of N prompts (L, D), and the mask of their tokens."""
    found = states[0].new_zeros(len(states), length, states[0].shape[1])
    mask = torch.zeros(len(states), length, dtype=torch.bool, device=found.device)
    for row, tokens in enumerate(states):
        found[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return {STATES: found, MASK: mask}


def cleans_captions() -> bool:
    """Whether PixArt's pipelines clean prompts of mark-up: they need two packages for that."""
    return is_bs4_available() and is_ftfy_available()


def _hash_file(path: Path, digest: hashlib._Hash) -> None:
    with explain_os_errors(path, "read the file"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= SAMPLED_BEYOND:
            while block := file.read(2**24):
                digest.update(block)
            return
        for start in (*range(0, size, _STRIDE), size - _SAMPLE):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
