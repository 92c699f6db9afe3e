"""Students of tiny teachers of several families, with adapters that change a good deal."""

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import mark_student, tiny_pipeline, tiny_sd3, tiny_sdxl
from tests.tiny_flows import tiny_flux
from wadi import LoRaDConfig
from wadi.onestep.student import network_of
from wadi.tasks.dreambooth_training import TEXT_ENCODER_LAYERS


def tiny_sd2():
    """The same with the text encoder that Stable Diffusion 2 has, of OpenCLIP."""
    pipeline = tiny_pipeline()
    pipeline.text_encoder.config.hidden_act = "gelu"
    return pipeline


FAMILIES = {
    "sd": tiny_pipeline,
    "sd2": tiny_sd2,
    "sdxl": tiny_sdxl,
    "sd3": lambda: tiny_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux": tiny_flux,
}
LAYERS = ["to_q", "to_out.0", "time_emb_proj", "ff.net.2", "conv1", "conv_shortcut", "linear_1", "proj_out"]
"""Ends of the names of changed layers, of every kind that the families have."""


def save_student(pipeline, folder, kind=LoRaDConfig, text=False, **options):
    """Save a pipeline as `folder`/teacher and a student of it as `folder`/adapter.

    Args:
        pipeline: of the teacher.
        folder: where.
        kind: LoRaDConfig or LoraConfig.
        text: whether the text encoder is changed too.
        **options: of the adapter.
    """
    pipeline.save_pretrained(folder / "teacher")
    (folder / "adapter").mkdir()
    mark_student(folder / "adapter", pipeline)
    parts = [("", network_of(pipeline), LAYERS)]
    if text:
        parts.append(("text_encoder", pipeline.text_encoder, TEXT_ENCODER_LAYERS))
    for place, module, layers in parts:
        adapted = get_peft_model(module, kind(**{"r": 4, "target_modules": layers} | options))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lorad_" in name or "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        adapted.save_pretrained(folder / "adapter" / place)
    return folder


def save_lora_student(pipeline, folder):
    """A student whose adapter is a LoRA with an alpha of its own."""
    return save_student(pipeline, folder, LoraConfig, lora_alpha=6)
