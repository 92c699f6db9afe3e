"""What a single file holds is told from its header."""

import pytest
import torch
from safetensors.torch import save_file

from wadi.errors import WadiError
from wadi.teachers.kinds import read_lora_header, read_model_header

SQUARE = torch.zeros(4, 4)
NO_MODELS = {
    "LoRA of kohya": ("lora_unet_down_blocks_0.lora_up.weight", SQUARE, "adapter such as LoRA"),
    "LoRA of diffusers": ("unet.down_blocks.0.to_q.lora.up.weight", SQUARE, "adapter such as LoRA"),
    "LoRA of PEFT": ("transformer.blocks.0.to_q.lora_A.weight", SQUARE, "adapter such as LoRA"),
    "old LoRA of diffusers": ("unet.down.processor.to_q_lora.up.weight", SQUARE, "adapter such as LoRA"),
    "LoHa": ("lora_unet_mid_block.hada_w1_a", SQUARE, "adapter such as LoRA"),
    "LoKr": ("lora_unet_mid_block.lokr_w1", SQUARE, "adapter such as LoRA"),
    "LoRaD": ("base_model.model.down_blocks.0.to_q.lorad_A", SQUARE, "LoRaD adapter of wadi"),
    "ControlNet": ("control_model.input_blocks.0.0.weight", SQUARE, "ControlNet"),
    "ControlNet of diffusers": ("controlnet_cond_embedding.conv_in.weight", SQUARE, "ControlNet"),
    "IP-Adapter": ("image_proj.proj.weight", SQUARE, "IP-Adapter"),
    "motion module": ("down_blocks.0.motion_modules.0.proj.weight", SQUARE, "motion module"),
    "learned word": ("emb_params", SQUARE, "learned word"),
    "learned word of SDXL": ("clip_g", SQUARE, "learned word"),
    "text encoder": ("text_model.encoder.layers.0.mlp.fc1.weight", SQUARE, "only text encoders"),
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight", SQUARE, "only text encoders"),
    "autoencoder": ("decoder.conv_in.weight", SQUARE, "only an autoencoder"),
    "scaled float8": ("model.diffusion_model.out.2.scale_weight", SQUARE, "quantised"),
    "nf4": ("model.diffusion_model.out.weight.quant_state.bitsandbytes__nf4", SQUARE, "quantised"),
    "inpainting": ("model.diffusion_model.input_blocks.0.0.weight", torch.zeros(8, 9, 3, 3), "9 channels"),
    "editing": ("unet.conv_in.weight", torch.zeros(8, 8, 3, 3), "8 channels"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_called_by_its_name(name, tmp_path):
    key, tensor, said = NO_MODELS[name]
    save_file({key: tensor}, tmp_path / "file.safetensors")
    with pytest.raises(WadiError, match=f"file.safetensors: holds .*{said}.*; name"):
        read_model_header(tmp_path / "file.safetensors")


@pytest.mark.parametrize("read", [read_model_header, read_lora_header])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.safetensors", None, "no such file"),
        ("model.ckpt", b"x", "can run code"),
        ("model.bin", b"x", "can run code"),
        ("model.gguf", b"GGUF", "quantised"),
        ("model", b"x", "must be a .safetensors file"),
        ("model.safetensors", b"not one", "could not read"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "could not read"),
    ],
)
def test_files_of_other_formats(read, name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WadiError, match=said) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "kind", ["dora_scale", "hada_w1_a", "lokr_w1", "oft_diag", "lora_mid.weight", "diff"]
)
def test_other_adapters_are_no_lora(kind, tmp_path):
    save_file({"a.lora_up.weight": SQUARE, f"a.{kind}": SQUARE.clone()}, tmp_path / "file.safetensors")
    with pytest.raises(WadiError, match=r"is an? .*only LoRA can be fused"):
        read_lora_header(tmp_path / "file.safetensors")
