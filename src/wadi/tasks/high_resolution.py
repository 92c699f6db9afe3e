"""Images larger than those a U-Net was trained on, without training, after ScaleCrafter (arXiv 2310.07702).

A U-Net sees as far as its convolutions reach. In a larger image that is a smaller part of it, and objects
repeat. Where the image is s times as high or wide, the inner convolutions therefore take their inputs s
times as far apart (ScaleCrafter's re-dilation); the outermost levels, which draw detail, stay as they are.
For an s that is not whole the input is stretched by ceil(s) / s, convolved with dilation ceil(s), and shrunk
again (ScaleCrafter's fractional dilation).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from wadi.errors import WadiError, tell
from wadi.onestep.arguments import image_size, own_size

OUTER_LEVELS = 1
"""Levels, from the image inwards, whose convolutions stay as they are."""


def growth(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[float, float]:
    """How many times as high and as wide as the model's own an image is; 1 where it is not larger.

    Args:
        pipeline: one with a U-Net; for others, which have no convolutions to stretch, it is (1, 1).
        height: pixels; ``None`` for the model's own.
        width: likewise.

    Raises:
        WadiError: a size that the pipeline cannot make.
    """
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        return 1.0, 1.0
    asked = image_size(pipeline, height, width)
    return tuple(max(1.0, side / usual) for side, usual in zip(asked, own_size(pipeline), strict=True))


def tell_larger(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> None:
    """Tell in one line that an image larger than the model's own will be poor; arguments as of `growth`."""
    if max(growth(pipeline, height, width)) > 1:
        tell(
            "--height, --width: the image is larger than those that the model was trained for and will be "
            "grainy, with little detail (docs/uses/high-resolution.md); omit them for the model's own size"
        )


@contextlib.contextmanager
def redilated(
    unet: UNet2DConditionModel,
    factor: float | tuple[float, float],
    outer_levels: int = OUTER_LEVELS,
    damping: float = 0.0,
) -> Iterator[list[str]]:
    """Stretch the inner convolutions of a U-Net for images `factor` times as large, within the block.

        with redilated(pipeline.unet, growth(pipeline, 1024, 1024)):
            pipeline(prompt, height=1024, width=1024)

    Afterwards the U-Net is what it was: no weight is touched, and nothing of the block stays behind. A graph
    that was captured, or an image that was compiled, within the block keeps it.

    Args:
        unet: of any adapter or none.
        factor: s, or those of height and width; 1 leaves that side alone.
        outer_levels: how many levels, from the image inwards, stay as they are.
        damping: share of the prediction that is the U-Net's own, without re-dilation, in [0, 1): a second
            forward. It stands for ScaleCrafter's noise-damped guidance, which needs a guided model; a
            one-step student is not guided. The emoji student has no use for it
            (docs/uses/high-resolution.md).

    Yields:
        Names of the stretched convolutions.

    Raises:
        WadiError: a factor below 1, a damping out of range, no such level, or a U-Net that is stretched
            already.
    """
    factors = (factor, factor) if isinstance(factor, (int, float)) else tuple(factor)
    if not all(math.isfinite(s) and s >= 1 for s in factors):
        raise WadiError(f"factor: must be at least 1, but is {factor}")
    if not 0 <= damping < 1:
        raise WadiError(f"damping: must be at least 0 and less than 1, but is {damping}")
    chosen = inner_convolutions(unet, outer_levels)
    if factors == (1, 1):
        yield []
        return
    if any(tuple(conv.dilation) != (1, 1) for conv in chosen.values()):
        raise WadiError("redilated: the convolutions of this U-Net are stretched already; leave that first")
    stretch = _Stretch(list(chosen.values()), factors)
    plain = unet.forward
    own = "forward" in vars(unet)
    with stretch.applied():
        if damping:
            unet.forward = _damped(plain, stretch, damping)
        try:
            yield list(chosen)
        finally:
            if damping and own:
                unet.forward = plain
            elif damping:
                del unet.forward


