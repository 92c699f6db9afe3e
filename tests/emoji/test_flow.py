"""The emoji flow: what it is told, what it minimises, and the whole way to an image in one step."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.files import metrics
from tests.tiny import tiny_sd3
from wadi.backbones import load_backbone, student_config
from wadi.commands.distill import start_of
from wadi.distill import distill
from wadi.distill.presets import FITS, PRESETS
from wadi.emoji import prompts_file, teacher_folder, train_teacher
from wadi.emoji.evaluate import EvaluateConfig, evaluated_pipeline, pipeline_generator
from wadi.emoji.flow import Flow, encode_text, new_flow_transformer
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline

CAPTIONS = ["a cat", "a big dog on the left", "", "a cat and a dog"]


def small():
    """Two layers, 64 wide."""
    return Flow(layers=2, heads=2)


def networks(seed=0):
    """Random weights throughout: the last layer of a new transformer is zero."""
    torch.manual_seed(seed)
    found = small().new()
    torch.nn.init.normal_(found["transformer"].proj_out.weight, std=0.1)
    return {name: network.eval() for name, network in found.items()}


@pytest.fixture(scope="module")
def train(atlas, tmp_path_factory):
    """A function that trains two steps of a small flow, and returns the folder and figures."""
    folder = tmp_path_factory.mktemp("flow")

    def run(name, **options):
        sizes = {"max_train_steps": 2, "train_batch_size": 4, "seconds": 1e9, "pictures": 8, "captions": 60}
        config = train_teacher.TrainTeacherConfig(
            teacher_folder() / "vae",
            folder / name,
            atlas=atlas,
            architecture="flow",
            device="cpu",
            **sizes | options,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(train_teacher.ARCHITECTURES, "flow", small)
            return config.out, train_teacher.train_teacher(config)

    return run


@pytest.fixture(scope="module")
def flow_folder(train):
    folder, figures = train("teacher", learning_rate=0.5, pair_focus=0.4)  # warm-up makes 1e-3 of it
    assert figures["steps"] == 2
    assert 1 < figures["loss"] < 4  # the variance of n - x0 is 2
    return folder


@torch.no_grad()
def test_the_stock_pipeline_and_the_backbone_tell_the_same(flow_folder):
    """All 256 tokens of T5, which nothing masks."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(flow_folder, torch_dtype=torch.float32)
    architecture = small()
    parts = {name: getattr(pipeline, name) for name in architecture.networks}
    states, pooled = encode_text(parts, architecture.tokens(CAPTIONS))
    stock, _, stock_pooled, _ = pipeline.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False
    )
    assert states.shape == (4, 24 + 256, 128)
    torch.testing.assert_close(states, stock)
    torch.testing.assert_close(pooled, stock_pooled)
    backbone = load_backbone(flow_folder)
    x, sigma = torch.randn(4, 4, 16, 16), torch.tensor([0.1, 0.5, 0.9, 1.0])
    t = backbone.schedule().timestep(sigma)
    ids = architecture.tokens(CAPTIONS)[:, None]
    ours = architecture.predict(parts, x, t, ids, torch.zeros_like(ids[:, 0]))
    theirs = backbone.predict(backbone.network, x, t, backbone.encode(CAPTIONS))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3"])
@torch.no_grad()
def test_every_encoder_alone_says_what_the_caption_is(part):
    """All weights of the others are zero."""
    architecture, found = small(), networks()
    for name in found.keys() - {part, "transformer"}:
        for parameter in found[name].parameters():
            parameter.zero_()
    ids = architecture.tokens(["a big cat", "a small dog"])[:, None]
    x = torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1)
    first, other = architecture.predict(found, x, torch.full((2,), 500.0), ids, ids[:, 0])
    assert (first - other).abs().max() > 1e-4


def one_step():
    architecture, found = small(), networks()
    before = copy.deepcopy(found)
    config = train_teacher.TrainTeacherConfig(
        "", "", architecture="flow", train_batch_size=4, max_train_steps=2, device="cpu"
    )
    training = train_teacher.TeacherTraining(config, architecture, found)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = architecture.tokens(CAPTIONS)[:, None]
    training.step(latents, ids, 0, 1e-4, torch.Generator().manual_seed(0), 0.3)
    return training, latents, before


