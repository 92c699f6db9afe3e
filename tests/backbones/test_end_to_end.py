"""Every kind of backbone through every command: train, resume, export, stock diffusers, images."""

import dataclasses
import filecmp
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones.cases import CASES, SIDE
from tests.distill.test_resume import FILES, config
from tests.tiny import tiny_pixart, tiny_sd3, tiny_sdxl
from wadi import cli
from wadi.distill import DistillConfig, distill
from wadi.distill.report import report
from wadi.errors import WadiError, WadiWarning
from wadi.files import load_tensors
from wadi.onestep import Student, StudentPipeline, load_pipeline
from wadi.onestep.loading import guidance_arguments, stock_arguments
from wadi.onestep.pipeline import load_for_steps

TINY = {
    # name: the pipeline, options of its distillation, and what its student.json then says
    "sdxl": (tiny_sdxl, {}, ("epsilon", None)),
    "pixart": (tiny_pixart, {"alpha_T_squared": 0.0047}, ("epsilon", 0.0047)),
    "sd3": (tiny_sd3, {"weighting": "normalized", "fake_weighting": "none"}, ("flow_prediction", None)),
}


@dataclasses.dataclass
class Case:
    """A tiny teacher of one kind, and a run of 4 updates: guided, which needs the condition of no prompt."""

    name: str
    teacher: object
    run: object


@pytest.fixture(scope="module", params=TINY)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make, options, _ = TINY[request.param]
    make().save_pretrained(folder / "teacher")
    options = config(folder / "teacher", folder, "run", fake_layers="student", guidance_scale=2.0, **options)
    options = options.replace(
        max_train_steps=4, lr_decay_fraction=0, validation_steps=4, validation_seeds=(0, 1)
    )
    return Case(request.param, folder / "teacher", distill(options))


def stock(folder):
    """The folder in diffusers' own class of pipeline, without wadi."""
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


def in_one_step(pipeline, **options):
    """What the stock pipeline makes with seed 3; the arguments are those of the README."""
    options = {"output_type": "np", **stock_arguments(pipeline), **options}
    generator = [torch.Generator().manual_seed(3)]
    return pipeline(
        "a red cat", num_inference_steps=1, guidance_scale=1.0, generator=generator, **options
    ).images


def test_the_run_says_what_its_student_is(case):
    found = [Student.read(case.run / part) for part in ("adapter", "pipeline")]
    assert found[0] == found[1]
    assert (found[0].prediction, found[0].alpha_T_squared) == TINY[case.name][2]
    assert load_pipeline(case.teacher).scheduler.config.get("original_inference_steps") != 1
    grid = Image.open(case.run / "samples" / "step-000004.png")
    assert len(grid.getcolors(2**24)) > 10


def test_a_resumed_run_has_the_same_bits(case, tmp_path):
    half = DistillConfig.load(case.run / "config.yaml")
    half = distill(half.replace(output_dir=str(tmp_path / "half"), max_train_steps=2))
    distill(DistillConfig.of(resume_from_checkpoint=str(half), max_train_steps=4))
    for name in FILES:
        file = f"checkpoints/step-000004/{name}.safetensors"
        first, second = load_tensors(case.run / file), load_tensors(half / file)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(bool(tensor.any()) for key, tensor in first.items() if "lorad_A" in key)


