"""`distill` from folders to folders: what it leaves behind, and one clear line for every mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import PROMPTS, one_level_pipeline, tiny_pixart
from wadi.backbones import Backbone, UNetBackbone, student_config
from wadi.distill import DistillConfig, distill
from wadi.distill.loop import append_metrics
from wadi.distill.run import resolve
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig, save_adapter
from wadi.onestep import Student, StudentPipeline


@pytest.fixture(scope="module")
def teacher_folder(small_teacher_folder):
    return small_teacher_folder


def options_of(teacher_folder, folder):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return DistillConfig.of(
        pretrained_model_name_or_path=str(teacher_folder),
        prompts=str(folder / "prompts.txt"),
        output_dir=str(folder / "run"),
        train_batch_size=1,
        student_rank=2,
        fake_rank=2,
        student_learning_rate=3e-2,
        max_train_steps=2,
        logging_steps=1,
        validation_seeds=(3,),
    )


@pytest.fixture
def options(teacher_folder, tmp_path):
    return options_of(teacher_folder, tmp_path)


@pytest.fixture(scope="module")
def first(teacher_folder, tmp_path_factory):
    """A finished run; read only."""
    return distill(options_of(teacher_folder, tmp_path_factory.mktemp("first")))


@pytest.fixture
def finished(first, tmp_path):
    """A copy of it, with which a test may do what it likes."""
    return Path(shutil.copytree(first, tmp_path / "run"))


def refuses(options, message, tmp_path):
    """The run stops with one line and leaves no run folder."""
    with pytest.raises(WadiError, match=message) as error:
        distill(options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_run_folder_describes_itself_and_loads_in_stock_diffusers(options):
    run = distill(options.replace(report_to="tensorboard", alpha_T_squared=0.0047))
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "adapter",
        "pipeline",
    }
    saved = DistillConfig.load(run / "config.yaml")
    assert saved.run.validation_prompts == tuple(PROMPTS[:4])
    assert (saved.student.rank, saved.student.alpha_T_squared) == (2, 0.0047)
    assert list(run.rglob("events.out.tfevents.*"))
    assert not list(run.rglob("*.bin")) + list(run.rglob("*.pt"))
    assert Student.read(run / "adapter").alpha_T_squared == 0.0047

    stock = StableDiffusionPipeline.from_pretrained(run / "pipeline", safety_checker=None)
    ours = StudentPipeline.from_pretrained(options.model.pretrained_model_name_or_path, run / "adapter")
    arguments = {"generator": torch.Generator().manual_seed(3), "output_type": "np"}
    pictures = stock(PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, **arguments).images
    assert (pictures == ours(PROMPTS[0], seed=3, output_type="np")).all()
    teacher = StudentPipeline.from_pretrained(options.model.pretrained_model_name_or_path)
    assert not (pictures == teacher(PROMPTS[0], seed=3, output_type="np")).all()


def test_sample_grid_is_what_generate_draws(options, v_teacher_folder, monkeypatch):
    """The images of the grid, which the average draws, are those of the pipeline; the teacher predicts v."""
    drawn = []
    monkeypatch.setattr(
        "wadi.distill.loop.labelled_grid",
        lambda rows, headings: drawn.append(rows) or Image.new("RGB", (1, 1)),
    )
    run = distill(options.replace(pretrained_model_name_or_path=str(v_teacher_folder)))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    pipeline = StudentPipeline.from_pretrained(run / "pipeline")
    for prompt, pictures in drawn[-1]:
        ours, theirs = (np.asarray(picture, int) for picture in (pictures[0], pipeline(prompt, seed=3)[0]))
        assert abs(ours - theirs).max() <= 1  # rounding of the merged weights


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_subfolder_is_named(options, tmp_path, part):
    folder = tmp_path / "teacher"
    shutil.copytree(options.model.pretrained_model_name_or_path, folder)
    shutil.rmtree(folder / part)
    refuses(options.replace(pretrained_model_name_or_path=str(folder)), f"teacher.*{part}", tmp_path)


def test_pickled_weights_are_not_read(options, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(options.model.pretrained_model_name_or_path, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refuses(options.replace(pretrained_model_name_or_path=str(folder)), "teacher", tmp_path)


def test_other_pipelines_are_refused(options, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(options.model.pretrained_model_name_or_path, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionInstructPix2PixPipeline"})
    )
    with pytest.raises(WadiError, match="InstructPix2Pix"):
        UNetBackbone.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": "/nowhere/sd"}, "/nowhere/sd"),
        ({"pretrained_model_name_or_path": None}, "--teacher: is required"),
        ({"prompts": None}, "--prompts: is required"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"mixed_precision": "fp16"}, "--mixed-precision"),
        ({"cuda_graphs": True}, "--cuda-graphs"),
        ({"validation_prompts": ("x" * 99,)}, "--validation-prompts.*tokens"),
    ],
)
def test_mistakes_give_one_line_and_no_run_folder(options, tmp_path, changes, message):
    if torch.cuda.is_available() and changes.keys() & {"mixed_precision", "cuda_graphs"}:
        pytest.skip("no mistake where there is a GPU")
    refuses(options.replace(**changes), message, tmp_path)


def test_long_prompts_stop_or_are_cut(options, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n" + "x" * 99)
    refuses(options, r"prompts\.txt: 1 of 2 .* line 2 \(101 tokens\)", tmp_path)
    assert distill(options.replace(truncate_prompts=True)).is_dir()


def test_used_run_folder_is_refused(options, tmp_path):
    (tmp_path / "run").mkdir()
    resolve(options)  # empty is fine
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(WadiError, match=r"run: is not empty.*--resume-from-checkpoint"):
        distill(options)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_finished_run_goes_on_and_writes_its_student_again(finished):
    """Also where it was killed before all of the student was written."""
    run = finished
    for steps, gone in ((3, ()), (4, ("pipeline",)), (5, ("adapter", "pipeline"))):
        before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in gone:
            shutil.rmtree(run / name)
        distill(DistillConfig.of(resume_from_checkpoint=str(run), max_train_steps=steps))
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() != before
        assert (run / "pipeline" / "model_index.json").is_file()
        assert not [path for path in run.iterdir() if path.name.endswith((".tmp", ".old"))]


def test_a_file_of_the_user_in_the_student_s_folder_stops_a_resumed_run_at_once(finished):
    run = finished
    (run / "pipeline" / "notes.txt").write_text("mine")
    with pytest.raises(WadiError, match=r"pipeline: holds notes\.txt, which wadi distill did not write"):
        resolve(DistillConfig.of(resume_from_checkpoint=str(run), max_train_steps=9))
    assert (run / "pipeline" / "notes.txt").read_text() == "mine"


def test_resume_takes_the_runs_options_and_longer_training(finished, tmp_path):
    run = finished
    config, checkpoint = resolve(DistillConfig.of(resume_from_checkpoint=str(run), max_train_steps=5))
    assert (config.run.max_train_steps, config.student.rank, config.run.output_dir) == (5, 2, str(run))
    assert checkpoint == run / "checkpoints/step-000002"
    with pytest.raises(WadiError, match="--student-rank: the run was started with 2"):
        resolve(DistillConfig.of(resume_from_checkpoint=str(run), student_rank=8))
    usual = DistillConfig()  # what is given counts, also if it is the default
    with pytest.raises(WadiError, match="--student-rank: the run was started with 2"):
        resolve(DistillConfig.of(resume_from_checkpoint=str(run), student_rank=usual.student.rank))
    steps = usual.run.max_train_steps
    config, _ = resolve(DistillConfig.of(resume_from_checkpoint=str(run), max_train_steps=steps))
    assert config.run.max_train_steps == steps
    with pytest.raises(WadiError, match="not a run folder"):
        resolve(DistillConfig.of(resume_from_checkpoint=str(tmp_path)))
    shutil.rmtree(run / "checkpoints")
    assert (
        resolve(DistillConfig.of(resume_from_checkpoint=str(run)))[1] is None
    )  # starts over, from (seed, step)


def test_checkpoints_of_another_format_are_refused_before_their_options(finished):
    run = finished
    state = run / "checkpoints/step-000002/state.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "format"}))
    with (run / "config.yaml").open("a") as file:
        file.write("an_option_of_before: 0.1\n")
    with pytest.raises(WadiError, match="step-000002: was written by another version of wadi") as error:
        resolve(DistillConfig.of(resume_from_checkpoint=str(run)))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_full_disk_while_logging_gives_one_line():
    with pytest.raises(WadiError, match=r"/dev/full: could not append.*No space left on device"):
        append_metrics(Path("/dev/full"), {"step": 1})


def test_student_goes_on_from_an_adapter(options, first, tmp_path):
    """With next to no learning rate the student stays the adapter that it started from."""
    onward = options.replace(
        output_dir=str(tmp_path / "onward"),
        student_adapter=str(first / "adapter"),
        student_learning_rate=1e-12,
    )
    second = distill(onward)
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert any(tensor.abs().max() > 1e-3 for name, tensor in before.items() if "lorad_A" in name)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)


def test_student_goes_on_with_another_rank(options, first, tmp_path):
    """At a higher rank it generates the image that it generated before."""
    changes = {"student_rank": 5, "student_learning_rate": 1e-12}
    onward = {"output_dir": str(tmp_path / "onward"), "student_adapter": str(first / "adapter")}
    second = distill(options.replace(**changes, **onward))
    tensors = load_file(second / "adapter" / "adapter_model.safetensors")
    assert {len(B) for name, B in tensors.items() if name.endswith("lorad_B")} == {5}
    sources = ((options.model.pretrained_model_name_or_path, second / "adapter"), (second / "pipeline",))
    own, merged, before = (
        StudentPipeline.from_pretrained(*source)("a red cat", seed=3, output_type="np")
        for source in (*sources, (first / "pipeline",))
    )
    np.testing.assert_allclose(own, merged, atol=1e-4)
    np.testing.assert_allclose(own, before, atol=1e-3)


def test_adapters_that_the_student_cannot_start_from(options, first, tmp_path):
    adapter = shutil.copytree(first / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lorad_A"))
    save_file(tensors | {name: tensors[name][:-1]}, adapter / "adapter_model.safetensors")
    other = options.replace(student_adapter=str(adapter))
    refuses(other, "--student-adapter: .*does not fit the adapter: .* has shape", tmp_path)
    missing = options.replace(student_adapter=str(tmp_path / "none"))
    refuses(missing, "none: no such folder", tmp_path)


def test_adapters_of_other_layers_are_refused(options, tmp_path):
    """Of another architecture, and of layers that the student does not turn."""
    unet, transformer = one_level_pipeline().unet, tiny_pixart().transformer
    for name, model, config, message in (
        ("transformer", transformer, student_config(transformer, 2), r"tensors are missing, such as down_"),
        (
            "convolutions",
            unet,
            LoRaDConfig(r=2, target_modules=[*student_config(unet, 2).target_modules, "conv_in"]),
            r"tensors have no layer, such as conv_in\.",
        ),
    ):
        save_adapter(inject_adapter_in_model(config, model), tmp_path / name)
        other = options.replace(student_adapter=str(tmp_path / name))
        refuses(other, f"--student-adapter: .*{name}.*does not fit the adapter: .*{message}", tmp_path)


def test_prompts_are_encoded_before_the_base_comes_to_the_device(options, tmp_path, monkeypatch):
    """A text encoder may be as large as the base, and a small GPU does not hold both."""
    place, found, cache = Backbone.place, [], tmp_path / "embeddings"

    def count(backbone, *arguments):
        found.append(sum(1 for _ in cache.rglob("*.safetensors")))
        return place(backbone, *arguments)

    monkeypatch.setattr(Backbone, "place", count)
    distill(options.replace(embeddings_dir=str(cache), validation_steps=0))
    assert found[0] == 0 < found[1]
