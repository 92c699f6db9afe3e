"""Two processes on the CPU (gloo), against one process with the same samples a step.

Those that are interrupted are started by the agent of torch's own launcher, to which
`accelerate launch --multi_gpu` hands over; it passes the signal on. The others know each other by the same
variables.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.files import full_disk, metrics
from tests.processes import Process, start_two
from tests.tiny import PROMPTS
from wadi.distill import DistillConfig, distill, loop
from wadi.distill import checkpoint as checkpoint_room
from wadi.distill import run as run_room
from wadi.distill.run import _digests, _open_run, share_batch
from wadi.distill.trainer import Trainer
from wadi.errors import WadiError
from wadi.files import explain_os_errors
from wadi.prompts import cache, read_prompts

RUN = """
import sys
import torch
from wadi.distill import DistillConfig, distill
from wadi.errors import WadiError
torch.set_num_threads(1)
try:
    distill(DistillConfig.load(sys.argv[1]))
except WadiError as error:
    raise SystemExit(f"error: {error}") from None
"""
ON_TWO_GPUS = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
GROUPS = ("student", "fake", "ema", "student_optimizer", "fake_optimizer")


def config(teacher, folder, **options):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    base = DistillConfig.of(
        pretrained_model_name_or_path=str(teacher),
        prompts=str(folder / "prompts.txt"),
        output_dir=str(folder / "run"),
        train_batch_size=4,
        student_rank=2,
        fake_rank=2,
        fake_updates=2,
        null_prompt_probability=0.5,
        student_learning_rate=1e-3,
        fake_learning_rate=1e-3,
        max_train_steps=4,
        logging_steps=1,
        checkpointing_steps=1,
        checkpoints_total_limit=None,
        validation_steps=2,
        validation_seeds=(1,),
    )
    return base.replace(**options)


def launch_on_two_gpus(options, folder):
    (folder / "run.py").write_text(RUN)
    options.save(folder / "options.yaml")
    return subprocess.Popen(
        [*ON_TWO_GPUS, str(folder / "run.py"), str(folder / "options.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def distil(options):
    """What the command does with a mistake."""
    try:
        distill(options)
    except WadiError as error:
        raise SystemExit(f"error: {error}") from None


def launch(options):
    """Distil in two processes of the launcher's agent."""
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, 2, start_method="fork", **place)
    elastic_launch(config, distil)(options)


def two(options, folder):
    """Distil in two processes: their exit statuses, and what both told."""
    processes = start_two(folder, distil, options)
    done = [process.communicate() for process in processes]
    return [code for code, _, _ in done], "".join(err for _, _, err in done)


def checkpoint(run, step):
    folder = run / f"checkpoints/step-{step:06d}"
    return {
        f"{group}/{name}": x
        for group in GROUPS
        for name, x in load_file(folder / f"{group}.safetensors").items()
    }


def assert_same_to_rounding(run, other, first, last):
    """Moments after step `first` and the losses of all.

    The student's gradient is a difference of two networks that are nearly equal: past the first step, where
    they are equal but for the adapter's start, it magnifies rounding.
    """
    tolerance = 1e-3 if first == 1 else 1e-2
    ours, theirs = checkpoint(run, first), checkpoint(other, first)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        if name.endswith(("exp_avg", "exp_avg_sq", ".step")):
            scale = float(theirs[name].abs().max())
            torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=tolerance * scale + 1e-12)
    rows, expected = metrics(run), metrics(other)
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    for row, want in zip(rows, expected, strict=True):
        assert row["skipped_steps"] == want["skipped_steps"] == 0
        assert row["fake_loss"] == pytest.approx(want["fake_loss"], rel=1e-3)
        assert row["student_loss"] == pytest.approx(want["student_loss"], rel=2e-2, abs=1e-9)


@pytest.fixture(scope="module")
def teacher_folder(small_teacher_folder):
    return small_teacher_folder


@pytest.fixture(scope="module")
def one(teacher_folder, tmp_path_factory):
    return distill(config(teacher_folder, tmp_path_factory.mktemp("one")))


def test_two_processes_are_one_with_the_same_samples(teacher_folder, tmp_path, one):
    """Batch 1, two micro-batches, two processes: 4 samples a step, with losses averaged over all of them."""
    options = config(teacher_folder, tmp_path, train_batch_size=1, gradient_accumulation_steps=2)
    codes, err = two(options, tmp_path)
    assert codes == [0, 0], err
    run = tmp_path / "run"
    assert json.loads((run / "checkpoints/step-000004/state.json").read_text())["batch"] == 4
    assert_same_to_rounding(run, one, 1, 4)
    written = [sorted(p.name for p in folder.rglob("*") if "event" not in p.name) for folder in (run, one)]
    assert written[0] == written[1]


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"cuda_graphs": True}, {"shard_base": True}], ids=str)
def test_two_gpus_are_one_with_the_same_samples(how, teacher_folder, tmp_path, one):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = config(teacher_folder, tmp_path, train_batch_size=2, **how)
    process = launch_on_two_gpus(options, tmp_path)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err[-3000:]
    assert_same_to_rounding(tmp_path / "run", one, 1, 4)


