"""Images of the emoji world, rendered on the device: endless data without files.

What a caption leaves free (place, size, angle, mirroring, background and its shade) is drawn at random.
Lengths are fractions of the image's side, and places are fractions of it from the left and from the top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from wadi.emoji.captions import COLOURS, held_out_background
from wadi.progress import progress

IMAGE_SIZE = 64
SMALL = (0.32, 0.42)
BIG = (0.58, 0.72)
FREE = (0.32, 0.72)
IN_PAIR = (0.34, 0.46)
MAX_ANGLE = math.radians(25)

# Hue in degrees, saturation, value; in the order of COLOURS.
_HSV = (
    (0, 0.85, 0.85),
    (28, 0.95, 1.0),
    (54, 0.85, 1.0),
    (125, 0.65, 0.65),
    (212, 0.75, 0.90),
    (275, 0.60, 0.70),
    (335, 0.40, 1.0),
    (25, 0.65, 0.42),
    (0, 0.0, 0.55),
    (0, 0.0, 0.98),
)


@dataclass
class Scenes:
    """A batch of N scenes, with everything that decides their images.

    Attributes:
        emoji: (N, 2) int64, class of each object, -1 where there is no second one.
        center: (N, 2, 2) float32, x and y of each object's centre, fractions of the side.
        size: (N, 2) float32, side of each object, fraction of the image's.
        angle: (N, 2) float32, radians.
        mirror: (N, 2) float32, -1 (mirrored) or 1.
        background: (N,) int64, index into ``COLOURS``.
        colour: (N, 3) float32, RGB in [0, 1].
        gradient: (N, 2) float32, change of brightness from the centre to the right and the lower edge.
    """

    emoji: torch.Tensor
    center: torch.Tensor
    size: torch.Tensor
    angle: torch.Tensor
    mirror: torch.Tensor
    background: torch.Tensor
    colour: torch.Tensor
    gradient: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, index: slice | torch.Tensor) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def sample_scenes(stated: dict[str, torch.Tensor], generator: torch.Generator) -> Scenes:
    """Draw a scene for each caption; what the caption does not state is random.

    Args:
        stated: the tensors of :func:`wadi.emoji.captions.stated`, on the generator's device.
        generator: source of all randomness.
    """
    emoji, device = stated["emoji"], generator.device
    count = len(emoji)

    def uniform(low: float | torch.Tensor, high: float | torch.Tensor, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    pair = emoji[:, 1] >= 0
    low, high = _ranges(stated["size"], pair)
    size = uniform(low[:, None], high[:, None], 2)
    center = torch.where(
        pair[:, None, None],
        _pair_centers(stated["relation"], uniform),
        _single_center(stated["place"], size[:, 0], uniform)[:, None],
    )
    free = _free_background(emoji, generator)
    background = torch.where(stated["background"] >= 0, stated["background"], free)
    return Scenes(
        emoji=emoji,
        center=center,
        size=size,
        angle=uniform(-MAX_ANGLE, MAX_ANGLE, 2),
        mirror=torch.where(uniform(0.0, 1.0, 2) < 0.5, -1.0, 1.0),
        background=background,
        colour=_shades(background, uniform),
        gradient=uniform(-0.08, 0.08, 2),
    )


def random_scenes(
    stated: dict[str, torch.Tensor], count: int, generator: torch.Generator
) -> tuple[Scenes, torch.Tensor]:
    """Choose captions at random, with repetition, and draw a scene for each.

    Args:
        stated: the tensors of :func:`wadi.emoji.captions.stated`, on the generator's device.
        count: number of scenes.
        generator: source of all randomness.

    Returns:
        The scenes, and the index (count,) int64 of the caption of each.
    """
    index = torch.randint(len(stated["size"]), (count,), generator=generator, device=generator.device)
    return sample_scenes({name: column[index] for name, column in stated.items()}, generator), index


def _ranges(size: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor([SMALL, BIG, IN_PAIR, FREE], device=size.device)
    chosen = table[torch.where(pair, 2, torch.where(size >= 0, size, 3))]
    return chosen[:, 0], chosen[:, 1]


def _single_center(place: torch.Tensor, size: torch.Tensor, uniform) -> torch.Tensor:
    """Centres (N, 2). In the room that an object of this size has, it touches the edges at -1 and 1."""
    room = 0.5 - size / 2
    relative = uniform(-1.0, 1.0, 2)
    near, center = uniform(0.6, 1.0), uniform(-0.12, 0.12, 2)
    x, y = relative.unbind(1)
    x = torch.where(place == 0, -near, torch.where(place == 1, near, x))
    y = torch.where(place == 2, -near, torch.where(place == 3, near, y))
    relative = torch.where((place == 4)[:, None], center, torch.stack([x, y], 1))
    return 0.5 + relative * room[:, None]


def _pair_centers(relation: torch.Tensor, uniform) -> torch.Tensor:
    """Centres (N, 2, 2) of two objects side by side or above each other, as the relation states."""
    draw = uniform(0.0, 1.0)
    vertical = torch.where(relation == 0, draw < 0.5, relation == 2)
    swap = (relation == 0) & (uniform(0.0, 1.0) < 0.5)
    half = uniform(0.23, 0.26)
    along = torch.stack([0.5 - half, 0.5 + half], 1) + uniform(-0.02, 0.02)[:, None]
    along = torch.where(swap[:, None], along.flip(1), along)
    across = 0.5 + uniform(-0.14, 0.14)[:, None] + uniform(-0.10, 0.10, 2)
    horizontal = torch.stack([along, across], 2)
    return torch.where(vertical[:, None, None], horizontal.flip(2), horizontal)


def _free_background(emoji: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Backgrounds (N,) that training may show with these emoji (see ``held_out_background``)."""
    forbidden = torch.where(emoji >= 0, held_out_background(emoji), -1)
    colours = torch.arange(len(COLOURS), device=emoji.device)
    allowed = (forbidden[:, :, None] != colours).all(1).float()
    return torch.multinomial(allowed, 1, generator=generator)[:, 0]


