"""Which layers of an architecture turn, and at which rank: the selections behind the paper's counts.

| architecture | student | fake |
| --- | --- | --- |
| Stable Diffusion 1.5 | 83.80 M at rank 256 | 9.38 M at rank 32 |
| Stable Diffusion 2.1 | 94.43 M at rank 256 | 9.51 M at rank 32 |
| PixArt-alpha XL/2 | 81.22 M at rank 128 | 20.13 M at rank 32 |

The student turns every `nn.Linear` of a U-Net's down, mid and up blocks (convolutions stay as they are), or
every `nn.Linear` of a PixArt transformer but those of `adaln_single`. The fake model turns the attention and
feed-forward layers only.
"""

from __future__ import annotations

from torch import nn

from wadi.lorad.config import LoRaDConfig

FAKE_RANK = 32
_UNET_STUDENT_RANK, _PIXART_STUDENT_RANK = 256, 128
_NOT_IN_FAKE = ("proj_in", "proj_out", "time_emb_proj")

_UNET_BLOCKS = r"(down_blocks|mid_block|up_blocks)\..*\."
_ATTENTION_AND_FEED_FORWARD = r"to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2"
_PIXART_BLOCKS = rf"transformer_blocks\..*\.({_ATTENTION_AND_FEED_FORWARD})"

# name: (rank of the student, modules of the student, modules of the fake model)
_PRESETS: dict[str, tuple[int, str, str]] = {
    "sd15": (
        _UNET_STUDENT_RANK,
        rf"{_UNET_BLOCKS}({_ATTENTION_AND_FEED_FORWARD}|time_emb_proj)",
        rf"{_UNET_BLOCKS}({_ATTENTION_AND_FEED_FORWARD})",
    ),
    "sd21": (  # proj_in and proj_out are linear here, convolutions in 1.5
        _UNET_STUDENT_RANK,
        rf"{_UNET_BLOCKS}({_ATTENTION_AND_FEED_FORWARD}|time_emb_proj|proj_in|proj_out)",
        rf"{_UNET_BLOCKS}({_ATTENTION_AND_FEED_FORWARD})",
    ),
    "pixart": (
        _PIXART_STUDENT_RANK,
        rf"{_PIXART_BLOCKS}|caption_projection\.linear_[12]|proj_out",
        _PIXART_BLOCKS,
    ),
}


def student_config(architecture: str | nn.Module, r: int | None = None) -> LoRaDConfig:
    """Return the adapter of a student: every linear layer that the paper turns.

    Args:
        architecture: "sd15", "sd21" or "pixart", or a `UNet2DConditionModel` or `PixArtTransformer2DModel`
            of any size, whose layers are then listed by name.
        r: rank; by default 256 for a U-Net and 128 for PixArt.

    Raises:
        ValueError: the name or the model is not one of those.
    """
    if isinstance(architecture, str):
        default_r, modules, _ = _preset(architecture)
        return LoRaDConfig(r=default_r if r is None else r, target_modules=modules)
    default_r, names = _linear_layers(architecture)
    return LoRaDConfig(r=default_r if r is None else r, target_modules=names)


def fake_config(architecture: str | nn.Module, r: int | None = None) -> LoRaDConfig:
    """Return the adapter of a fake model: attention and feed-forward layers only; by default at rank 32.

    Args and errors are those of `student_config`.
    """
    r = FAKE_RANK if r is None else r
    if isinstance(architecture, str):
        return LoRaDConfig(r=r, target_modules=_preset(architecture)[2])
    _, names = _linear_layers(architecture)
    kept = [
        name
        for name in names
        if not name.endswith(_NOT_IN_FAKE) and not name.startswith("caption_projection")
    ]
    return LoRaDConfig(r=r, target_modules=kept)


def _preset(name: str) -> tuple[int, str, str]:
    if name not in _PRESETS:
        raise ValueError(
            f"Unknown architecture {name!r}; choose one of {', '.join(_PRESETS)}, or pass the model."
        )
    return _PRESETS[name]


def _linear_layers(model: nn.Module) -> tuple[int, list[str]]:
    """Return the default rank of a student of `model`, and the names of the linear layers it turns."""
    # a layer that already carries an adapter keeps its nn.Linear one level down
    names = [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if all(hasattr(model, part) for part in ("down_blocks", "mid_block", "up_blocks")):
        prefixes = ("down_blocks.", "mid_block.", "up_blocks.")
        return _UNET_STUDENT_RANK, [name for name in names if name.startswith(prefixes)]
    if hasattr(model, "transformer_blocks") and hasattr(model, "adaln_single"):
        return _PIXART_STUDENT_RANK, [name for name in names if not name.startswith("adaln_single.")]
    raise ValueError(
        f"No preset for {type(model).__name__}, only for UNet2DConditionModel and PixArtTransformer2DModel; "
        "for other models name the target_modules in a LoRaDConfig."
    )
