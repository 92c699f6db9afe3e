"""The training of the emoji teacher's ControlNet: its data, its loss, and what it leaves alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.emoji.cases import synthetic_atlas
from wadi.emoji import teacher_folder as emoji_teacher
from wadi.emoji import train_controlnet as room
from wadi.emoji.captions import RELATIONS, is_held_out, parse_caption, stated
from wadi.emoji.scenes import render, sample_scenes
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.onestep.loading import load_pipeline
from wadi.tasks import load_controlnet
from wadi.tasks.control import canny

TINY = {"max_train_steps": 2, "train_batch_size": 2, "seconds": 1e9, "pictures": 4, "captions": 30}


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline(emoji_teacher())
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    return pipeline


def config(tmp_path, **options):
    return room.TrainControlNetConfig(tmp_path / "controlnet", device="cpu", **{**TINY, **options})


def scenes_and_pictures(count=12):
    captions = room.open_captions(count, "test")
    scenes = sample_scenes(stated(captions), torch.Generator().manual_seed(0))
    return scenes, render(scenes, synthetic_atlas())


def test_captions_leave_to_the_condition_what_it_says():
    for split in ("train", "held-out"):
        captions = room.open_captions(300, "test", split)
        assert all(is_held_out(caption) == (split == "held-out") for caption in captions)
        for caption in captions:
            assert caption.size is None
            assert caption.place is None
            pair = len(caption.emoji) == 2
            assert caption.relation == (RELATIONS.index("and") if pair else None)
            assert parse_caption(caption.text) == caption


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 64]))
def test_bits(seed, size):
    maps = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    packed = room.pack_bits(maps)
    assert packed.shape == (3, size * size // 8)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(maps.numpy().reshape(3, -1), axis=1))
    assert torch.equal(room.unpack_bits(packed, size), maps)


def test_conditions_of_scenes():
    scenes, images = scenes_and_pictures()
    edges = room.conditions("canny", scenes, images)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for edge, picture in zip(edges, pixels, strict=True):
        np.testing.assert_array_equal(edge.numpy(), canny(picture) == 255)
    boxes = room.conditions("layout", scenes, images)
    # Where the box of an object is inside the picture, its pixels are as many as its area says.
    area = 0
    for slot in range(2):
        area = area + torch.where(scenes.emoji[:, slot] >= 0, scenes.size[:, slot] ** 2, 0)
    single = scenes.emoji[:, 1] < 0
    torch.testing.assert_close(boxes[single].double().mean((1, 2)).float(), area[single], rtol=0.12, atol=0)


def test_a_new_controlnet_does_nothing(pipeline):
    controlnet = room.new_controlnet(pipeline)
    assert controlnet.config.conditioning_embedding_out_channels == (16, 32, 96)
    own, unet = controlnet.state_dict(), pipeline.unet.state_dict()
    shared = own.keys() & unet.keys()
    assert {name.split(".")[0] for name in shared} == {
        "conv_in",
        "time_embedding",
        "down_blocks",
        "mid_block",
    }
    assert all(torch.equal(own[name], unet[name]) for name in shared)
    latents, states = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 128)
    with torch.no_grad():
        down, middle = controlnet(latents, 500, states, torch.rand(2, 3, 64, 64), return_dict=False)
    residuals = [*down, middle]
    assert [residual.shape[2] for residual in residuals] == [16, 16, 8, 8, 4, 4, 4]
    assert not any(residual.any() for residual in residuals)


@pytest.mark.parametrize("loss", ["epsilon", "balanced"])
def test_one_step(loss, pipeline, tmp_path):
    torch.manual_seed(0)
    controlnet = room.new_controlnet(pipeline)
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=0.1)
    training = room.ControlNetTraining(config(tmp_path, loss=loss), pipeline, controlnet)
    start = [parameter.detach().clone() for parameter in training.update.parameters]
    teacher = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    maps = torch.rand(2, 64, 64) < 0.2
    ids = room.tokenize(pipeline.tokenizer, ["a cat", "a big dog"])
    latents, packed = torch.randn(2, 4, 16, 16), room.pack_bits(maps)
    with torch.no_grad():
        before = room.new_controlnet(pipeline)
        before.load_state_dict(controlnet.state_dict())
    training.packed.copy_(packed)
    training.step(latents, ids[:, None], 0, 1e-3, torch.Generator().manual_seed(0))
    # Stable Diffusion's schedule and || eps(alpha x + sigma n, t, c, condition) - n ||^2, written out.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[training.times][:, None, None, None]
    noisy = (kept.sqrt() * latents + (1 - kept).sqrt() * training.noise).float()
    pixels = maps[:, None].float().repeat(1, 3, 1, 1)
    with torch.no_grad():
        states = pipeline.text_encoder(training.ids[:, 0])[0]
        residuals = before(noisy, training.times, states, pixels)
        prediction = pipeline.unet(
            noisy,
            training.times,
            states,
            down_block_additional_residuals=residuals.down_block_res_samples,
            mid_block_additional_residual=residuals.mid_block_res_sample,
        ).sample
    weight = ((1 - kept) / kept).sqrt() if loss == "balanced" else 1
    expected = (weight * (prediction - training.noise).square()).mean().float()
    torch.testing.assert_close(training.loss, expected, rtol=1e-4, atol=1e-6)
    for average, old, new in zip(training.update.ema, start, training.update.parameters, strict=True):
        torch.testing.assert_close(average, 0.1 * old + 0.9 * new.detach())
    assert any(not torch.equal(a, b) for a, b in zip(start, training.update.parameters, strict=True))
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("condition", ["canny", "layout"])
def test_what_is_written_fits_the_teacher(condition, pipeline, atlas, tmp_path):
    options = config(tmp_path, condition=condition, atlas=atlas)
    figures = room.train_controlnet(options)
    assert figures["steps"] == 2
    assert 0 < figures["loss"] < 1
    controlnet = load_controlnet(options.out, pipeline)
    assert controlnet.controlnet_mid_block.weight.any()
    tensors = load_tensors(options.out / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "_name_or_path" not in (options.out / "config.json").read_text()


def test_bad_options(teacher_folder, atlas, tmp_path):
    with pytest.raises(WadiError, match=r"--teacher .* predicts epsilon at 16 px"):
        room.train_controlnet(config(tmp_path, teacher=teacher_folder))
    with pytest.raises(WadiError, match="--pictures 0"):
        room.train_controlnet(config(tmp_path, pictures=0))
    assert not (tmp_path / "controlnet").exists()
