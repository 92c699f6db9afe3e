"""The 72 emoji of the emoji world: their names, and the atlas, one tensor with an image of each.

The images are from Noto Color Emoji (SIL Open Font License 1.1). The font is needed only to draw the atlas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from wadi.errors import WadiError
from wadi.files import load_tensors, save_tensors
from wadi.outputs import Output

FONT_FILE = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
"""Path of the font on Debian and Ubuntu (package ``fonts-noto-color-emoji``)."""

STRIKE_SIZE = 109
"""The only size of the bitmaps in the font (136 x 128 pixels)."""

ATLAS_SIZE = 96
"""Side of an image in the atlas, in pixels."""

# the noun and the character of each emoji
_TABLE = """
panda 🐼, dog 🐶, cat 🐱, mouse 🐭, rabbit 🐰, fox 🦊, bear 🐻, koala 🐨, tiger 🐯, lion 🦁, cow 🐮, pig 🐷,
frog 🐸, monkey 🐵, chicken 🐔, penguin 🐧, owl 🦉, unicorn 🦄, bee 🐝, butterfly 🦋, turtle 🐢,
octopus 🐙, whale 🐳, elephant 🐘,
apple 🍎, tangerine 🍊, banana 🍌, watermelon 🍉, bunch of grapes 🍇, strawberry 🍓,
pair of cherries 🍒, pineapple 🍍, avocado 🥑, ear of corn 🌽, carrot 🥕, mushroom 🍄,
slice of pizza 🍕, burger 🍔, doughnut 🍩, cookie 🍪, birthday cake 🎂, ice cream 🍦, cup of coffee ☕,
egg 🥚,
car 🚗, bus 🚌, bicycle 🚲, rocket 🚀, airplane ✈, sailboat ⛵, train 🚂, tractor 🚜,
football ⚽, basketball 🏀, balloon 🎈, guitar 🎸, gift 🎁, key 🔑, alarm clock ⏰, light bulb 💡,
umbrella ☂, camera 📷, crown 👑, bell 🔔,
cactus 🌵, sunflower 🌻, evergreen tree 🌲, star ⭐, smiling face 😀, robot 🤖, ghost 👻, skull 💀
"""

EMOJI: dict[str, str] = dict(entry.strip().rsplit(" ", 1) for entry in _TABLE.split(","))
"""The character of each noun, in the order of the judge's classes."""

NAMES: tuple[str, ...] = tuple(EMOJI)


def draw_atlas(
    font_file: str | os.PathLike = FONT_FILE, characters: Sequence[str] = tuple(EMOJI.values())
) -> torch.Tensor:
    """Draw every emoji, or other `characters`.

    Returns:
        uint8 (72, 4, 96, 96), or as many as there are `characters`: RGBA with premultiplied alpha; each glyph
        is centred and as large as fits.

    Raises:
        WadiError: the font is missing or is not the bitmap font.
    """
    if not Path(font_file).is_file():
        raise WadiError(
            f"{font_file}: the emoji font is missing; install it (apt-get install fonts-noto-color-emoji) "
            "or name it with --font"
        )
    try:
        font = ImageFont.truetype(str(font_file), STRIKE_SIZE)
    except OSError as error:
        raise WadiError(
            f"{font_file}: is not the bitmap font Noto Color Emoji ({error}); name that font with --font"
        ) from error
    return torch.stack([_draw_glyph(font, character) for character in characters])


def _draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> torch.Tensor:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise WadiError(f"--font: has no image of {character!r}; use Noto Color Emoji 2.034 or later")
    glyph = canvas.crop(box)
    pixels = np.asarray(glyph, dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    side = max(glyph.size)
    square = np.zeros((side, side, 4), dtype=np.float32)
    top, left = (side - glyph.height) // 2, (side - glyph.width) // 2
    square[top : top + glyph.height, left : left + glyph.width] = pixels
    # resized after premultiplication, so that the colour of transparent pixels does not matter
    image = Image.fromarray((square * 255).round().astype(np.uint8), "RGBA")
    channels = [
        channel.resize((ATLAS_SIZE, ATLAS_SIZE), Image.Resampling.LANCZOS) for channel in image.split()
    ]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


@dataclass
class AtlasConfig:
    """Draw the emoji into one file, for machines that lack the font."""

    out: Path
    """Atlas file to write (.safetensors)."""
    font: Path = Path(FONT_FILE)
    """File of the bitmap font Noto Color Emoji."""
    overwrite: bool = False
    """Replace the file if it exists."""


def save_atlas(config: AtlasConfig) -> None:
    """Draw the atlas and write it as safetensors.

    Raises:
        WadiError: the font is missing or is not the bitmap font, or the file may not or cannot be written.
    """
    inputs, suffixes = (config.font,), (".safetensors",)
    with Output(config.out, "emoji atlas", inputs, config.overwrite, suffixes).writing() as temporary:
        save_tensors(temporary, {"atlas": draw_atlas(config.font)})


def load_atlas(path: str | os.PathLike | None = None) -> torch.Tensor:
    """Read the atlas from a file of :func:`save_atlas`, or draw it from the font if `path` is None.

    Raises:
        WadiError: the font is missing, or the file is missing or not an atlas.
    """
    if path is None:
        return draw_atlas()
    tensors = load_tensors(path)
    if "atlas" not in tensors or tensors["atlas"].shape != (len(NAMES), 4, ATLAS_SIZE, ATLAS_SIZE):
        raise WadiError(f"{path}: not an atlas of {len(NAMES)} emoji; write it with `wadi emoji atlas`")
    return tensors["atlas"]