def test_one_training_step():
    training, latents, before = one_step()
    sigma = training.times[:, None, None, None]
    noisy = (1 - sigma) * latents + sigma * training.noise
    with torch.no_grad():
        states, pooled = encode_text(before, training.ids[:, 0])
        v = before["transformer"](noisy, states, pooled, 1000 * training.times).sample
    expected = (v - (training.noise - latents)).square().mean()
    torch.testing.assert_close(training.loss, expected, rtol=1e-4, atol=1e-5)
    lowest = 1.6 * 0.3 / (1 + 0.6 * 0.3)
    assert (training.times > lowest).all()
    assert (training.times < 1).all()
    # what the last block makes of the text is dropped
    last = f"transformer_blocks.{len(before['transformer'].transformer_blocks) - 1}.attn."
    unused = {f"{last}add_q_proj.weight", f"{last}add_q_proj.bias", f"{last}norm_added_q.weight"}
    for part in before:
        for name, parameter in training.networks[part].named_parameters():
            if name not in unused and "final_layer_norm.bias" not in name:
                assert parameter.grad is not None, (part, name)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_perfect_v_gives_the_image_in_any_number_of_steps(steps):
    """What training calls v, and the levels that the network is told, are those of the stock scheduler."""
    training, latents, _ = one_step()
    scheduler, noise = small().scheduler(), training.noise
    scheduler.set_timesteps(steps)
    v = training.schedule.target(latents, noise, training.times)
    x = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert t == training.schedule.timestep(sigma)
        time = sigma.repeat(len(x))
        torch.testing.assert_close(x, training.schedule.add_noise(latents, noise, time))
        torch.testing.assert_close(training.schedule.x0(v, x, time), latents)
        x = scheduler.step(v, t, x).prev_sample
    torch.testing.assert_close(x, latents)


def test_half_of_the_levels_have_more_noise_than_half_of_stable_diffusion_s_timesteps():
    """Logit-normal before the shift; 20 000 draws, whose median has a standard deviation of 0.002."""
    flow, count = Flow(), 20_000
    drawn = flow.fractions(count, torch.Generator().manual_seed(0))
    normal = drawn.double().logit()
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[500].sqrt()
    sigma = (1 - alpha**2).sqrt()
    shift = flow.scheduler().config.shift
    assert shift / (1 + shift) == pytest.approx((sigma / (alpha + sigma)).item(), abs=0.01)


