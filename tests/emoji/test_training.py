"""Two steps of each training, and the arithmetic that must hold at any size."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from tests.emoji.cases import synthetic_atlas
from wadi.emoji import train_judge, train_teacher, train_vae
from wadi.emoji.captions import sample_captions, stated
from wadi.emoji.glyphs import NAMES
from wadi.emoji.judge import Judge
from wadi.emoji.scenes import sample_scenes
from wadi.emoji.tokenizer import build_tokenizer
from wadi.emoji.unet import UNet
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.metrics import feature_statistics, frechet_distance

TINY = {"max_train_steps": 2, "train_batch_size": 4, "seconds": 1e9, "device": "cpu"}


@pytest.fixture(scope="module")
def vae_folder(atlas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "MEASURED_BATCH", 4)
        patch.setattr(train_vae, "sample_captions", lambda count, seed: sample_captions(12, seed))
        figures = train_vae.train_vae(train_vae.TrainVAEConfig(out=folder, atlas=atlas, **TINY))
    assert 0 < figures["psnr"] < 20
    return folder


def test_vae_decoder_alone(vae_folder, atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "MEASURED_BATCH", 4)
    monkeypatch.setattr(train_vae, "sample_captions", lambda count, seed: sample_captions(12, seed))
    config = train_vae.TrainVAEConfig(tmp_path / "vae", vae_folder, decoder_only=True, atlas=atlas, **TINY)
    train_vae.train_vae(config)
    before, after = (AutoencoderKL.from_pretrained(f).state_dict() for f in (vae_folder, tmp_path / "vae"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_teacher(vae_folder, atlas, tmp_path):
    sizes = {"pictures": 16, "captions": 60, "pair_focus": 0.4}
    config = train_teacher.TrainTeacherConfig(vae_folder, tmp_path / "a", atlas=atlas, **sizes, **TINY)
    figures = train_teacher.train_teacher(config)
    assert figures["steps"] == 2
    # An untrained network predicts about nothing of a noise whose mean square is 1.
    assert 0.5 < figures["loss"] < 3
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "a", use_safetensors=True)
    assert pipeline.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    config = train_teacher.TrainTeacherConfig(
        vae_folder, tmp_path / "b", tmp_path / "a", atlas=atlas, learning_rate=0.0, **sizes, **TINY
    )
    train_teacher.train_teacher(config)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "b", use_safetensors=True)
    for name in ("unet", "text_encoder", "vae"):
        ours, theirs = (getattr(p, name).state_dict() for p in (pipeline, again))
        # Without a learning rate, going on changes nothing but the last bit of the average.
        assert all(torch.allclose(theirs[key], value, rtol=2e-3) for key, value in ours.items())


def test_an_update_that_is_not_finite_changes_nothing(tmp_path):
    config, architecture = train_teacher.TrainTeacherConfig(tmp_path, tmp_path / "out", **TINY), UNet()
    empty = architecture.tokens([""])
    training = train_teacher.TeacherTraining(config, architecture, architecture.new())

    def moved(latents):
        before = [p.detach().clone() for p in (*training.parameters, *training.ema)]
        ids, generator = empty.repeat(4, 1, 1), torch.Generator().manual_seed(0)
        training.step(latents, ids, 0, 1e-3, generator)
        after = (*training.parameters, *training.ema)
        return sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))

    finite = torch.randn(4, 4, 16, 16)
    assert moved(finite) > len(training.parameters)
    # the average goes on towards weights that stay where they are
    parameters = [p.detach().clone() for p in training.parameters]
    moved(finite * torch.inf)
    assert all(torch.equal(a, b) for a, b in zip(training.parameters, parameters, strict=True))
    assert all(p.isfinite().all() for p in training.ema)
    assert moved(finite) > len(training.parameters)


def test_share_of_the_first_weights_in_the_teacher(vae_folder, atlas, tmp_path):

    def unet(name, init=None, init_share=0.0):
        config = train_teacher.TrainTeacherConfig(
            vae_folder, tmp_path / name, init, init_share, atlas=atlas, pictures=8, captions=30, **TINY
        )
        train_teacher.train_teacher(config)
        return UNet2DConditionModel.from_pretrained(tmp_path / name, subfolder="unet").state_dict()

    first = unet("first")
    new, half, kept = (unet(str(share), tmp_path / "first", share) for share in (0.0, 0.5, 1.0))
    assert any(not torch.equal(first[key], new[key]) for key in first)
    for key, value in first.items():
        assert torch.equal(kept[key], value)
        # float16 holds 11 bits
        torch.testing.assert_close(half[key], (value + new[key]) / 2, rtol=2e-3, atol=1e-6)
    with pytest.raises(WadiError, match="--init-share"):
        unet("without", None, 0.5)
    with pytest.raises(WadiError, match="--init-share"):
        unet("much", tmp_path / "first", 1.5)


@pytest.mark.parametrize("recombine", [0.0, 0.7])
def test_one_step_of_the_teacher(recombine):
    torch.manual_seed(0)
    architecture = UNet()
    networks, empty = architecture.new(), architecture.tokens([""])
    before = copy.deepcopy((networks["unet"], networks["text_encoder"]))
    config = train_teacher.TrainTeacherConfig("", "", recombine=recombine, **TINY)
    training = train_teacher.TeacherTraining(config, architecture, networks)
    start = [parameter.detach().clone() for parameter in training.parameters]
    latents = torch.randn(4, 4, 16, 16)
    ids = architecture.tokens(["a cat", "a big dog", "an owl", "a cat and a dog"])
    lowest = torch.tensor([0.9, 0.9, 0.0, 0.0])
    ids, source = ids[:, None], torch.zeros(4, 24, dtype=torch.int64)
    if recombine:
        # each from the captions of the next two as well, in turn
        ids, source = torch.cat([ids, ids.roll(-1, 0), ids.roll(-2, 0)], 1), torch.arange(24).repeat(4, 1) % 3
    training.step(latents, ids, 0, 1e-4, torch.Generator().manual_seed(0), lowest, source)
    assert (training.times >= 1000 * lowest).all()
    assert (training.times < 1000).all()
    assert all(torch.equal(a, b) or (a == empty).all() for a, b in zip(training.ids, ids, strict=True))
    # Stable Diffusion's schedule and the loss ||eps(alpha x + sigma n, t, c) - n||^2, written out.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[training.times][:, None, None, None]
    noisy = (kept.sqrt() * latents + (1 - kept).sqrt() * training.noise).float()
    with torch.no_grad():
        encoded = [before[1](of_each)[0] for of_each in training.ids]
        states = torch.stack(
            [
                torch.stack([s[int(w), i] for i, w in enumerate(which)])
                for s, which in zip(encoded, source, strict=True)
            ]
        )
        prediction = before[0](noisy, training.times, states).sample
    expected = (prediction - training.noise).square().mean()
    torch.testing.assert_close(training.loss, expected, rtol=1e-4, atol=1e-5)
    # The average starts quickly: (1 + 0) / (10 + 0) of the old, the rest of the new.
    for average, old, new in zip(training.ema, start, training.parameters, strict=True):
        torch.testing.assert_close(average, 0.1 * old + 0.9 * new.detach())
    assert any(not torch.equal(old, new) for old, new in zip(start, training.parameters, strict=True))


def test_judge(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "REFERENCE_SAMPLES", 40)
    monkeypatch.setattr(
        train_judge, "sample_captions", lambda count, *which: sample_captions(min(count, 60), *which)
    )
    figures = train_judge.train_judge(train_judge.TrainJudgeConfig(tmp_path, atlas=atlas, **TINY))
    # The unit of the features makes real pictures this far from each other, whatever the judge has learned.
    assert figures["real_frechet_distance"] == pytest.approx(0.19, rel=2e-3)
    judge, reference = (
        Judge.load(tmp_path / "judge.safetensors"),
        load_tensors(tmp_path / "reference.safetensors"),
    )
    images, _ = train_judge.real_images("reference", 40, synthetic_atlas(), seed=1)
    features = judge.read(images).features
    torch.testing.assert_close(reference["features"].float(), features[:16], rtol=2e-3, atol=1e-4)
    assert frechet_distance(reference, feature_statistics(features)) == pytest.approx(0, abs=1e-4)


def certain(scenes):
    """What a judge would put out that knows the scenes."""
    count = len(scenes)
    out = {
        "cells": torch.zeros(count, len(NAMES) + 1, 8, 8),
        "box": torch.zeros(count, 3, 8, 8),
        "present": torch.full((count, len(NAMES)), -60.0),
        "background": 60 * torch.eye(10)[scenes.background],
        "layout": torch.zeros(count, 3),
    }
    out["cells"][:, -1] = 60
    for i in range(count):
        there = [slot for slot in range(2) if scenes.emoji[i, slot] >= 0]
        for slot in there:
            x, y = (8 * scenes.center[i, slot]).tolist()
            emoji, column, row = int(scenes.emoji[i, slot]), int(x), int(y)
            out["cells"][i, :, row, column] = 60 * torch.eye(len(NAMES) + 1)[emoji]
            out["box"][i, :, row, column] = torch.tensor([x - column, y - row, scenes.size[i, slot]])
            out["present"][i, emoji] = 60
            share = torch.cat([scenes.center[i, slot], scenes.size[i, slot, None]]) / len(there)
            out["layout"][i] += share
    return out


def test_the_judge_s_loss_is_zero_for_the_truth_and_only_for_it():
    scenes = sample_scenes(stated(sample_captions(60, "loss")), torch.Generator().manual_seed(0))
    truth = certain(scenes)
    assert train_judge.judge_loss(truth, scenes).item() == pytest.approx(0, abs=1e-4)
    for name, value in truth.items():
        assert train_judge.judge_loss({**truth, name: value.roll(1, 0)}, scenes) > 0.05, name


def test_blemishes_keep_flat_pictures_in_the_mean():
    images = torch.full((64, 3, 16, 16), 0.5)
    blemished = train_judge.blemish(images, torch.Generator().manual_seed(0))
    assert blemished.mean().item() == pytest.approx(0.5, abs=1e-3)
    deviation = blemished.flatten(1).std(1)
    assert deviation.max() < 0.07  # at most 0.06, but for chance
    assert deviation.min() < 0.01 < 0.05 < deviation.max()


def test_standardised_latents_and_the_same_pictures():
    torch.manual_seed(0)
    vae = train_vae.new_vae().eval().requires_grad_(False)
    vae.quant_conv.weight *= 3
    vae.quant_conv.bias += torch.arange(8.0)
    images = 2 * torch.rand(6, 3, 64, 64) - 1
    posterior = vae.encode(images).latent_dist
    pictures = vae.decode(posterior.mode()).sample
    std = posterior.mean.double().std((0, 2, 3), keepdim=True)
    train_vae.standardise_latents(vae, posterior.mean)
    after = vae.encode(images).latent_dist
    latents = after.mean.double()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(after.std.double(), posterior.std.double() / std, rtol=1e-4, atol=0)
    torch.testing.assert_close(vae.decode(after.mode()).sample, pictures, rtol=0, atol=1e-4)