def test_interrupt_saves_once_and_one_process_goes_on(teacher_folder, tmp_path, one):
    options = config(
        teacher_folder, tmp_path, train_batch_size=2, max_train_steps=2000, checkpointing_steps=2000
    )
    launcher = Process(tmp_path, launch, options, environment={"ACCELERATE_USE_CPU": "1"})
    run = tmp_path / "run"
    while not (run / "metrics.jsonl").exists():
        assert launcher.process.is_alive(), launcher.communicate()
        time.sleep(0.02)
    os.kill(launcher.process.pid, signal.SIGINT)
    code, out, err = launcher.communicate()
    assert code not in (0, -signal.SIGKILL), err
    assert out.count(f"wadi distill --resume-from-checkpoint {run}") == 1
    (last,) = (run / "checkpoints").iterdir()
    step = int(last.name[-6:])
    assert step == metrics(run)[-1]["step"] < 2000
    distill(DistillConfig.of(resume_from_checkpoint=str(run), max_train_steps=step + 1))
    assert metrics(run)[-1]["step"] == step + 1
    saved = DistillConfig.load(run / "config.yaml")
    assert (saved.optimizer.train_batch_size, saved.optimizer.gradient_accumulation_steps) == (2, 2)
    shared = min(step, 4)
    for row, want in zip(metrics(run)[:shared], metrics(one)[:shared], strict=True):
        assert row["fake_loss"] == pytest.approx(want["fake_loss"], rel=1e-3)


def test_two_processes_go_on_from_one_and_stop_together(teacher_folder, tmp_path, one):
    """The checkpoint of one process goes on where it would have; then predictions that overflow stop both."""
    run = tmp_path / "run"
    shutil.copytree(one, run)
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    codes, err = two(DistillConfig.of(resume_from_checkpoint=str(run)), tmp_path)
    assert codes == [0, 0], err
    assert_same_to_rounding(run, one, 3, 4)

    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    path = teacher / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"].fill_(1e38)
    save_file(weights, path, metadata={"format": "pt"})
    options = config(
        teacher, tmp_path, train_batch_size=2, output_dir=str(tmp_path / "nan"), max_skipped_steps=3
    )
    codes, err = two(options.replace(checkpointing_steps=100), tmp_path)
    assert not {0, -signal.SIGKILL} & set(codes)
    told = re.findall("error: step 3: student_loss is (?:nan|inf), 3 steps in a row were skipped", err)
    assert len(told) == 1
    assert not (tmp_path / "nan/checkpoints").exists()


def full(*arguments, **rest):
    with explain_os_errors("file", "write it"):
        full_disk()


def spoil(trainer, step, usual=Trainer.step):
    losses = usual(trainer, step)
    next(iter(trainer.average.tensors.values())).fill_(float("nan"))
    return losses


FAILING = {
    "prompts": (run_room, "read_prompts", full),
    "embeddings": (cache, "save_tensors", full),
    "folder": (run_room, "_open_run", full),
    "metrics": (loop, "append_metrics", full),
    "samples": (loop, "labelled_grid", full),
    "checkpoint": (checkpoint_room, "save_tensors", full),
    "weights": (Trainer, "step", spoil),
    "export": (run_room, "save_adapter", full),
}


def fail_everywhere(options):
    """Distil once for each place where the first process alone writes or reads, which fails there."""
    for place, (where, name, instead) in FAILING.items():
        usual = getattr(where, name)
        if os.environ["RANK"] == "0":
            setattr(where, name, instead)
        try:
            distill(options.replace(output_dir=f"{options.run.output_dir}-{place}"))
        except (WadiError, SystemExit) as error:
            print(f"{place}: {type(error).__name__}: {error}")
        setattr(where, name, usual)


def test_a_failure_of_one_process_stops_all_and_is_told_once(teacher_folder, tmp_path):
    """The first tells; the other stops there too and is quiet."""
    options = config(
        teacher_folder,
        tmp_path,
        train_batch_size=2,
        max_train_steps=1,
        validation_steps=1,
        embeddings_dir=str(tmp_path / "embeddings"),
    )
    processes = start_two(tmp_path, fail_everywhere, options)
    (code, first, _), (other_code, other, quiet) = (each.communicate() for each in processes)
    told = dict.fromkeys(FAILING, "file: could not write it: No space left on device")
    told["weights"] = "step 1: weights are not finite; no checkpoint was written"
    assert first.splitlines() == [f"{place}: WadiError: {line}" for place, line in told.items()]
    assert other.splitlines() == [f"{place}: SystemExit: 2" for place in FAILING]
    assert "Traceback" not in quiet
    assert (code, other_code) == (0, 0)
    assert not list(tmp_path.glob("run-*/checkpoints/.*"))


def test_samples_of_a_step_are_shared_anew():
    options = DistillConfig.of(train_batch_size=8, gradient_accumulation_steps=1)
    for batch, processes, size, count in (
        (8, 1, 8, 1),
        (8, 2, 4, 1),
        (16, 1, 8, 2),
        (12, 1, 6, 2),
        (24, 2, 6, 2),
    ):
        shared = share_batch(options, batch, processes)
        assert (shared.optimizer.train_batch_size, shared.optimizer.gradient_accumulation_steps) == (
            size,
            count,
        )
        assert size * count * processes == batch
        assert shared.fingerprint() == options.fingerprint()
    with pytest.raises(WadiError, match="8 samples per step, which 3 processes cannot share equally"):
        share_batch(options, 8, 3)


def test_samples_a_step_stay_without_a_checkpoint(teacher_folder, tmp_path, monkeypatch):
    """A run of two processes with 2 samples each, ended before a checkpoint, goes on in one with 4."""
    options = config(teacher_folder, tmp_path, train_batch_size=2, max_train_steps=1)
    run = Path(options.run.output_dir)
    _open_run(
        run, options, 4, _digests(options, read_prompts(options.model.prompts), options.model.teacher[0])
    )
    seen = []
    monkeypatch.setattr("wadi.distill.run.train", lambda trainer: seen.append(trainer.batch))
    with pytest.raises(SystemExit):
        distill(DistillConfig.of(resume_from_checkpoint=str(run)))
    assert seen == [4]
    (run / "run.json").write_text("[4]")
    with pytest.raises(WadiError, match=r"run\.json: is damaged"):
        distill(DistillConfig.of(resume_from_checkpoint=str(run)))
