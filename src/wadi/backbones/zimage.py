"""Z-Image: a rectified flow whose network counts time and velocity the other way, conditioned on a Qwen3."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import MASK, STATES, Condition
from wadi.backbones.text import PromptEncoder, padded


class QwenTokens(PromptEncoder):
    """The states of Qwen3, (N, 512, D), and their mask; the network is told those of the tokens alone."""

    large = "text_encoder"
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, MASK: 2}

    def _encode(self, prompts: list[str]) -> Condition:
        # a copy of the list, into which the pipeline writes
        states, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return padded(states, self.length)


class ZImageBackbone(Backbone):
    """Z-Image (arXiv 2511.22699).

    The network takes 1 - sigma for the time and gives x0 - n. The stock pipeline counts guidance from 0: what
    is a scale of s here is its guidance_scale s - 1.

    A student turns every linear layer of the blocks and of both refiners, and the fake model's smaller
    selection leaves out their modulation: 154.3 M and 122.6 M parameters at rank 64.
    """

    pipeline_class, network_name = ZImagePipeline, "transformer"
    network_class, text_class = ZImageTransformer2DModel, QwenTokens
    blocks = tuple(ZImageTransformer2DModel._repeated_blocks)
    student_rank = 64
    cudnn_attention = False
    student_pattern = r"(layers|noise_refiner|context_refiner)\.\d+\..*"
    fake_pattern = r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward)\..*"
    capturable = False
    patch = 2

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`; t is 1000 sigma. The host waits to learn how long the prompts are."""
        states, lengths = condition[STATES].to(self.dtype), condition[MASK].sum(1).tolist()
        captions = [tokens[:length] for tokens, length in zip(states, lengths, strict=True)]
        images = list(x_t.to(self.dtype).unsqueeze(2))
        velocities = network(images, (1000 - t) / 1000, captions, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2).float()
