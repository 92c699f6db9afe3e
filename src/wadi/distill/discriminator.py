"""A discriminator that sees noised latents as the frozen teacher does, half-way through its network.

As in DMD2 (arXiv 2405.14867) and LADD (arXiv 2403.12015): the teacher's first half, which is conditioned on
prompt and timestep, gives the features, and only a small head is trained.
"""

from __future__ import annotations

import torch
from torch import nn

from wadi.distill.backbone import Backbone
from wadi.distill.condition import Condition
from wadi.distill.regions import compile_regions
from wadi.distill.roles import enable_gradient_checkpointing, view

WIDTH = 256
"""Of the head's hidden layers."""


class DiscriminatorHead(nn.Module):
    """A logit for every place of the features, positive where it takes the latents for the teacher's.

    Args:
        channels: D of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, L) of features (N, L, D), all float32."""
        return self.layers(features).squeeze(-1)


class TeacherFeatures:
    """The output of the middle of the frozen teacher, of which the second half is not computed.

    Args:
        backbone: the loaded teacher.
        gradient_checkpointing: recompute activations in backward.
        compiled: compile the blocks; see `compile_regions`.
    """

    def __init__(self, backbone: Backbone, gradient_checkpointing: bool, compiled: bool) -> None:
        self.backbone = backbone
        self.network, self.module, self.channels = backbone.trunk(view(backbone.network))
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.network)
        if compiled:
            compile_regions(self.network)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Features (N, L, D) float32, L places, of latents (N, C, H, W), timesteps (N,) and N prompts."""
        found: list[torch.Tensor] = []
        hook = self.module.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            self.backbone.predict(self.network, x_t, t, condition)
        finally:
            hook.remove()  # backward with checkpoints would call it again
        features = found[0]
        return (features if features.ndim == 3 else features.flatten(2).transpose(1, 2)).float()


def make_head(channels: int, seed: int, device: torch.device) -> DiscriminatorHead:
    """A head in float32; torch's own generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return DiscriminatorHead(channels).to(device)
