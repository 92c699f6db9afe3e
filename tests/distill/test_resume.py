"""A run that is killed or interrupted goes on as if nothing had happened: the same bits on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny import PROMPTS
from wadi.distill import DistillConfig, distill
from wadi.files import load_tensors

RUN = """
import sys
import torch
torch.set_num_threads(1)
from wadi.distill import DistillConfig, distill
distill(DistillConfig.load(sys.argv[1]))
"""
FILES = ("student", "fake", "ema", "student_optimizer", "fake_optimizer")


def config(teacher, folder, name, **options):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return DistillConfig(
        pretrained_model_name_or_path=str(teacher),
        prompts=str(folder / "prompts.txt"),
        output_dir=str(folder / name),
        train_batch_size=1,
        student_rank=2,
        fake_rank=2,
        fake_updates=2,
        student_learning_rate=1e-2,
        lr_decay_fraction=0.5,
        max_train_steps=8,
        logging_steps=1,
        checkpointing_steps=2,
        checkpoints_total_limit=None,
        validation_steps=0,
        **options,
    )


def start(options, folder):
    path = folder / "options.yaml"
    options.save(path)
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def straight(teacher_folder, tmp_path_factory):
    return distill(config(teacher_folder, tmp_path_factory.mktemp("straight"), "run"))


def assert_same_run(run, straight):
    last = "checkpoints/step-000008"
    for name in FILES:
        first, second = (load_tensors(folder / last / f"{name}.safetensors") for folder in (straight, run))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (straight / adapter).read_bytes()
    assert metrics(run) == metrics(straight)


def test_kill_and_resume_is_the_same_run(teacher_folder, tmp_path, straight):
    options = config(teacher_folder, tmp_path, "run")
    process = start(options, tmp_path)
    wait_for(tmp_path / "run/checkpoints/step-000004", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/adapter").exists()
    distill(DistillConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", straight)


def test_interrupt_saves_and_says_how_to_go_on(teacher_folder, tmp_path, straight):
    options = config(teacher_folder, tmp_path, "run")
    process = start(options, tmp_path)
    wait_for(tmp_path / "run/metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    run = tmp_path / "run"
    assert f"wadi distill --resume-from-checkpoint {run}" in out
    assert "Traceback" not in err
    last = max(run.glob("checkpoints/step-*"))
    assert int(last.name[-6:]) == metrics(run)[-1]["step"] < 8
    distill(DistillConfig(resume_from_checkpoint=str(last)))
    assert_same_run(run, straight)
