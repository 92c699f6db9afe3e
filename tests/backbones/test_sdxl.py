"""Stable Diffusion XL through every command: two encoders, a pooled embedding, sizes, the zeroed prompt."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from tests.distill.test_resume import config
from tests.tiny import tiny_sdxl
from wadi import cli
from wadi.backbones import SDXLBackbone, load_backbone, load_prompt_encoder
from wadi.distill import DistillConfig, distill
from wadi.distill.presets import FITS, PRESETS
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.onestep import OneStepPipeline, Student, load_pipeline
from wadi.prompts import EmbeddingCache, encode_prompts


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "sdxl"
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(sdxl_folder, tmp_path_factory):
    """A run of 4 updates with the preset's kinds of layers, guided, which needs the null condition."""
    folder = tmp_path_factory.mktemp("run")
    options = config(sdxl_folder, folder, "run", fake_layers="student")
    return distill(options.replace(max_train_steps=4, lr_decay_fraction=0, guidance_scale=2.0))


@pytest.mark.parametrize("force_zeros", [True, False])
def test_no_prompt_is_what_the_pipeline_makes_of_it(force_zeros):
    pipeline = tiny_sdxl(force_zeros)
    null = SDXLBackbone(pipeline).null()
    _, states, _, pooled = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(null["encoder_hidden_states"], states)
    assert torch.equal(null["text_embeds"], pooled)
    assert bool(states.any()) is not force_zeros


@pytest.mark.parametrize("cached", [False, True])
def test_training_is_given_the_null_of_the_pipeline(sdxl_folder, tmp_path, cached):
    encoder = load_prompt_encoder(sdxl_folder)
    cache = EmbeddingCache(encoder, tmp_path / "cache") if cached else None
    encoded = encode_prompts(encoder, ["a cat", "a dog"], ["a dog"], cache)
    assert not any(tensor.any() for tensor in encoded.null.values())
    taken, whole = encoded.embeddings.take(torch.tensor([1])), encoder.encode(["a dog"])
    for name, tensor in whole.items():
        torch.testing.assert_close(taken[name], tensor)
        assert torch.equal(encoded.validation[name], taken[name])


def test_the_network_is_told_pooled_embedding_and_trained_size():
    backbone = SDXLBackbone(tiny_sdxl())
    condition, x, t = backbone.encode(["a cat", "a dog"]), torch.randn(2, 4, 8, 8), torch.tensor([7, 999])
    unet, states = backbone.network, condition["encoder_hidden_states"]
    ids = torch.tensor([[16.0, 16.0, 0, 0, 16.0, 16.0]] * 2)

    def predict(pooled, ids):
        added = {"text_embeds": pooled, "time_ids": ids}
        return unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample

    with torch.no_grad():
        ours = backbone.predict(unet, x, t, condition)
        assert torch.equal(ours, predict(condition["text_embeds"], ids))
        assert not torch.allclose(ours, predict(condition["text_embeds"], 2 * ids))
        assert not torch.allclose(ours, predict(-condition["text_embeds"], ids))


def test_latents_of_a_vae_with_statistics_are_decoded_as_by_the_stock_pipeline():
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    backbone, latents = SDXLBackbone(pipeline), torch.randn(1, 4, 8, 8)
    stock = pipeline("a cat", num_inference_steps=1, latents=latents, output_type="latent").images
    image = pipeline("a cat", num_inference_steps=1, latents=latents).images[0]
    assert np.array_equal(backbone.decode(stock)[0], image)
    torch.testing.assert_close(backbone.scaled(backbone.unscaled(latents)), latents)


