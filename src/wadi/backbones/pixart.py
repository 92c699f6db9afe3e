"""PixArt-alpha and PixArt-Sigma: a transformer conditioned on masked T5 embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import MASK, STATES, Condition
from wadi.backbones.sd import ATTENTION_AND_FEED_FORWARD
from wadi.backbones.text import PromptEncoder, cleans_captions

_BLOCKS = rf"transformer_blocks\..*\.({ATTENTION_AND_FEED_FORWARD})"


class T5Prompts(PromptEncoder):
    """The states of T5 and their mask: 120 tokens for alpha, 300 for Sigma, as each pipeline pads them."""

    large = "text_encoder"
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, MASK: 2}

    def facts(self) -> list[object]:
        """See `PromptEncoder.facts`; whether prompts are cleaned of mark-up depends on what is installed."""
        return [*super().facts(), cleans_captions()]

    def _encode(self, prompts: list[str]) -> Condition:
        states, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
            clean_caption=cleans_captions(),
        )
        return {STATES: states, MASK: mask}


class PixArtBackbone(Backbone):
    """PixArt-alpha (arXiv 2310.00426).

    Its output holds a learned variance behind the noise, which one step has no use for. Where the network
    takes micro-conditions (1024 px), it is told the size of the images that it was trained on.

    A student turns every linear layer but those of `adaln_single`, as in the paper: 81.22 M parameters at
    rank 128. The fake model's smaller selection has 20.13 M at rank 32.
    """

    pipeline_class, network_name = PixArtAlphaPipeline, "transformer"
    network_class, text_class = PixArtTransformer2DModel, T5Prompts
    blocks = ("BasicTransformerBlock",)
    student_rank = 128
    student_pattern = r"(?!adaln_single\.).*"
    fake_pattern = _BLOCKS

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        resolution: int | None = None,
    ) -> None:
        super().__init__(pipeline, device, folder, resolution)
        self.added: Condition = {}
        if self.network.use_additional_conditions:
            height, width = self.image_size
            # made here: a CUDA graph cannot hold a copy from the host
            values = {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
            self.added = {
                name: torch.tensor(value, dtype=self.dtype, device=self.device)
                for name, value in values.items()
            }

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`."""
        added = {name: value.expand(len(x_t), -1) for name, value in self.added.items()}
        output = network(
            x_t.to(self.dtype),
            encoder_hidden_states=condition[STATES].to(self.dtype),
            encoder_attention_mask=condition[MASK],
            timestep=t,
            added_cond_kwargs=added or {"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].float()


class PixArtSigmaBackbone(PixArtBackbone):
    """PixArt-Sigma (arXiv 2403.04692): the same network without micro-conditions, and longer prompts."""

    pipeline_class = PixArtSigmaPipeline
