"""Nodes for the tests: models of sizes that ComfyUI does not detect, and conditions made elsewhere."""

import torch
from comfy import model_detection, supported_models
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file
from torch import nn


class Width(float):
    """A factor that gives whole numbers of channels."""

    def __mul__(self, other):
        return round(float(self) * other)

    __rmul__ = __mul__


class Model:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {}), "kind": ("STRING", {}), "head": ("INT", {})}}

    @staticmethod
    def _widths(tensors):
        """Widths of the levels in units of the first; ComfyUI's own detection takes whole numbers only."""
        first, ends = len(tensors["input_blocks.0.0.weight"]), []
        for i in range(1, 100):
            norm = tensors.get(f"input_blocks.{i}.0.out_layers.0.weight")
            if norm is None and f"input_blocks.{i}.0.op.weight" not in tensors:
                return [Width(width / first) for width in ends]
            if norm is None or i == 1:
                ends.append(0)
            if norm is not None:
                ends[-1] = len(norm)
        return None

    def load(self, file, kind, head):
        tensors = load_file(file)
        options = model_detection.detect_unet_config(tensors, "")
        config = getattr(supported_models, kind)(options)
        config.unet_config |= {
            "num_heads": -1,
            "num_head_channels": head,
            "channel_mult": self._widths(tensors),
        }
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model(tensors, "")
        model.load_model_weights(dict(tensors), "")
        cpu = torch.device("cpu")
        return (ModelPatcher(model, load_device=cpu, offload_device=cpu),)


class Condition:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {}), "size": ("INT", {})}}

    def load(self, file, size):
        tensors = load_file(file)
        more = {"width": size, "height": size, "target_width": size, "target_height": size}
        if "pooled" in tensors:
            more["pooled_output"] = tensors["pooled"]
        return ([[tensors["cond"], more]],)


class Weights:
    """A model that is nothing but its weights, of any family."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    def load(self, file):
        model = nn.Module()
        for key, value in load_file(file).items():
            *path, name = ["diffusion_model", *key.split(".")]
            module = model
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        cpu = torch.device("cpu")
        return (ModelPatcher(model, load_device=cpu, offload_device=cpu),)


class SaveWeights:
    """Patch a model as ComfyUI does before it samples, and save its weights."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "file": ("STRING", {})}}

    def save(self, model, file):
        for key in model.patches:
            model.patch_weight_to_device(key)
        tensors = model.model.state_dict().items()
        save_file({key.removeprefix("diffusion_model."): value.contiguous() for key, value in tensors}, file)
        return {"ui": {}}


NODE_CLASS_MAPPINGS = {
    "TestModel": Model,
    "TestCondition": Condition,
    "TestWeights": Weights,
    "TestSaveWeights": SaveWeights,
}