def test_trains_in_bfloat16_with_checkpointing(case, tmp_path):
    options = DistillConfig.load(case.run / "config.yaml")
    changes = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    options = options.replace(max_train_steps=1, validation_steps=0, **changes)
    made = distill(options.replace(output_dir=str(tmp_path / "run")))
    weights = load_tensors(made / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lorad_A" in name)


def test_student_is_the_stock_pipelines_bit_for_bit(case, tmp_path):
    """From the run's pipeline, from teacher and adapter, exported again, and by the command."""
    pipeline = stock(case.run / "pipeline")
    expected = in_one_step(pipeline)
    student = StudentPipeline.from_pretrained(case.teacher, case.run / "adapter")
    assert np.array_equal(student("a red cat", seed=3, output_type="np"), expected)
    height, width = expected.shape[1:3]
    wide = {"height": height, "width": 2 * width}
    assert np.array_equal(
        student("a red cat", seed=3, output_type="np", **wide), in_one_step(pipeline, **wide)
    )
    command = ["export", case.run / "adapter", "--model", case.teacher, "--out", tmp_path / "out"]
    assert cli.main([*map(str, command)]) == 0
    files = [
        path.relative_to(case.run / "pipeline")
        for path in (case.run / "pipeline").rglob("*")
        if path.is_file() and path.name != ".wadi.json"
    ]
    assert filecmp.cmpfiles(case.run / "pipeline", tmp_path / "out", files, shallow=False)[1:] == ([], [])
    command = ["generate", "a red cat", "--model", case.run / "pipeline", "--seed", 3]
    assert cli.main([*map(str, command), "--out", str(tmp_path / "image.png")]) == 0
    image = np.asarray(Image.open(tmp_path / "image.png"))
    assert np.array_equal(image, (expected[0] * 255).round().astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_x0_once(case, dtype):
    """Latents are those of the formula in float32 from what the network gave, rounded last."""
    student = StudentPipeline.from_pretrained(case.run / "pipeline", torch_dtype=dtype)
    given, step = [], student.pipeline.scheduler.step

    def keep(output, t, sample, *args, **kwargs):
        given.append((output, sample))
        return step(output, t, sample, *args, **kwargs)

    student.pipeline.scheduler.step = keep
    latents = student("a red cat", seed=3, output_type="latent")
    scheduler = load_pipeline(case.run / "pipeline").scheduler
    scheduler.set_timesteps(1)
    ((output, z),) = given
    x0 = scheduler.step(output.float(), scheduler.timesteps[0], z.float()).prev_sample
    assert torch.equal(latents, x0.to(dtype))


def test_the_report_is_written(case):
    """The teacher makes its images by DDIM, or by its own scheduler if it is a flow; the script is stock."""
    html = report(case.run, steps=2).read_text()
    flow = TINY[case.name][2][0] == "flow_prediction"
    sampler = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
    assert f"steps are of {sampler} with guidance" in html
    assert "num_inference_steps=1, guidance_scale=1.0" in html


def test_a_student_is_no_teacher_and_takes_one_step(case, tmp_path, capsys):
    """The run's folder, its pipeline, and a folder that it was exported to."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    for model in (case.run, case.run / "pipeline"):
        command = [
            "distill",
            "--teacher",
            model,
            "--prompts",
            tmp_path / "prompts.txt",
            "--out",
            tmp_path / "x",
        ]
        assert cli.main([*map(str, command)]) == 2
        assert "is a student already; name the multi-step model" in capsys.readouterr().err
        with pytest.raises(WadiError, match="a one-step student takes 1 step, not 4"):
            load_for_steps(model, None, 4)
        with pytest.raises(WadiError, match="is a student already"):
            StudentPipeline.from_pretrained(model, case.run / "adapter")
    with pytest.warns(WadiWarning, match="nothing says that this is a one-step model"):
        StudentPipeline.from_pretrained(case.teacher)


def test_the_fast_path_is_refused_in_one_line(case):
    pipeline = StudentPipeline.from_pretrained(case.run / "pipeline")
    with pytest.raises(WadiError, match=r"fast: takes a StableDiffusionPipeline, not a .*; omit it"):
        pipeline.compile()


def test_the_network_is_asked_once(case):
    """Without guidance, one image is one sample of one call."""
    student, asked = StudentPipeline.from_pretrained(case.run / "pipeline"), []
    network = getattr(student.pipeline, "unet", None) or student.pipeline.transformer
    network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    student("a red cat", seed=3)
    assert asked == [1]
    assert guidance_arguments(student.pipeline) == {"guidance_scale": 1.0}


ANY_SIZE = ("flux-dev", "flux-schnell", "klein", "z-image", "qwen-image")


@pytest.mark.parametrize("kind", [*ANY_SIZE, "sana"])
def test_other_flows_train_and_ship_what_stock_diffusers_draws(kind, tmp_path):
    CASES[kind]().save_pretrained(tmp_path / "teacher")
    options = config(tmp_path / "teacher", tmp_path, "run", fake_layers="student", guidance_scale=3.5)
    side = {"resolution": SIDE} if kind in ANY_SIZE else {}
    run = distill(options.replace(max_train_steps=2, validation_steps=2, validation_seeds=(0,), **side))
    assert Student.read(run / "pipeline").resolution == side.get("resolution")
    ours = StudentPipeline.from_pretrained(tmp_path / "teacher", run / "adapter")("a red cat", seed=3)[0]
    pipeline = stock(run / "pipeline")
    theirs = pipeline(
        prompt="a red cat",
        num_inference_steps=1,
        generator=[torch.Generator().manual_seed(3)],
        height=ours.height,
        width=ours.width,
        **guidance_arguments(pipeline),
        **stock_arguments(pipeline),
    ).images[0]
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.asarray(ours).std() > 5
    assert "Distilled with 2 updates" in report(run, steps=2).read_text()
