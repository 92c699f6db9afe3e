"""The adapter methods of diffusers and transformers models."""

import pytest
import torch
from peft import get_peft_model

from tests.tiny import tiny_pipeline
from wadi.backbones import student_config
from wadi.lorad import LoRaDConfig, LoRaDLayer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def unet_output(unet, **kwargs):
    with torch.no_grad():
        return unet(normal(2, 4, 8, 8), torch.tensor([3, 500]), normal(2, 5, 16), **kwargs).sample


def config(unet, **options):
    torch.manual_seed(1)
    return LoRaDConfig(r=4, target_modules=student_config(unet).target_modules, init_weights=False, **options)


def test_unet(pipeline):
    unet = pipeline.unet
    base = unet_output(unet)
    weights = {name: p.clone() for name, p in unet.state_dict().items()}
    chosen = config(unet)
    unet.add_adapter(chosen, "a")
    only_a = unet_output(unet)
    unet.add_adapter(chosen, "b")
    only_b = unet_output(unet)
    assert not torch.allclose(only_a, base, **CLOSE)
    assert not torch.allclose(only_a, only_b, **CLOSE)

    unet.set_adapters(["a", "b"], weights=[1.0, 0.0])
    assert torch.equal(unet_output(unet), only_a)
    unet.set_adapters(["a", "b"], weights=[0.0, 0.0])
    assert torch.equal(unet_output(unet), base)
    unet.set_adapters(["a"], weights=[0.5])
    half = unet_output(unet)
    unet.set_adapters(["a"])
    torch.testing.assert_close(unet_output(unet, cross_attention_kwargs={"scale": 0.5}), half, **CLOSE)
    assert torch.equal(unet_output(unet), only_a)

    unet.fuse_lora()
    torch.testing.assert_close(unet_output(unet), only_a, **CLOSE)
    unet.unfuse_lora()
    unet.fuse_lora(lora_scale=0.5, safe_fusing=True, adapter_names=["a"])
    torch.testing.assert_close(unet_output(unet), half, **CLOSE)
    unet.unfuse_lora()
    unet.set_adapters(["a"])
    assert torch.equal(unet_output(unet), only_a)

    unet.disable_lora()
    assert torch.equal(unet_output(unet), base)
    unet.enable_lora()
    assert torch.equal(unet_output(unet), only_a)
    unet.delete_adapters("a")
    assert all(set(module.r) == {"b"} for module in unet.modules() if isinstance(module, LoRaDLayer))
    unet.unload_lora()
    assert torch.equal(unet_output(unet), base)
    after = unet.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_fused_and_unloaded_is_a_stock_unet(pipeline, tmp_path):
    unet = pipeline.unet
    unet.add_adapter(config(unet))
    turned = unet_output(unet)
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    torch.testing.assert_close(unet_output(type(unet).from_pretrained(tmp_path)), turned, **CLOSE)


def test_gradient_checkpointing_of_a_unet(pipeline):
    unet = pipeline.unet
    unet.add_adapter(config(unet))
    unet.train()
    grads = []
    for enable in (False, True):
        if enable:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(normal(2, 4, 8, 8), torch.tensor([3, 500]), normal(2, 5, 16)).sample.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad})
    assert grads[0]
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_half_precision_unet(pipeline):
    """diffusers holds the adapter in the base's dtype; the angles are float32 all the same."""
    unet = pipeline.unet.to(torch.bfloat16)
    unet.add_adapter(config(unet))
    layer = next(module for module in unet.modules() if isinstance(module, LoRaDLayer))
    assert layer.lorad_A["default"].dtype == torch.bfloat16
    x = normal(3, layer.weight.shape[1]).bfloat16()
    A, B = (parameter["default"].double() for parameter in (layer.lorad_A, layer.lorad_B))
    o, e = layer.weight.double()[:, 0::2], layer.weight.double()[:, 1::2]
    cos, sin = (A @ B).cos(), (A @ B).sin()
    turned = torch.stack((o * cos - e * sin, o * sin + e * cos), -1).flatten(1).bfloat16()
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, turned, layer.bias))


def test_peft_model_around_a_unet(pipeline):
    unet = pipeline.unet
    base = unet_output(unet)
    model = get_peft_model(unet, student_config(unet, r=2))
    assert torch.equal(unet_output(model), base)
    merged = model.merge_and_unload()
    assert torch.equal(unet_output(merged), base)


def test_clip_text_model(pipeline, tmp_path):
    text_encoder = pipeline.text_encoder
    tokens = torch.arange(8)[None]
    base = text_encoder(tokens).last_hidden_state
    torch.manual_seed(1)
    text_encoder.add_adapter(LoRaDConfig(r=2, target_modules=["q_proj", "fc1"], init_weights=False))
    turned = text_encoder(tokens).last_hidden_state
    assert not torch.allclose(turned, base, **CLOSE)
    text_encoder.save_pretrained(tmp_path)
    other = tiny_pipeline().text_encoder
    other.load_adapter(str(tmp_path))
    assert torch.equal(other(tokens).last_hidden_state, turned)
    other.disable_adapters()
    assert torch.equal(other(tokens).last_hidden_state, base)