def _shades(background: torch.Tensor, uniform) -> torch.Tensor:
    hue, saturation, value = torch.tensor(_HSV, device=background.device)[background].unbind(1)
    grey = saturation == 0
    hue = hue + uniform(-6.0, 6.0)
    saturation = torch.where(grey, 0.0, (saturation + uniform(-0.07, 0.07)).clamp(0, 1))
    value = (value + uniform(-0.05, 0.05)).clamp(0, 1)
    # HSV to RGB in closed form: f(n) = v - v s max(0, min(k, 4 - k, 1)), k = (n + h / 60) mod 6
    n = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (n + hue[:, None] / 60) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def render(scenes: Scenes, atlas: torch.Tensor) -> torch.Tensor:
    """Render scenes at twice the size, and average them down.

    Args:
        scenes: N scenes.
        atlas: (72, 4, S, S) uint8 or float in [0, 1], premultiplied RGBA, on the same device.

    Returns:
        (N, 3, 64, 64) float32 in [0, 1].
    """
    atlas = atlas.float() / 255 if atlas.dtype == torch.uint8 else atlas
    count, side = len(scenes), 2 * IMAGE_SIZE
    axis = (torch.arange(side, device=atlas.device) + 0.5) / side * 2 - 1
    shade = scenes.gradient[:, 0, None, None] * axis + scenes.gradient[:, 1, None, None] * axis[:, None]
    canvas = (scenes.colour[:, :, None, None] * (1 + shade[:, None])).clamp(0, 1)
    for slot in range(2):
        cos, sin = scenes.angle[:, slot].cos(), scenes.angle[:, slot].sin()
        mirror, center = scenes.mirror[:, slot], 2 * scenes.center[:, slot] - 1
        # affine_grid maps the canvas to the glyph: rotate back, scale up, mirror
        rows = torch.stack([torch.stack([mirror * cos, mirror * sin], 1), torch.stack([-sin, cos], 1)], 1)
        rows = rows / scenes.size[:, slot, None, None]
        theta = torch.cat([rows, -(rows @ center[:, :, None])], 2)
        grid = F.affine_grid(theta, [count, 4, side, side], align_corners=False)
        glyph = F.grid_sample(atlas[scenes.emoji[:, slot].clamp(min=0)], grid, align_corners=False)
        glyph = glyph * (scenes.emoji[:, slot] >= 0)[:, None, None, None]
        canvas = glyph[:, :3] + (1 - glyph[:, 3:]) * canvas
    return F.avg_pool2d(canvas, 2)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as uint8 of the same shape."""
    return (images * 255).round().to(torch.uint8)


def draw(scenes: Scenes, atlas: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
    """Render many scenes, `batch_size` at a time.

    Args:
        scenes: N scenes.
        atlas: see `render`.
        batch_size: does not change the images.

    Returns:
        (N, 3, 64, 64) uint8, on the device.
    """
    starts = progress(range(0, len(scenes), batch_size), desc="images", unit="batch", leave=False)
    return torch.cat([to_bytes(render(scenes[first : first + batch_size], atlas)) for first in starts])
