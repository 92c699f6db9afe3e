"""`wadi control`: make images in one step that follow a condition map."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wadi import emoji
from wadi.commands.images import ImageOptions
from wadi.errors import WadiError
from wadi.images import open_image
from wadi.onestep.arguments import finite_number, image_size
from wadi.tasks import control as room


@dataclass(kw_only=True)
class ControlConfig(ImageOptions):
    """Options of `control`."""

    command = "control"

    image: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]
    """The image, or the condition map itself. What does not fit into the size of the result is cut off."""
    condition: tyro.conf.UseAppendAction[tuple[Literal["canny", "map"], ...]] = ()
    """canny: the edges of the image are the condition map; map: the image itself is the map. canny if not
    given."""
    controlnet: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or hub id of a ControlNetModel that was trained with the model, or with its teacher."""
    conditioning_scale: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Factor of what the ControlNet adds: 0 for nothing, 1 for all. If not given, 1; or 0.5 for one step with
    the ControlNet that comes with wadi."""
    low: float = 100
    """Lower threshold of edges, as a gradient in 8-bit steps."""
    high: float = 200
    """Upper threshold of edges, as a gradient in 8-bit steps."""
    out: Path = Path("control.png")
    """A .png or .jpg file, which shows image, condition map and results side by side; or a folder, with a
    file for each result."""

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The ControlNets of the options, or the one that comes with wadi if the model does too."""
        if self.controlnet:
            return self.controlnet
        if self.model is not None:
            raise WadiError(
                f"--controlnet: name a ControlNet that was trained with {self.model}; the one that comes "
                "with wadi is for the built-in model"
            )
        return (str(emoji.controlnet_folder()),)


def control(config: ControlConfig) -> None:
    """Make images in one step that follow the edges of an image, or a condition map.

    A ControlNet that was trained on the multi-step teacher steers the student. Without --model, --adapter and
    --controlnet, the built-in student and its ControlNet are used.

    Several ControlNets add up: repeat --controlnet, and name one image for all of them or one for each. The
    same holds for --condition and --conditioning-scale.
    """
    config.check()
    names = config.controlnets
    sources = [open_image(path) for path in room.one_for_each("IMAGE", config.image, len(names))]
    kinds = room.one_for_each("--condition", config.condition or ("canny",), len(names))
    usual = 1.0 if config.controlnet or config.num_inference_steps > 1 else emoji.CONTROLNET_SCALE
    for value in config.conditioning_scale:
        finite_number("--conditioning-scale", value)
    scales = room.one_for_each("--conditioning-scale", config.conditioning_scale or (usual,), len(names))
    pipeline = config.load()
    size = image_size(pipeline, config.height, config.width)[::-1]
    maps = [
        room.condition_map(source, kind, size, config.low, config.high)
        for source, kind in zip(sources, kinds, strict=True)
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
        config.sampling(),
    )
    config.finish(images, time.perf_counter() - start, room.sheet(sources, kinds, maps, images))
