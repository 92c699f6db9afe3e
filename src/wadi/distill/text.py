"""The text half of a pipeline: tokenizer and text encoder, the latter loaded only while it is used."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from wadi.distill.condition import MASK, STATES, Condition, concatenate
from wadi.errors import WadiError
from wadi.files import explain_os_errors
from wadi.onestep.loading import load_pipeline, pipeline_folder, prompt_limit

NETWORKS = ("unet", "transformer")
SAMPLED_BEYOND = 2**30
"""Bytes: of larger files only a sample is hashed."""
_SAMPLE, _STRIDE = 2**16, 2**22


class PromptEncoder:
    """Turns prompts into conditions as the stock pipeline does.

    Args:
        pipeline: holds the tokenizer; its other modules are not touched.
        dtype: of the conditions.
        device: where the text encoder works.
        folder: pipeline folder to load the text encoder from for as long as it is used; ``None`` for a
            pipeline that holds it, where it then rests on the CPU.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.pipeline, self.dtype, self.device, self.folder = pipeline, dtype, torch.device(device), folder
        self.masked = isinstance(pipeline, PixArtAlphaPipeline)
        self.tokenizer, self.limit = pipeline.tokenizer, prompt_limit(pipeline)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PromptEncoder:
        """Load the tokenizer of a pipeline folder or hub id, and no weights yet.

        Raises:
            WadiError: no such folder or id, or a missing sub-folder.
        """
        folder = pipeline_folder(name_or_path)
        pipeline = load_pipeline(folder, without=(*NETWORKS, "vae", "text_encoder"))
        return cls(pipeline, dtype, device, folder)

    @property
    def dimensions(self) -> dict[str, int]:
        """Names of a condition's tensors, and how many dimensions each has, the prompts included."""
        return {STATES: 3, MASK: 2} if self.masked else {STATES: 3}

    def identity(self) -> str:
        """Hash of everything that decides a condition but the prompt: encoder, tokenizer, class, dtypes.

        Weight files above `SAMPLED_BEYOND` are hashed by their size and 64 KiB of every 4 MiB.

        Raises:
            WadiError: the pipeline has no folder, or a file cannot be read.
        """
        if self.folder is None:
            raise WadiError("the pipeline was not loaded from a folder, so its prompts cannot be cached")
        facts = [type(self.pipeline).__name__, self.dtype, self._encoder_dtype, self.limit, self._clean]
        digest = hashlib.sha256(repr(facts).encode())
        for part in ("tokenizer", "text_encoder"):
            for path in sorted(p for p in (self.folder / part).rglob("*") if p.is_file()):
                if part == "tokenizer" or path.suffix in (".json", ".safetensors"):
                    digest.update(path.name.encode())
                    _hash_file(path, digest)
        return digest.hexdigest()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Hold the text encoder on the device for the block; afterwards nothing holds it.

        Raises:
            WadiError: its weights are missing or unreadable.
        """
        pipeline = self.pipeline
        if self.folder is None or pipeline.text_encoder is not None:
            pipeline.text_encoder.to(self.device)
            yield
            if self.folder is None:
                pipeline.text_encoder.to("cpu")
            return
        dtypes = {"text_encoder": self._encoder_dtype, "default": torch.float32}
        whole = load_pipeline(self.folder, dtypes, without=(*NETWORKS, "vae"))
        pipeline.text_encoder = whole.text_encoder.to(self.device).requires_grad_(False).eval()
        try:
            yield
        finally:
            pipeline.text_encoder = None
            del whole
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def encode(self, prompts: list[str], batch_size: int = 128) -> Condition:
        """Conditions of `prompts`, on the CPU, padded as diffusers pads them; embeddings in `dtype`."""
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        with self.loaded():
            return concatenate([self._encode(batch) for batch in batches])

    def _encode(self, prompts: list[str]) -> Condition:
        if not self.masked:
            states = self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]
            return {STATES: states.cpu().to(self.dtype)}
        states, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, clean_caption=self._clean
        )
        return {
            STATES: states.cpu().to(self.dtype),
            MASK: mask.cpu().bool(),
        }

    @property
    def _encoder_dtype(self) -> torch.dtype:
        """float32, but for a T5 with bfloat16 conditions: its XXL would take 19 GB, and fp16 overflows it."""
        return torch.bfloat16 if self.masked and self.dtype == torch.bfloat16 else torch.float32

    @property
    def _clean(self) -> bool:
        """Whether the stock pipeline would clean prompts of mark-up: it needs two packages for that."""
        return self.masked and is_bs4_available() and is_ftfy_available()


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
