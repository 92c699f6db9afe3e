"""`wadi control`: make images in one step that keep to a condition map."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wadi import emoji
from wadi.commands.images import ImageOptions
from wadi.errors import WadiError
from wadi.images import open_picture
from wadi.onestep.arguments import finite_number, image_size
from wadi.tasks import control as room


@dataclass(kw_only=True)
class ControlConfig(ImageOptions):
    """Options of `control`."""

    command = "control"

    image: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]
    """The image, or the map itself. What does not fit the shape of the result is cut off."""
    condition: tyro.conf.UseAppendAction[tuple[Literal["canny", "map"], ...]] = ()
    """canny finds the edges of the image; map: the image is the condition map."""
    controlnet: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or hub id of a ControlNetModel of the model, or of its teacher."""
    conditioning_scale: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """How much of what the ControlNet adds is added: 0 nothing, 1 all. If not given, 1; for one step with the
    ControlNet that comes with wadi, 0.5."""
    low: float = 100
    """Lower threshold of edges, of gradients in 8-bit steps."""
    high: float = 200
    """Upper threshold of edges."""
    out: Path = Path("control.png")
    """A .png or .jpg file, which shows image, condition and results side by side; or a folder, for a file
    each."""

    @property
    def controlnets(self) -> tuple[str, ...]:
        """Those of the options, or the one that comes with wadi, for the model that does."""
        if self.controlnet:
            return self.controlnet
        if self.model is not None:
            raise WadiError(
                f"--controlnet: name one of {self.model}; the ControlNet that comes with wadi is for its own"
            )
        return (str(emoji.controlnet_folder()),)


def control(config: ControlConfig) -> None:
    """Make images in one step that keep to the edges of an image, or to a condition map.

    A ControlNet that was trained on the multi-step teacher steers the student. Without --model, --adapter and
    --controlnet, the three that come with wadi.

    Several ControlNets add up: repeat --controlnet, and name one image for all or one for each; so with
    --condition and --conditioning-scale.
    """
    config.check()
    names = config.controlnets
    pictures = [open_picture(path) for path in room.one_for_each("IMAGE", config.image, len(names))]
    kinds = room.one_for_each("--condition", config.condition or ("canny",), len(names))
    usual = 1.0 if config.controlnet or config.num_inference_steps > 1 else emoji.CONTROLNET_SCALE
    for value in config.conditioning_scale:
        finite_number("--conditioning-scale", value)
    scales = room.one_for_each("--conditioning-scale", config.conditioning_scale or (usual,), len(names))
    pipeline = config.load()
    size = image_size(pipeline, config.height, config.width)[::-1]
    maps = [
        room.condition_map(picture, kind, size, config.low, config.high)
        for picture, kind in zip(pictures, kinds, strict=True)
    ]
    controlnets = [room.load_controlnet(name, pipeline, config.torch_dtype) for name in names]
    start = time.perf_counter()
    images = room.steer(
        room.with_controlnets(pipeline, controlnets),
        config.prompt,
        maps,
        scales,
        config.seed,
        config.num_images,
        config.batch_size,
        config.num_inference_steps,
        config.guidance_scale,
        config.negative_prompt,
    )
    config.finish(images, time.perf_counter() - start, room.sheet(pictures, kinds, maps, images))
