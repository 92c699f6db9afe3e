"""The original names of the weights of U-Nets and of autoencoders, as the first Stable Diffusion had them.

diffusers reads these names and has no function that writes them. What is outside of the blocks comes from
diffusers' own tables. The rules for the blocks are here, and `check` lets diffusers' reader judge the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, LDM_UNET_KEY
from torch import nn

from wadi.errors import WadiError

Tensors = dict[str, torch.Tensor]

_UNET, _VAE = DIFFUSERS_TO_LDM_MAPPING["unet"], DIFFUSERS_TO_LDM_MAPPING["vae"]
_OUTSIDE = _UNET["layers"] | _UNET["addition_embed_type"]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_IN_BLOCK = re.compile(
    r"(?:(down|up|mid)_blocks?)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
)


def unet_tensors(unet: nn.Module) -> Tensors:
    """The tensors of a `UNet2DConditionModel` by their names in the original layout.

    Raises:
        WadiError: the layout has no place for a part of the network.
    """
    state = unet.state_dict()
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise WadiError(
            "--format single-file: the original layout has the same number of layers in every block, and "
            f"this U-Net has layers_per_block {layers}; choose --format diffusers"
        )
    attended = {name.split(".")[1] for name in state if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    tensors = {
        LDM_UNET_KEY + (_OUTSIDE.get(name) or _in_block(name, layers, attended)): tensor
        for name, tensor in state.items()
    }
    check(tensors, unet)
    return tensors


def vae_tensors(vae: nn.Module, prefix: str) -> Tensors:
    """The tensors of an `AutoencoderKL` by their names in the original layout, in which attention is 1 x 1.

    Args:
        vae: the autoencoder.
        prefix: of every name, with a dot.

    Raises:
        WadiError: the layout has no place for a part of the network.
    """
    blocks, tensors = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        original = _VAE.get(name) or _in_vae(name, blocks)
        convolution = ".attn_1." in original and tensor.ndim == 2
        tensors[prefix + original] = tensor[:, :, None, None] if convolution else tensor
    check(tensors, vae)
    return tensors


def check(tensors: Tensors, module: nn.Module) -> None:
    """Raise unless diffusers' own reader gives back every tensor of the network.

    Raises:
        WadiError: it gives other names or other numbers.
    """
    kind, state = type(module).__name__, module.state_dict()
    read = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](
        checkpoint=dict(tensors), config=dict(module.config)
    )
    wrong = [name for name in state if name not in read or not torch.equal(read[name], state[name])]
    if wrong := [*wrong, *sorted(read.keys() - state.keys())]:
        raise WadiError(
            f"--format single-file: the original layout has no place for {len(wrong)} weights of this "
            f"{kind}, such as {wrong[0]}; choose --format diffusers"
        )


def _in_block(name: str, layers: int, attended: Iterable[str]) -> str:
    """The original name of a weight in a block of a U-Net; the name itself where it is in no block.

    Args:
        name: in diffusers.
        layers: resnets of a block on the way down. On the way up there is one more.
        attended: numbers of the blocks on the way up that have attention.
    """
    if (match := _IN_BLOCK.fullmatch(name)) is None:
        return name
    side, block, kind, place, rest = match.groups()
    if kind == "resnets":
        layer, _, parameter = rest.rpartition(".")
        rest = f"{_RESNET.get(layer, layer)}.{parameter}"
    if side == "mid":
        return f"middle_block.{2 * int(place) + (kind == 'attentions')}.{rest}"
    first = int(block) * (layers + 1)  # a block has a place more than layers: its last resnet, or its sampler
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (block in attended)}.{rest}"
    at = f"input_blocks.{first + 1 + int(place)}" if side == "down" else f"output_blocks.{first + int(place)}"
    return f"{at}.{int(kind == 'attentions')}.{rest}"


def _in_vae(name: str, blocks: int) -> str:
    """The original name of a weight in a block of an autoencoder, whose way up is counted from its end."""
    if attention := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
        side, layer, parameter = attention.groups()
        return f"{side}.mid.attn_1.{_ATTENTION.get(layer, layer)}.{parameter}"
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
    return name.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
