"""Students of several steps: their roll-outs, their training, and what they export."""

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import diffusers
import pytest
import torch

from tests.distill.test_resume import FILES, config, metrics
from tests.distill.test_trainer import make
from tests.tiny import tiny_pipeline, tiny_pixart, tiny_sd3
from tests.tiny_flows import tiny_flux
from wadi.diffusion import RectifiedFlow, VariancePreserving
from wadi.distill import DistillConfig, distill
from wadi.distill.draws import Draws
from wadi.distill.student import Student
from wadi.files import load_tensors
from wadi.onestep import StudentPipeline
from wadi.onestep.arguments import own_size
from wadi.onestep.loading import guidance_arguments, stock_arguments

FLOW = {"weighting": "normalized", "fake_weighting": "none"}
KINDS = {
    # name: pipeline, options of its distillation
    "epsilon": (tiny_pipeline, {}),
    "v": (lambda: tiny_pipeline(prediction_type="v_prediction"), {}),
    "pixart": (tiny_pixart, {"alpha_T_squared": 0.0047}),
    "sd3": (tiny_sd3, FLOW),
    "flux": (lambda: tiny_flux(dev=True), FLOW | {"resolution": 32}),
}


@dataclasses.dataclass
class Case:
    name: str
    teacher: object
    run: object


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """A run of 3 updates, whose student takes up to 4 steps."""
    make_pipeline, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline().save_pretrained(folder / "teacher")
    options = config(folder / "teacher", folder, "run", student_steps=4, **options)
    options = options.replace(max_train_steps=3, lr_decay_fraction=0, validation_steps=3)
    options = options.replace(validation_seeds=(0,))
    return Case(request.param, folder / "teacher", distill(options))


def stock(folder):
    """The folder in diffusers' own class of pipeline, without wadi."""
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


def with_one_generator(pipeline, prompt, count, side):
    """The latents of a stock pipeline whose noise between two steps continues the call's generator.

    Most pipelines of flows take that noise from torch's global generator, which gets the state of the other.
    """
    generator, step = torch.Generator().manual_seed(3), pipeline.scheduler.step
    options = stock_arguments(pipeline) | guidance_arguments(pipeline) | side

    def seeded(*args, **kwargs):
        if "generator" in kwargs:
            return step(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            result = step(*args, **kwargs)
            generator.set_state(torch.get_rng_state())
        return result

    pipeline.scheduler.step = seeded
    options |= {"num_inference_steps": count, "generator": generator, "output_type": "latent"}
    latents = pipeline(prompt, **options).images
    pipeline.scheduler.step = step
    return latents


def test_stock_diffusers_makes_the_students_images(case):
    """Bit for bit in float32, with nothing but the number of steps."""
    side = {"height": 32, "width": 32} if case.name == "flux" else {}
    pipeline = stock(case.run / "pipeline")
    sources = [[case.run / "pipeline"], [case.teacher, case.run / "adapter"]]
    students = [StudentPipeline.from_pretrained(*source) for source in sources]
    made = []
    for count in (1, 2, 3, 4):
        expected = with_one_generator(pipeline, "a red cat", count, side)
        options = {"seed": 3, "num_inference_steps": count, "output_type": "latent"}
        assert all(torch.equal(student("a red cat", **options, **side), expected) for student in students)
        made.append(expected)
    assert not any(torch.equal(a, b) for a, b in pairwise(made))


def test_the_run_says_and_shows_its_steps(case):
    record = json.loads((case.run / "pipeline" / "student.json").read_text())
    steps = record["steps"]
    assert len(steps) == 4
    assert steps[0] == 1.0
    assert all(a > b > 0 for a, b in pairwise(steps))
    grids = [diffusers.utils.load_image(str(grid)) for grid in sorted((case.run / "samples").glob("*.png"))]
    prompts = DistillConfig.load(case.run / "config.yaml").run.validation_prompts
    side = 32 if case.name == "flux" else StudentPipeline.from_pretrained(case.run / "pipeline")
    height = side if isinstance(side, int) else own_size(side.pipeline)[0]
    assert [grid.height > 3 * height * len(prompts) for grid in grids] == [True]


@pytest.mark.parametrize("case", ["epsilon", "sd3"], indirect=True)
def test_a_resumed_run_has_the_same_bits(case, tmp_path):
    options = DistillConfig.load(case.run / "config.yaml")
    half = distill(options.replace(output_dir=str(tmp_path / "half"), max_train_steps=1))
    distill(DistillConfig.of(resume_from_checkpoint=str(half), max_train_steps=3))
    assert metrics(half) == metrics(case.run)
    for name in FILES:
        file = f"checkpoints/step-000003/{name}.safetensors"
        first, second = load_tensors(case.run / file), load_tensors(half / file)
        assert all(torch.equal(first[key], second[key]) for key in first)


# --- the roll-out ---

ALPHAS = torch.linspace(0.99, 0.005, 8)
SCHEDULES = {
    "epsilon": (VariancePreserving(ALPHAS, "epsilon"), [[7], [7, 3], [7, 5, 3], [7, 5, 3, 1]]),
    "v_prediction": (VariancePreserving(ALPHAS, "v_prediction"), [[7], [7, 3], [7, 5, 3], [7, 5, 3, 1]]),
    "flow_prediction": (RectifiedFlow(3.0), [[1.0], [1.0, 0.5], [1.0, 0.8, 0.5], [1.0, 0.8, 0.6, 0.5]]),
}


def of_a_point(schedule, x0):
    """What a perfect network predicts where all images are x0."""

    def predict(network, x_t, t, condition):
        alpha, sigma = schedule.levels(t)
        return schedule.target(x0.expand_as(x_t), (x_t - alpha * x0) / sigma, t)

    return predict


def student_of(prediction, predict, network=None):
    schedule, times = SCHEDULES[prediction]
    return Student(schedule, predict, network, [torch.tensor(own) for own in times])


def draws(step, process=0, processes=1):
    return Draws(0, step, torch.device("cpu"), process, processes)


def test_every_step_of_every_number_of_steps_is_drawn_alike():
    """The ten roll-outs of four steps; a roll-out is the same in all processes, and its noise is not."""
    student, counted = student_of("epsilon", None), Counter()
    for step in range(1000):
        times = student.draw(draws(step), 2, (1, 2, 2))["t"]
        assert torch.equal(times[0], times[1])
        counted[tuple(times[0].tolist())] += 1
    expected = Counter(tuple(own[: k + 1]) for own in SCHEDULES["epsilon"][1] for k in range(len(own)))
    assert counted.keys() == expected.keys()
    assert all(abs(counted[key] / 100 - number) < 0.45 for key, number in expected.items())
    for step in range(20):
        whole = student.draw(draws(step), 4, (1, 2, 2))
        parts = [student.draw(draws(step, process, 2), 2, (1, 2, 2)) for process in (0, 1)]
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_inputs_of_every_step_have_the_law_of_the_process(prediction):
    """With a perfect network, step k sees alpha x0 + sigma n, and the end is x0."""
    schedule, times = SCHEDULES[prediction]
    x0, seen = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1), []
    perfect = of_a_point(schedule, x0)

    def predict(network, x_t, t, condition):
        seen.append((x_t, t))
        return perfect(network, x_t, t, condition)

    n, student = 4000, student_of(prediction, predict)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 3, 2, 1, 1, generator=generator)
    z = torch.randn(n, 2, 1, 1, generator=generator)
    made = student.sample(z, {}, student.rollout(4, noise))
    assert torch.allclose(made, x0.expand_as(made), atol=1e-3)
    assert [t[0].item() for _, t in seen] == pytest.approx(times[3])
    for (x_t, t), own in zip(seen[1:], noise.unbind(1), strict=True):
        alpha, sigma = (level[:1] for level in schedule.levels(t))
        assert torch.allclose(x_t, alpha * x0 + sigma * own, atol=1e-3)
        assert torch.allclose(x_t.mean(0), (alpha * x0)[0], atol=0.1)
        assert torch.allclose(x_t.std(0), sigma[0].expand(2, 1, 1), rtol=0.1)