def test_a_resumed_run_has_the_same_bits(sdxl_folder, run, tmp_path):
    half = DistillConfig.load(run / "config.yaml")
    half = distill(half.replace(output_dir=str(tmp_path / "half"), max_train_steps=2))
    distill(DistillConfig.of(resume_from_checkpoint=str(half), max_train_steps=4))
    for name in ("student", "fake", "ema"):
        file = f"checkpoints/step-000004/{name}.safetensors"
        first, second = load_tensors(run / file), load_tensors(half / file)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert any(bool(tensor.any()) for key, tensor in first.items() if "lorad_A" in key)


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}], ids=str)
def test_trains_in_bfloat16_and_with_checkpointing(sdxl_folder, tmp_path, changes):
    options = config(sdxl_folder, tmp_path, "run")
    made = distill(options.replace(max_train_steps=2, **changes))
    weights = load_tensors(made / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_student_is_the_stock_pipelines_bit_for_bit(sdxl_folder, run, tmp_path):
    """From the run's pipeline, from teacher and adapter, exported again, and by the command."""
    stock = StableDiffusionXLPipeline.from_pretrained(run / "pipeline")
    assert stock.config.force_zeros_for_empty_prompt
    assert Student.read(run / "adapter") == Student.read(run / "pipeline")

    def made(pipeline, **size):
        generator = [torch.Generator().manual_seed(3)]
        options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np", **size}
        return pipeline("a red cat", generator=generator, **options).images

    expected = made(stock)
    student = OneStepPipeline.from_pretrained(sdxl_folder, run / "adapter")
    assert np.array_equal(student("a red cat", seed=3, output_type="np"), expected)
    wide = {"height": 16, "width": 32}
    assert np.array_equal(student("a red cat", seed=3, output_type="np", **wide), made(stock, **wide))
    command = ["export", run / "adapter", "--model", sdxl_folder, "--out", tmp_path / "out"]
    assert cli.main([*map(str, command)]) == 0
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert np.array_equal(made(again), expected)
    command = ["generate", "a red cat", "--model", run / "pipeline", "--seed", 3]
    assert cli.main([*map(str, command), "--out", str(tmp_path / "image.png")]) == 0
    image = np.asarray(Image.open(tmp_path / "image.png"))
    assert np.array_equal(image, (expected[0] * 255).round().astype(np.uint8))


def test_prompts_are_encoded_ahead(sdxl_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command = ["prompts", "encode", "--teacher", sdxl_folder, "--prompts", tmp_path / "prompts.txt"]
    command += ["--embeddings-dir", tmp_path / "cache", "--device", "cpu", "--mixed-precision", "no"]
    assert cli.main([*map(str, command)]) == 0
    shards = [load_tensors(file) for file in (tmp_path / "cache").glob("*/shard-000000.safetensors")]
    assert sorted(len(tensors["text_embeds"]) for tensors in shards) == [1, 2]
    assert all(tensors["encoder_hidden_states"].shape[1:] == (32, 40) for tensors in shards)


def test_the_fast_path_is_refused_in_one_line():
    with pytest.raises(WadiError, match=r"fast: takes a StableDiffusionPipeline, not a .*XL.*; omit it"):
        OneStepPipeline(tiny_sdxl()).compile()


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


BROKEN = {
    "other sum": ("unet", {"cross_attention_dim": 64}, "width 64 .cross_attention_dim.*give 40"),
    "other pooled": ("text_encoder_2", {"projection_dim": 20}, "width 72 .projection_class.*give 68"),
    "no sizes": ("unet", {"addition_embed_type": None}, "addition_embed_type None, and a StableDiffusionXL"),
    "inpainting": ("unet", {"in_channels": 9}, "takes 9 channels and gives 4"),
    "LCM": ("unet", {"time_cond_proj_dim": 32}, "latent consistency"),
    "other latents": ("vae", {"latent_channels": 16}, "different models"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folders_that_cannot_be_used(tmp_path, kind):
    part, fields, message = BROKEN[kind]
    tiny_sdxl().save_pretrained(tmp_path)
    edit(tmp_path / part / "config.json", **fields)
    for loader in (load_pipeline, load_backbone, load_prompt_encoder):
        with pytest.raises(WadiError, match=message) as error:
            loader(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_pipeline_without_one_of_its_text_parts_is_refused(tmp_path, part):
    """Such as the refiner, which has no first encoder."""
    tiny_sdxl().save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", **{part: [None, None]})
    for loader in (load_pipeline, load_backbone, load_prompt_encoder):
        with pytest.raises(WadiError, match=f"lists no {part}; name a whole pipeline"):
            loader(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("length", [None, 20])
def test_the_shorter_tokenizer_bounds_prompts(tmp_path, part, length):
    tiny_sdxl().save_pretrained(tmp_path)
    file = tmp_path / part / "tokenizer_config.json"
    options = json.loads(file.read_text()) | {"model_max_length": length}
    file.write_text(json.dumps({key: value for key, value in options.items() if value is not None}))
    encoder = load_prompt_encoder(tmp_path)
    assert encoder.limit == (length or 32)


def test_the_preset_fits_its_teacher():
    preset, fit = PRESETS["sdxl"], FITS["sdxl"]
    assert (fit.pipeline, fit.prediction, fit.resolution) == ("StableDiffusionXLPipeline", "epsilon", 1024)
    assert (preset.student.rank, preset.fake.rank, preset.fake.layers) == (64, 64, "student")
