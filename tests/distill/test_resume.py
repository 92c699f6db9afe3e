"""A run that is killed or interrupted goes on as if nothing had happened: the same bits on the CPU."""

import os
import shutil
import signal

import pytest

from tests.files import metrics
from tests.processes import Process
from tests.tiny import PROMPTS
from wadi.distill import DistillConfig, distill
from wadi.distill.trainer import Trainer
from wadi.errors import WadiError
from wadi.files import load_tensors, save_tensors

FILES = ("student", "fake", "ema", "student_optimizer", "fake_optimizer")


def config(teacher, folder, name, **options):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return DistillConfig.of(
        pretrained_model_name_or_path=str(teacher),
        prompts=str(folder / "prompts.txt"),
        output_dir=str(folder / name),
        train_batch_size=1,
        student_rank=2,
        fake_rank=2,
        fake_updates=2,
        student_learning_rate=1e-2,
        lr_decay_fraction=0.5,
        max_train_steps=6,
        logging_steps=1,
        checkpointing_steps=2,
        checkpoints_total_limit=None,
        validation_steps=0,
        **options,
    )


def distil_until(step, number, options):
    """Distil, and in this step send the own process a signal."""
    usual = Trainer.step

    def signalled(trainer, current):
        losses = usual(trainer, current)
        if current == step:
            os.kill(os.getpid(), number)
        return losses

    Trainer.step = signalled
    distill(options)


@pytest.fixture(scope="module")
def teacher_folder(small_teacher_folder):
    return small_teacher_folder


@pytest.fixture(scope="module")
def straight(teacher_folder, tmp_path_factory):
    return distill(config(teacher_folder, tmp_path_factory.mktemp("straight"), "run"))


def assert_same_run(run, straight):
    last = "checkpoints/step-000006"
    for name in FILES:
        first, second = (load_tensors(folder / last / f"{name}.safetensors") for folder in (straight, run))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (straight / adapter).read_bytes()
    assert metrics(run) == metrics(straight)


def test_kill_and_resume_is_the_same_run(teacher_folder, tmp_path, straight):
    options = config(teacher_folder, tmp_path, "run")
    process = Process(tmp_path, distil_until, 5, signal.SIGKILL, options)
    assert process.communicate()[0] == -signal.SIGKILL
    assert (tmp_path / "run/checkpoints/step-000004").exists()
    assert not (tmp_path / "run/adapter").exists()
    distill(DistillConfig.of(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", straight)


def test_interrupt_saves_and_says_how_to_go_on(teacher_folder, tmp_path, straight):
    options = config(teacher_folder, tmp_path, "run")
    code, out, err = Process(tmp_path, distil_until, 2, signal.SIGINT, options).communicate()
    assert code == 130, err
    run = tmp_path / "run"
    assert f"wadi distill --resume-from-checkpoint {run}" in out
    assert "Traceback" not in err
    last = max(run.glob("checkpoints/step-*"))
    assert int(last.name[-6:]) == metrics(run)[-1]["step"] == 3
    distill(DistillConfig.of(resume_from_checkpoint=str(last)))
    assert_same_run(run, straight)


# --- identity of what is resumed ---


def one_step(teacher, folder, **options):
    options = config(teacher, folder, "run", **options)
    return options.replace(max_train_steps=2, fake_updates=1)


def go_on(run, **options):
    return distill(DistillConfig.of(resume_from_checkpoint=str(run), max_train_steps=4, **options))


def change(path):
    tensors = load_tensors(path)
    tensors[min(tensors)].view(-1)[0] += 0.5
    save_tensors(path, tensors, {"format": "pt"})


def test_a_moved_run_of_moved_inputs_goes_on_with_the_same_bits(teacher_folder, tmp_path):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    whole = distill(one_step(teacher, tmp_path))
    go_on(whole)
    (tmp_path / "half").mkdir()
    run = distill(one_step(teacher, tmp_path / "half"))
    moved = run.rename(tmp_path / "moved")
    teacher = teacher.rename(tmp_path / "teacher, moved")
    with pytest.raises(WadiError, match="does not exist; if it was moved, give its new path with --teacher"):
        go_on(moved)
    prompts = (tmp_path / "half" / "prompts.txt").rename(tmp_path / "more.txt")
    with pytest.raises(WadiError, match="give its new path with --prompts"):
        go_on(moved, pretrained_model_name_or_path=str(teacher))
    go_on(moved, pretrained_model_name_or_path=str(teacher), prompts=str(prompts))
    for name in FILES:
        first, second = (
            load_tensors(folder / f"checkpoints/step-000004/{name}.safetensors") for folder in (whole, moved)
        )
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    assert DistillConfig.load(moved / "config.yaml").model.prompts == str(prompts)


EDITS = {
    "teacher": lambda folder: change(folder / "teacher/unet/diffusion_pytorch_model.safetensors"),
    "prompts": lambda folder: (folder / "prompts.txt").write_text("another prompt\n"),
    "student-adapter": lambda folder: change(folder / "start/adapter/adapter_model.safetensors"),
}


def test_inputs_that_changed_are_noticed_by_name(teacher_folder, tmp_path):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    start = distill(one_step(teacher, tmp_path))
    start.rename(tmp_path / "start")
    run = distill(one_step(teacher, tmp_path, student_adapter=str(tmp_path / "start/adapter")))
    for option, changed in EDITS.items():
        kept = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{option}")
        changed(tmp_path)
        with pytest.raises(WadiError, match=f"--{option}: its content is not what .* was started with"):
            go_on(run)
        shutil.rmtree(tmp_path)
        kept.rename(tmp_path)
    with pytest.raises(WadiError, match="--student-adapter: its content is not"):
        go_on(run, student_adapter=str(run / "adapter"))
    go_on(run)
