"""FLUX.2-klein: a rectified flow in normalised latents of 16 pixels, conditioned on a Qwen3."""

from __future__ import annotations

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import STATES, Condition
from wadi.backbones.text import PromptEncoder


class QwenStates(PromptEncoder):
    """Three of Qwen3's states side by side, (N, 512, 3D).

    The network has no mask and looks at the padding too, so the number of tokens is the pipeline's own.
    """

    large = "text_encoder"

    def _encode(self, prompts: list[str]) -> Condition:
        states, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.length)
        return {STATES: states}


class KleinBackbone(Backbone):
    """FLUX.2-klein (Black Forest Labs, 2026), 4B and 9B.

    What is noised are squares of 2 x 2 of the VAE's latents, each of the 128 numbers normalised by statistics
    that the VAE's weights hold.

    Student and fake model turn every linear layer of the blocks, none of which is modulation: 78.6 M
    parameters of the model with 4 B at rank 64.
    """

    pipeline_class, network_name = Flux2KleinPipeline, "transformer"
    network_class, text_class = Flux2Transformer2DModel, QwenStates
    blocks = tuple(Flux2Transformer2DModel._repeated_blocks)
    student_rank = 64
    cudnn_attention = False
    student_pattern = fake_pattern = r"(single_)?transformer_blocks\.\d+\..*"

    @property
    def pixels(self) -> int:
        """See `Backbone.pixels`: twice the VAE's."""
        return 2 * self.pipeline.vae_scale_factor

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`; t is 1000 sigma, and rounded to the compute dtype as the pipeline does."""
        (_, _, height, width), states = x_t.shape, condition[STATES].to(self.dtype)
        rows, columns, words = (
            torch.arange(length, device=x_t.device) for length in (height, width, states.shape[1])
        )
        zero = rows.new_zeros(1)
        tokens = network(
            hidden_states=x_t.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=t.to(self.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=torch.cartesian_prod(zero, zero, zero, words),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
            return_dict=False,
        )[0]
        return tokens.float().transpose(1, 2).reshape(x_t.shape)

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone.scaled`; from (N, C / 4, 2H, 2W)."""
        mean, deviation = self._statistics(latents)
        return (nn.functional.pixel_unshuffle(latents, 2) - mean) / deviation

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone.unscaled`; to (N, C / 4, 2H, 2W)."""
        mean, deviation = self._statistics(latents)
        return nn.functional.pixel_shuffle(latents * deviation + mean, 2)

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the VAE's latents, (1, C, 1, 1)."""
        vae = self.pipeline.vae
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return tuple(value.view(1, -1, 1, 1).to(latents) for value in (vae.bn.running_mean, deviation))