def test_the_stock_pipeline_samples_it(flow_folder):
    """Five guided steps of Euler, written out."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(flow_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    prompt, scale = "a big cat on a red background", 2.0
    stock = pipeline(
        prompt, latents=z, output_type="latent", num_inference_steps=5, guidance_scale=scale
    ).images
    architecture, x = small(), z
    parts = {name: getattr(pipeline, name) for name in architecture.networks}
    ids = architecture.tokens(["", prompt])[:, None]
    sigmas = pipeline.scheduler.sigmas
    assert sigmas[0] == 1
    for sigma, after in pairwise(sigmas):
        t = (1000 * sigma).repeat(2)
        with torch.no_grad():
            null, cond = architecture.predict(parts, x.expand(2, -1, -1, -1), t, ids, ids[:, 0])
        x = x + (after - sigma) * (null + scale * (cond - null))
    torch.testing.assert_close(stock, x, rtol=1e-3, atol=1e-3)


def test_init_goes_on_exactly(flow_folder, train):
    folder, _ = train("again", init=flow_folder, learning_rate=0.0)
    first, second = (StableDiffusion3Pipeline.from_pretrained(f) for f in (flow_folder, folder))
    for name in (*Flow.networks, "vae"):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (first, second))
        assert all(torch.allclose(theirs[key], value, rtol=2e-3) for key, value in ours.items()), name


class KilledError(Exception):
    """Stands for a signal."""


def test_a_training_goes_on_from_its_checkpoint(train, tmp_path, monkeypatch):
    options = {"max_train_steps": 4, "checkpointing_seconds": 0.0, "learning_rate": 0.5, "pair_focus": 0.4}
    whole, _ = train("whole", **options)
    show, place = train_teacher.TimedSteps.show, tmp_path / "checkpoints"

    def killed(self, loss):
        if self.done == 2:
            raise KilledError
        show(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(train_teacher.TimedSteps, "show", killed)
        with pytest.raises(KilledError):
            train("resumed", checkpoints=place, **options)
    assert [path.name for path in place.iterdir()] == ["step-000002"]
    with pytest.raises(WadiError, match=r"--checkpoints .*: step-000002 was trained with other options"):
        train("resumed", checkpoints=place, **options | {"learning_rate": 0.4})
    resumed, figures = train("resumed", checkpoints=place, **options)
    assert figures["steps"] == 4
    assert json.loads((resumed / "training.json").read_text())["figures"] == figures
    first, second = (StableDiffusion3Pipeline.from_pretrained(f) for f in (whole, resumed))
    for name in Flow.networks:
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (first, second))
        assert all(torch.equal(theirs[key], value) for key, value in ours.items()), name


def test_from_training_to_an_image_in_one_step(flow_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(text for text in CAPTIONS if text))
    run = distill(
        PRESETS["emoji-flow"].replace(
            pretrained_model_name_or_path=str(flow_folder),
            prompts=str(tmp_path / "prompts.txt"),
            output_dir=str(tmp_path / "run"),
            train_batch_size=2,
            max_train_steps=2,
            validation_seeds=(3,),
        )
    )
    stock = StableDiffusion3Pipeline.from_pretrained(run / "pipeline", torch_dtype=torch.float32)
    image = stock(
        "a cat",
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(3)],
        output_type="np",
    ).images
    assert image.shape == (1, 64, 64, 3)
    ours = StudentPipeline.from_pretrained(flow_folder, run / "adapter")
    expected = ours("a cat", seed=3, output_type="np")
    # two loads of the same weights can lie at other addresses, where matrix products round otherwise
    np.testing.assert_allclose(image, expected, atol=1e-5)
    evaluated = EvaluateConfig(flow_folder, run / "adapter", device="cpu")
    judged = pipeline_generator(evaluated_pipeline(evaluated), 1, 1.0)(["a cat"], [3])
    assert np.abs(judged[0].permute(1, 2, 0).numpy() - 255 * expected[0]).max() < 1
    rows = metrics(run)
    assert rows[-1]["step"] == 2
    assert all(np.isfinite([row["student_loss"], row["fake_loss"]]).all() for row in rows)


def test_the_evaluation_samples_the_teacher_with_its_own_scheduler(flow_folder):
    """Two guided steps, whatever the number of images that are made at once."""
    config = EvaluateConfig(flow_folder, num_inference_steps=2, guidance_scale=2.0, device="cpu")
    pipeline = evaluated_pipeline(config)
    assert pipeline.scheduler.config.shift == Flow().scheduler().config.shift
    generate = pipeline_generator(pipeline, config.num_inference_steps, config.guidance_scale)
    together, alone = generate(["a cat", "a dog"], [3, 4]), generate(["a dog"], [4])
    assert together.shape == (2, 3, 64, 64)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_preset_trains_a_tenth_of_the_transformer():
    preset = PRESETS["emoji-flow"]
    with torch.device("meta"):
        transformer = new_flow_transformer()
    layers = dict(transformer.named_modules())
    count = sum(
        preset.student.rank * (layers[name].out_features + layers[name].in_features // 2)
        for name in student_config(transformer, preset.student.rank).target_modules
    )
    total = sum(parameter.numel() for parameter in transformer.parameters())
    assert (total, count) == (7_770_256, 779_328)
    assert (preset.fake.rank, preset.fake.layers) == (preset.student.rank, "student")
    assert FITS["emoji-flow"].pipeline == train_teacher.Flow.pipeline_class.__name__


@pytest.mark.parametrize(
    ("preset", "built_in"),
    [("emoji", True), ("emoji-cpu", True), ("emoji-dit", False), ("emoji-flow", False)],
)
def test_presets_of_the_emoji_world_name_a_teacher_that_comes_with_wadi(preset, built_in):
    model = start_of(["--preset", preset]).model
    assert model.prompts == str(prompts_file())
    assert model.pretrained_model_name_or_path == (str(teacher_folder()) if built_in else None)


def test_refusals(train, flow_folder, tmp_path):
    with pytest.raises(WadiError, match=r"--recombine 0\.5: only for"):
        train("recombined", recombine=0.5)
    with pytest.raises(WadiError, match=r"--init .*: holds a StableDiffusionPipeline; --architecture flow"):
        train("other", init=teacher_folder())
    tiny_sd3().save_pretrained(tmp_path / "sd3")
    with pytest.raises(WadiError, match=r"--init .*: its transformer has other sizes"):
        train("larger", init=tmp_path / "sd3")
    for name in ("pictures", "captions", "train_batch_size"):
        with pytest.raises(WadiError, match=f"--{name.replace('_', '-')} 0"):
            train("nothing", **{name: 0})
    (tmp_path / "file").touch()
    with pytest.raises(WadiError, match=r"file is a file; name a path below a folder"):
        train("blocked", checkpoints=tmp_path / "file")
    dit = train_teacher.TrainTeacherConfig(tmp_path, tmp_path / "out", init=flow_folder, architecture="dit")
    with pytest.raises(WadiError, match=r"holds a StableDiffusion3Pipeline; --architecture dit"):
        train_teacher.train_teacher(dit)