def test_only_the_last_step_has_a_gradient():
    """x0 = x_t - t w, with one weight: the derivative is -t of the last step, and no product of steps."""
    weight = torch.nn.Parameter(torch.tensor(0.3))
    student = student_of("flow_prediction", lambda network, x_t, t, condition: weight * torch.ones_like(x_t))
    z, noise = torch.zeros(1, 1, 1, 1), torch.zeros(1, 3, 1, 1, 1)
    for count in (1, 2, 3, 4):
        student.sample(z, {}, student.rollout(count, noise[:, : count - 1])).sum().backward()
        assert weight.grad.item() == pytest.approx(-SCHEDULES["flow_prediction"][1][count - 1][-1])
        weight.grad = None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_trainer_rolls_its_own_student_out(prediction_type):
    """The images of an update are those of the student in as many steps, from the same noise."""
    trainer = make(prediction_type, student_steps=4)
    for step in range(12):
        inputs = trainer.draw(step)
        assert inputs.steps == inputs.rollout["t"].shape[1]
        with torch.no_grad():
            expected = trainer.generate(inputs.z, inputs.condition, inputs.rollout)
        x0, _ = trainer.update_student(inputs)
        assert torch.equal(x0, expected)


def test_one_step_is_drawn_and_made_as_without_the_option():
    """No number of a student of one step moves, and no roll-out is drawn."""
    one, four = make(), make(student_steps=4)
    for step in range(3):
        first, second = one.draw(step), four.draw(step)
        assert first.rollout == {}
        assert first.steps == 1
        pairs = [(d.z, *d.condition.values(), *d.place.values()) for d in (first, second)]
        for tensor, other in zip(*pairs, strict=True):
            assert torch.equal(tensor, other)


@pytest.mark.gpu
def test_a_graph_for_each_number_of_steps():
    changes = {"student_steps": 4, "null_prompt_probability": 0.0, "fake_guidance_scale": 1.0}
    eager, graphed = make(**changes), make(cuda_graphs=True, **changes)
    for step in range(12):
        expected = {name: value.clone() for name, value in eager.step(step).items()}
        found = graphed.step(step)
        graphed.synchronize()
        for name, value in expected.items():
            assert torch.isclose(found[name], value, rtol=2e-2, atol=1e-5), (step, name)
    assert sorted(graphed.graphs) == [1, 2, 3, 4]