def stretched(
    pipeline: DiffusionPipeline, height: int | None, width: int | None
) -> contextlib.AbstractContextManager:
    """`redilated` for images larger than the model's own; nothing for others, and for transformers."""
    factors = growth(pipeline, height, width)
    return redilated(pipeline.unet, factors) if max(factors) > 1 else contextlib.nullcontext()


def inner_convolutions(unet: UNet2DConditionModel, outer_levels: int = OUTER_LEVELS) -> dict[str, nn.Conv2d]:
    """The 3 x 3 convolutions of the residual blocks of all levels but the outermost, by name.

    Raises:
        WadiError: the U-Net has no level left.
    """
    levels = len(unet.down_blocks)
    if not 0 <= outer_levels < levels:
        raise WadiError(f"outer_levels: must be from 0 to {levels - 1} for this U-Net, but is {outer_levels}")
    parts = {f"down_blocks.{i}": unet.down_blocks[i] for i in range(outer_levels, levels)}
    if unet.mid_block is not None:
        parts["mid_block"] = unet.mid_block
    parts |= {f"up_blocks.{i}": unet.up_blocks[i] for i in range(levels - outer_levels)}
    return {
        f"{part}.{name}": module
        for part, block in parts.items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Conv2d)
        and "resnets." in name
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
    }


class _Stretch:
    """Turns the re-dilation of some convolutions on and off."""

    def __init__(self, convolutions: list[nn.Conv2d], factors: tuple[float, float]) -> None:
        self.convolutions = convolutions
        self.dilation = tuple(math.ceil(s - 1e-6) for s in factors)
        whole = all(abs(d - s) < 1e-6 for d, s in zip(self.dilation, factors, strict=True))
        self.fraction = None if whole else [d / s for d, s in zip(self.dilation, factors, strict=True)]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Stretched within the block."""
        before = [(conv.dilation, conv.padding) for conv in self.convolutions]
        handles = []
        try:
            for conv in self.convolutions:
                conv.dilation = conv.padding = self.dilation  # a 3 x 3 kernel: padding keeps the size
                if self.fraction is not None:
                    handles += self._stretch_inputs(conv)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for conv, (dilation, padding) in zip(self.convolutions, before, strict=True):
                conv.dilation, conv.padding = dilation, padding

    def _stretch_inputs(self, conv: nn.Conv2d) -> list[Any]:
        sizes: list[tuple[int, int]] = []

        def before(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (x,) = inputs
            sizes.append(tuple(x.shape[-2:]))
            size = [round(side * grow) for side, grow in zip(sizes[-1], self.fraction, strict=True)]
            return (F.interpolate(x, size=size, mode="bilinear", align_corners=False),)

        def after(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return F.interpolate(output, size=sizes.pop(), mode="bilinear", align_corners=False)

        return [conv.register_forward_pre_hook(before), conv.register_forward_hook(after)]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Plain again within the block, which is inside one of `applied`; its hooks then stretch by 1."""
        before = [(conv.dilation, conv.padding) for conv in self.convolutions]
        fraction, self.fraction = self.fraction, [1.0, 1.0] if self.fraction else None
        for conv in self.convolutions:
            conv.dilation = conv.padding = (1, 1)
        try:
            yield
        finally:
            self.fraction = fraction
            for conv, (dilation, padding) in zip(self.convolutions, before, strict=True):
                conv.dilation, conv.padding = dilation, padding


def _damped(plain: Callable, stretch: _Stretch, damping: float) -> Callable:
    """The U-Net's forward as a mixture of its stretched and its own prediction."""

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        stretched = plain(*args, return_dict=False, **kwargs)[0]
        with stretch.suspended():
            output = plain(*args, return_dict=return_dict, **kwargs)
        own = output.sample if return_dict else output[0]
        mixed = torch.lerp(stretched, own, damping)
        return type(output)(sample=mixed) if return_dict else (mixed, *output[1:])

    return forward
