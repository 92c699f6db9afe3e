"""Released weights, one file, to folders: every key accounted for, every mistake one line."""

import json
import shutil

import pytest
import torch
from diffusers import LCMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline, tiny_pixart
from wadi import WadiError
from wadi.lorad.rotation import Factors, rotated_weight
from wadi.onestep import Student, StudentPipeline, import_weights

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def weights():
    """Another network of the teacher's architecture, as a state dict."""
    return {key: tensor.detach().clone() for key, tensor in tiny_pipeline(seed=1).unet.state_dict().items()}


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importing") / "pixart"
    tiny_pixart().save_pretrained(folder)
    return folder


FORMS = {
    "safetensors": (".safetensors", lambda state: state),
    "torch.save": (".pt", lambda state: state),
    "older torch.save": (".bin", lambda state: state),
    "wrapped": (".pt", lambda state: {"state_dict": state, "epoch": 3}),
    "DDP of a compiled network": (".pt", lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()}),
    "part of a pipeline": (".safetensors", lambda s: {f"unet.{k}": t for k, t in s.items()}),
    "half precision": (".safetensors", lambda s: {k: t.half() for k, t in s.items()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_unet_becomes_the_pipeline(form, weights, teacher_folder, tmp_path):
    suffix, change = FORMS[form]
    path = tmp_path / f"student{suffix}"
    if suffix == ".safetensors":
        save_file(change(weights), path)
    else:
        torch.save(change(weights), path, _use_new_zipfile_serialization=form != "older torch.save")
    released = import_weights(path, teacher_folder, tmp_path / "out")
    assert released.ignored == (("epoch",) if form == "wrapped" else ())
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    expected = {k: t.half().float() for k, t in weights.items()} if form == "half precision" else weights
    ours = stock.unet.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
    assert isinstance(stock.scheduler, LCMScheduler)
    assert float(stock.scheduler.alphas_cumprod[-1]) == pytest.approx(0.0047, rel=1e-6)
    assert {p.name for p in tmp_path.iterdir()} == {"out", path.name}


def test_the_picture_is_the_formula_with_the_students_alpha(weights, teacher_folder, tmp_path):
    save_file(weights, tmp_path / "student.safetensors")
    import_weights(tmp_path / "student.safetensors", teacher_folder, tmp_path / "out")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    embeds, _ = stock.encode_prompt(PROMPT, "cpu", 1, False)
    with torch.no_grad():
        eps = tiny_pipeline(seed=1).unet(z, 999, embeds).sample.double()
    expected = (z.double() - (1 - 0.0047) ** 0.5 * eps) / 0.0047**0.5
    x0 = stock(
        PROMPT,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    assert (x0 - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("alpha_T_squared", [0.02, None])
def test_alpha_is_an_option(alpha_T_squared, weights, teacher_folder, tmp_path):
    save_file(weights, tmp_path / "student.safetensors")
    import_weights(tmp_path / "student.safetensors", teacher_folder, tmp_path / "out", alpha_T_squared)
    scheduler = LCMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    own = 0.0046601  # of Stable Diffusion's schedule
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(alpha_T_squared or own, rel=1e-4)


@pytest.mark.parametrize("old", [False, True], ids=["new base", "base of Transformer2DModel"])
def test_pixart_of_older_diffusers(old, pixart, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pixart, base)
    if old:
        config = json.loads((base / "transformer" / "config.json").read_text())
        config["_class_name"] = "Transformer2DModel"
        (base / "transformer" / "config.json").write_text(json.dumps(config))
        index = json.loads((base / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "Transformer2DModel"]
        (base / "model_index.json").write_text(json.dumps(index))
    weights = {k: t + 0.125 for k, t in tiny_pixart().transformer.state_dict().items()}
    save_file({**weights, "caption_projection.y_embedding": torch.ones(120, 32)}, tmp_path / "w.safetensors")
    released = import_weights(tmp_path / "w.safetensors", base, tmp_path / "out")
    assert released.ignored == ("caption_projection.y_embedding",)
    stock = PixArtAlphaPipeline.from_pretrained(tmp_path / "out")
    ours = stock.transformer.state_dict()
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in weights.items())
    assert float(stock.scheduler.alphas_cumprod[-1]) == pytest.approx(0.0047, rel=1e-6)


def test_dtype_of_the_folder(weights, teacher_folder, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    import_weights(tmp_path / "w.safetensors", teacher_folder, tmp_path / "out", dtype=torch.float16)
    saved = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[key], tensor.half()) for key, tensor in weights.items())


def without(key):
    return lambda state: {k: t for k, t in state.items() if k != key}


MISTAKES = [
    (without("conv_in.bias"), r"1 keys missing \(conv_in.bias\)"),
    (lambda s: {k: t for k, t in s.items() if "attn" not in k}, r"\d\d keys missing \(.*, .*, .*, \.\.\.\)"),
    (lambda s: {**s, "extra.weight": torch.ones(2)}, r"1 keys unexpected \(extra.weight\)"),
    (
        lambda s: {**s, "conv_in.bias": torch.ones(3)},
        r"1 keys of another shape \(conv_in.bias \(3,\) for \(16,\)\)",
    ),
    (lambda s: {f"unet.{k}" if "time_emb" in k else k: t for k, t in s.items()}, "missing.*unexpected"),
    (
        lambda s: {**s, "conv_in.bias": torch.full((16,), torch.inf)},
        r"1 weights are not finite \(conv_in.bias\)",
    ),
    (lambda s: {**s, "conv_in.bias": torch.ones(16, dtype=torch.int64)}, "not floating-point"),
    (lambda s: {f"model.diffusion_model.{k}": t for k, t in s.items()}, "format of diffusers"),
    (lambda s: {}, "holds no state dict"),
    (lambda s: {"state_dict": s["conv_in.bias"]}, "format of diffusers"),
    (lambda s: tiny_pixart().transformer.state_dict(), "holds a PixArt.*has a UNet2DConditionModel"),
    (lambda s: [s], "holds no state dict"),
    (lambda s: {"mid_block.attentions.0.proj_in.theta_a": torch.ones(32, 2)}, "1 keys missing .*theta_b"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_one_line(change, message, weights, teacher_folder, tmp_path):
    torch.save(change(dict(weights)), tmp_path / "w.pt")
    with pytest.raises(WadiError, match=message) as caught:
        import_weights(tmp_path / "w.pt", teacher_folder, tmp_path / "out")
    assert str(tmp_path / "w.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_files_that_are_not_weights(teacher_folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"state_dict": Payload()}, tmp_path / "pickle.pt")
    (tmp_path / "text.bin").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("pickle.pt", "text.bin", "text.safetensors", "nowhere.pt", "."):
        with pytest.raises(WadiError, match=str(tmp_path)) as caught:
            import_weights(tmp_path / name, teacher_folder, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_too_large_for_half_precision(weights, teacher_folder, tmp_path):
    save_file({**weights, "conv_in.bias": torch.full((16,), 1e6)}, tmp_path / "w.safetensors")
    with pytest.raises(WadiError, match=r"not finite in torch.float16 \(conv_in.bias\)"):
        import_weights(tmp_path / "w.safetensors", teacher_folder, tmp_path / "out", dtype=torch.float16)


def test_the_base_is_not_overwritten(weights, teacher_folder, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    for out in (teacher_folder, tmp_path):
        with pytest.raises(WadiError, match="which is read"):
            import_weights(tmp_path / "w.safetensors", teacher_folder, out)


def test_angles_become_an_adapter(teacher_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    unet = tiny_pipeline().unet
    to_q = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    ranks = {"mid_block.attentions.0.proj_in": 2, to_q: 3}
    tensors = {}
    for name, r in ranks.items():
        out_features, fan_in = unet.get_submodule(name).weight.shape
        tensors[f"{name}.theta_a"] = torch.randn(out_features, r, generator=generator)
        tensors[f"{name}.theta_b"] = torch.randn(r, fan_in // 2, generator=generator)
    torch.save({f"module.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "angles.pt")
    import_weights(tmp_path / "angles.pt", teacher_folder, tmp_path / "out")
    assert Student.read(tmp_path / "out").alpha_T_squared == 0.0047
    merged = StudentPipeline.from_pretrained(teacher_folder, tmp_path / "out").pipeline.unet.state_dict()
    for key, weight in unet.state_dict().items():
        name = key.removesuffix(".weight")
        if name in ranks and key.endswith(".weight"):
            weight = rotated_weight(weight, [Factors(tensors[f"{name}.theta_a"], tensors[f"{name}.theta_b"])])
        torch.testing.assert_close(merged[key], weight, rtol=0, atol=1e-6)
