"""Images larger than those a U-Net was trained on, without training, after ScaleCrafter (arXiv 2310.07702).

A convolution sees a fixed number of pixels. In a larger image that is a smaller part of it, and objects
repeat. Re-dilation therefore lets the inner convolutions take their inputs s times as far apart if the image
is s times as high or wide. The outermost levels, which draw detail, stay as they are. If s is not a whole
number, the input is enlarged by ceil(s) / s, convolved with the dilation ceil(s), and reduced again
(fractional dilation).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from wadi.errors import WadiError, tell
from wadi.onestep.arguments import image_size, own_size

OUTER_LEVELS = 1
"""Number of outermost levels whose convolutions stay as they are."""


def growth(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[float, float]:
    """How many times an image is as high and as wide as the model's own images; at least 1.

    Args:
        pipeline: a pipeline with a U-Net; for a transformer, which has no such convolutions, it is (1, 1).
        height: height in pixels, or ``None`` for the model's own.
        width: width in pixels, or ``None`` for the model's own.

    Raises:
        WadiError: a size that the pipeline cannot make.
    """
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        return 1.0, 1.0
    asked = image_size(pipeline, height, width)
    return tuple(max(1.0, side / usual) for side, usual in zip(asked, own_size(pipeline), strict=True))


def tell_larger(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> None:
    """Warn that an image larger than the model's own will be poor; for the arguments see `growth`."""
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
    """Within the block, re-dilate the inner convolutions of a U-Net for images `factor` times as large.

        with redilated(pipeline.unet, growth(pipeline, 1024, 1024)):
            pipeline(prompt, height=1024, width=1024)

    No weight is changed, and after the block the U-Net is as before. A CUDA graph that is captured within the
    block keeps the re-dilation.

    Args:
        unet: the U-Net, with or without an adapter.
        factor: s, or a value for height and one for width; 1 leaves that side as it is.
        outer_levels: number of outermost levels that stay as they are.
        damping: share in [0, 1) of the prediction that comes from a second forward pass without re-dilation.
            It replaces ScaleCrafter's noise-damped guidance, which needs a guided model. It did not help the
            emoji student (docs/uses/high-resolution.md).

    Yields:
        Names of the re-dilated convolutions.

    Raises:
        WadiError: a factor below 1, a damping outside its range, no such level, or a U-Net that is re-dilated
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
        raise WadiError(
            "redilated: the convolutions of this U-Net are stretched already; leave that block first"
        )
    stretch = _Stretch(list(chosen.values()), factors)
    with stretch.applied(), _damped(unet, stretch, damping) if damping else contextlib.nullcontext():
        yield list(chosen)


def stretched(
    pipeline: DiffusionPipeline, height: int | None, width: int | None
) -> contextlib.AbstractContextManager:
    """`redilated` for images larger than the model's own; for other images nothing is changed."""
    factors = growth(pipeline, height, width)
    return redilated(pipeline.unet, factors) if max(factors) > 1 else contextlib.nullcontext()


def inner_convolutions(unet: UNet2DConditionModel, outer_levels: int = OUTER_LEVELS) -> dict[str, nn.Conv2d]:
    """The 3 x 3 convolutions in the residual blocks of all levels but the outermost, by name.

    Raises:
        WadiError: the U-Net has no other levels.
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
        """Within the block the convolutions are re-dilated."""
        handles = []
        try:
            if self.fraction is not None:
                for conv in self.convolutions:
                    handles += self._stretch_inputs(conv)
            with self._dilated(self.dilation):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block, which is inside one of `applied`, the convolutions are as they were."""
        fraction, self.fraction = self.fraction, [1.0, 1.0] if self.fraction else None
        try:
            with self._dilated((1, 1)):
                yield
        finally:
            self.fraction = fraction

    @contextlib.contextmanager
    def _dilated(self, dilation: tuple[int, int]) -> Iterator[None]:
        before = [(conv.dilation, conv.padding) for conv in self.convolutions]
        try:
            for conv in self.convolutions:
                conv.dilation = conv.padding = dilation  # in 3 x 3 kernels this padding keeps the size
            yield
        finally:
            for conv, (old, padding) in zip(self.convolutions, before, strict=True):
                conv.dilation, conv.padding = old, padding

    def _stretch_inputs(self, conv: nn.Conv2d) -> list[Any]:
        """Hooks that enlarge the input of a convolution by `fraction`, and reduce its output again."""
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
def _damped(unet: UNet2DConditionModel, stretch: _Stretch, damping: float) -> Iterator[None]:
    """Within the block, the U-Net mixes its re-dilated prediction with its own."""
    plain, own = unet.forward, "forward" in vars(unet)

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        stretched = plain(*args, return_dict=False, **kwargs)[0]
        with stretch.suspended():
            output = plain(*args, return_dict=return_dict, **kwargs)
        mixed = torch.lerp(stretched, output.sample if return_dict else output[0], damping)
        return type(output)(sample=mixed) if return_dict else (mixed, *output[1:])

    unet.forward = forward
    try:
        yield
    finally:
        if own:
            unet.forward = plain
        else:
            del unet.forward
