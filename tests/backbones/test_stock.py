"""Rectified flows beside their stock pipelines: several steps, guidance, time, prompts, and gradients."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator

from tests.backbones.cases import CASES, PROMPTS, as_shipped, close, make, noise, of, stock
from wadi.backbones import KleinBackbone, QwenImageBackbone, student_config
from wadi.backbones.condition import concatenate, pick, repeat
from wadi.backbones.flux import FluxBackbone, pack, unpack
from wadi.diffusion import RectifiedFlow
from wadi.distill.checks import check_network
from wadi.distill.config import DistillConfig
from wadi.distill.roles import build_roles, enable_gradient_checkpointing, trainable
from wadi.distill.scores import Scores, predictor
from wadi.distill.student import Student, student_steps, student_times
from wadi.distill.trainer import Trainer
from wadi.errors import WadiError
from wadi.onestep.scheduler import gives_sigmas, student_scheduler
from wadi.prompts import encode_prompts
from wadi.prompts.cache import EmbeddingCache

FLOWS = [case for case in CASES if not case.startswith(("sd", "pixart")) or case.startswith("sd3")]
flows = pytest.mark.parametrize("case", FLOWS)
every = pytest.mark.parametrize("case", CASES)


def predicted(backbone, x, t, condition, scale):
    """What the teacher predicts with guidance, as in training; t is sigma."""
    schedule = backbone.schedule()
    guide = None if backbone.takes_guidance else backbone.guided
    config = DistillConfig.of(guidance_scale=scale)

    def predict(network, x, t, *told):
        return backbone.predict(network, x, schedule.timestep(t), *told)

    network, shape = backbone.network, backbone.latent_shape
    scores = Scores(config, schedule, predict, network, network, backbone.null(), shape, guide)
    return scores.teacher(x, t, condition)


def fresh(backbone, shape):
    """Noise as the stock scheduler draws it between two steps, where it has the latents as tokens too."""
    if isinstance(backbone, (FluxBackbone, QwenImageBackbone)):
        return unpack(torch.randn(pack(torch.empty(shape)).shape), *shape[2:])
    if isinstance(backbone, KleinBackbone):
        return torch.randn(shape[0], shape[2] * shape[3], shape[1]).transpose(1, 2).reshape(shape)
    return torch.randn(shape)


@every
@pytest.mark.parametrize("count", [2, 4])
@torch.no_grad()
def test_a_roll_out_is_the_stock_pipeline_with_the_students_scheduler(case, count):
    """What is trained is what is made, with no other argument than the number of steps."""
    backbone, config = make(case), DistillConfig.of(student_steps=4)
    schedule = backbone.schedule()
    own = Student(schedule, predictor(backbone, schedule), backbone.network, student_times(config, backbone))
    z, condition = noise(backbone), backbone.encode(PROMPTS)
    torch.manual_seed(7)
    drawn = [fresh(backbone, z.shape) for _ in range(count - 1)]
    between = torch.stack([z, *drawn], dim=1)[:, 1:]
    expected = own.sample(z, condition, own.rollout(count, between))
    pipeline, steps = backbone.pipeline, student_steps(config, backbone)
    pipeline.scheduler = student_scheduler(pipeline.scheduler, None, steps, gives_sigmas(type(pipeline)))
    torch.manual_seed(7)
    found = stock(backbone, z=z, num_inference_steps=count, output_type="latent")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@flows
@torch.no_grad()
def test_guided_steps_are_the_stock_pipelines(case):
    """By two calls, in the way of each pipeline, or with the guidance told to the network."""
    backbone, sigmas, scale = make(case), [1.0, 0.4], 3.0
    scheduler = as_shipped(backbone)
    z, condition = noise(backbone), backbone.encode(PROMPTS)
    expected = stock(backbone, z=z, scale=scale, sigmas=sigmas, num_inference_steps=2, output_type="latent")
    scheduler.set_timesteps(sigmas=sigmas)
    x = z
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        p = predicted(backbone, x, sigma.expand(2), condition, scale)
        x = scheduler.step(p, timestep, x).prev_sample
    if backbone.takes_guidance:
        close(case, x, expected)
    else:  # two calls of the pipeline are one batch of ours
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@flows
@torch.no_grad()
def test_the_network_is_told_the_time_of_the_pipeline_in_bfloat16(case):
    """Where sigma alone would be rounded otherwise."""
    backbone, told = make(case), []
    pipeline = backbone.pipeline.to(torch.bfloat16)
    backbone = of(pipeline)
    scheduler, schedule = as_shipped(backbone), backbone.schedule()

    def record(module, args, kwargs):
        told.append(kwargs.get("timestep", kwargs.get("t", args[1] if len(args) > 1 else None)))

    backbone.network.register_forward_pre_hook(record, with_kwargs=True)
    z, sigmas = noise(backbone, 1), [1.0, 0.8261, 0.759, 0.61, 0.347, 0.0123]
    options = {"sigmas": sigmas, "num_inference_steps": len(sigmas), "output_type": "latent"}
    stock(backbone, PROMPTS[:1], z=z.bfloat16() if case.startswith("sd") else z, **options)
    expected, told = told, []
    condition = backbone.encode(PROMPTS[:1])
    for sigma in scheduler.sigmas[:-1]:
        backbone.predict(backbone.network, z, schedule.timestep(sigma.expand(1)), condition)
    assert len(told) == len(expected) == len(sigmas)
    for ours, theirs in zip(told, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@every
def test_a_prompt_alone_is_encoded_as_in_a_batch(case):
    backbone = make(case)
    together = backbone.encode([*PROMPTS, backbone.text.no_prompt])
    alone = [backbone.encode([text]) for text in [*PROMPTS, backbone.text.no_prompt]]
    assert together.keys() == backbone.text.dimensions.keys()
    for name, tensor in concatenate(alone).items():
        torch.testing.assert_close(tensor.float(), together[name].float(), rtol=1e-5, atol=1e-5)


@every
@torch.no_grad()
def test_prompts_from_the_disk_are_those_that_the_network_is_told(case, tmp_path):
    """Encoded in two shards of unequal lengths, without padding where there is a mask."""
    make(case).pipeline.save_pretrained(tmp_path / "model")
    backbone = make(case)
    text = type(backbone.text).from_pretrained(tmp_path / "model")
    text.length = backbone.text.length
    cache = EmbeddingCache(text, tmp_path / "cache")
    encoded = encode_prompts(text, PROMPTS, [], cache)
    assert cache.missing(PROMPTS) == []
    schedule, z = backbone.schedule(), noise(backbone)
    t = schedule.timestep(schedule.times(torch.tensor([0.5, 0.5])))
    told = encoded.embeddings.take(torch.tensor([1, 0]))
    found = backbone.predict(backbone.network, z, t, told)
    expected = backbone.predict(backbone.network, z, t, backbone.encode(PROMPTS[::-1]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    told, null = repeat(encoded.null, 2), repeat(backbone.null(), 2)
    found, expected = (backbone.predict(backbone.network, z, t, empty) for empty in (told, null))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every
@torch.no_grad()
def test_a_sample_does_not_depend_on_the_others_in_its_batch(case):
    backbone = make(case)
    schedule, z = backbone.schedule(), noise(backbone)
    t = schedule.timestep(schedule.times(torch.tensor([0.9, 0.4])))
    condition = concatenate([backbone.encode(PROMPTS[1:]), repeat(backbone.null(), 1)])
    both = backbone.predict(backbone.network, z, t, condition)
    for i in range(2):
        one = slice(i, i + 1)
        alone = backbone.predict(backbone.network, z[one], t[one], pick(condition, one))
        torch.testing.assert_close(alone, both[one], rtol=1e-4, atol=1e-5)


@flows
def test_every_turned_layer_gets_a_gradient(case):
    """With checkpointing too, and to the same bits."""
    backbone = make(case)
    condition, x = backbone.encode(PROMPTS), noise(backbone)
    t, found = torch.tensor([1000.0, 600.0]), []
    for checkpointing in (False, True):
        config = student_config(backbone.network, r=2)
        student = build_roles(backbone.network, config, config, seed=0).student
        if checkpointing:
            enable_gradient_checkpointing(student)
        parameters = trainable(student)
        torch.manual_seed(0)
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=0.1)
        backbone.predict(student, x, t, condition).square().sum().backward()
        assert [name for name, p in parameters.items() if p.grad is None or not p.grad.any()] == []
        found.append([p.grad for p in parameters.values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@flows
def test_the_schedule_is_a_flow_whose_shift_changes_no_prediction(case):
    schedule = make(case).schedule()
    assert isinstance(schedule, RectifiedFlow)
    x, p = torch.randn(2, 2, 3, 4, 4)
    t = torch.tensor([1.0, 0.3])
    torch.testing.assert_close(schedule.x0(p, x, t), x - t.view(-1, 1, 1, 1) * p)


@every
def test_a_prompt_of_the_limit_is_not_cut(case):
    """Its last token still counts, and of a longer one the pipeline drops something."""
    backbone = make(case, tokens=None)
    text, letters = backbone.text, "abcdefghijklmnopqrstuvwxyz" * 40
    longest = max(n for n in range(1, 1024) if len(text.tokenizer(letters[:n]).input_ids) <= text.limit)
    assert len(text.tokenizer(letters[:longest]).input_ids) == text.limit

    def differs(length):
        start, last = letters[: length - 1], letters[length - 1]
        pair = text.encode([start + last, start + ("a" if last != "a" else "b")])
        return any(not torch.equal(tensor[0], tensor[1]) for tensor in pair.values())

    assert differs(longest)
    if not case.startswith(("klein", "z-image", "qwen", "sd3")):  # write something behind; T5 takes more
        assert not differs(longest + 1)


@flows
def test_training_moves_student_and_fake_model(case):
    """With guidance, of which the teacher alone is told another scale where it is an input."""
    backbone, told = make(case), {}
    config = DistillConfig.of(guidance_scale=4.0, student_rank=2, fake_rank=2, train_batch_size=1)
    trainer = Trainer(config, backbone, encode_prompts(backbone.text, PROMPTS, []), Accelerator(cpu=True))
    for name in ("teacher", "student", "fake"):
        hook = partial(record_guidance, told.setdefault(name, set()))
        getattr(trainer, name).register_forward_pre_hook(hook, with_kwargs=True)
    student, fake = (
        {name: p.clone() for name, p in parameters.items()}
        for parameters in (trainer.student_parameters, trainer.fake_parameters)
    )
    assert all(bool(value.isfinite()) for value in trainer.step(0).values())
    for before, after in ((student, trainer.student_parameters), (fake, trainer.fake_parameters)):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    usual = {3.5} if backbone.takes_guidance else {None}
    expected = {4.0} if backbone.takes_guidance else {None}
    assert told == {"teacher": expected, "student": usual, "fake": usual}


def record_guidance(seen, module, args, kwargs):
    scale = kwargs.get("guidance")
    seen.update({None} if scale is None else set(scale.tolist()))


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("flux-dev", {"fake_guidance_scale": 2.0}, "--fake-guidance-scale: the network of this FluxPipeline"),
        ("z-image", {"cuda_graphs": True}, "--cuda-graphs: the network of a ZImagePipeline"),
    ],
)
def test_options_that_a_network_has_no_use_for_get_one_line(case, options, message):
    with pytest.raises(WadiError, match=message) as caught:
        check_network(DistillConfig.of(**options), make(case))
    assert "\n" not in str(caught.value)
    check_network(DistillConfig.of(**options), make("sd"))
