"""Prompts that are encoded during the training: the same run as with all of them encoded before it."""

import os
import signal
import threading

import pytest
import torch

from tests.files import metrics
from tests.processes import Process, start_two
from tests.tiny import PROMPTS
from wadi.backbones import PromptEncoder
from wadi.cli import main
from wadi.distill import DistillConfig, distill
from wadi.distill.trainer import Trainer
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.prompts import Window, window

SET = [f"{prompt} {number}" for number in range(20) for prompt in PROMPTS]
PROMPT = 32 * 16 * 4
"""Bytes of one prompt's condition: tokens, width, float32."""
SMALL = 64 * PROMPT / 2**30
"""GiB: half of the set."""
LAST = "checkpoints/step-000008"


@pytest.fixture(scope="module")
def teacher_folder(small_teacher_folder):
    return small_teacher_folder


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Three steps of two prompts form a group."""
    monkeypatch.setattr(window, "GROUP", 6)


def config(teacher, folder, name="run", **options):
    (folder / "prompts.txt").write_text("\n".join(SET))
    return DistillConfig.of(
        pretrained_model_name_or_path=str(teacher),
        prompts=str(folder / "prompts.txt"),
        output_dir=str(folder / name),
        embeddings_limit=SMALL,
        train_batch_size=2,
        student_rank=2,
        fake_rank=2,
        student_learning_rate=1e-2,
        max_train_steps=8,
        logging_steps=1,
        checkpointing_steps=2,
        checkpoints_total_limit=None,
        validation_steps=0,
    ).replace(**options)


def state(run):
    groups = ("student", "fake", "ema", "student_optimizer", "fake_optimizer")
    return {
        f"{group}/{name}": tensor
        for group in groups
        for name, tensor in load_tensors(run / LAST / f"{group}.safetensors").items()
    }


def assert_same_bits_until(run, other, step):
    first, second = state(run), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []
    assert metrics(run)[:step] == metrics(other)[:step]


def encoding_threads():
    return [thread.name for thread in threading.enumerate() if "encoding prompts" in thread.name]


@pytest.fixture(scope="module")
def windowed(teacher_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "GROUP", 6)
        return distill(config(teacher_folder, tmp_path_factory.mktemp("windowed")))


def test_a_run_is_the_same_to_rounding_as_with_the_whole_set(teacher_folder, tmp_path, windowed, capsys):
    whole = distill(config(teacher_folder, tmp_path, embeddings_limit=1.0))
    assert "--embeddings-limit" not in capsys.readouterr().out
    rows, expected = metrics(windowed), metrics(whole)
    for row, want in zip(rows, expected, strict=True):
        assert row["fake_loss"] == pytest.approx(want["fake_loss"], rel=1e-3)
        assert row["student_loss"] == pytest.approx(want["student_loss"], rel=2e-2, abs=1e-9)


def test_the_encoder_gets_what_the_run_draws_and_no_more(
    teacher_folder, tmp_path, windowed, monkeypatch, capsys
):
    """18 draws of 120 prompts in three groups; the memory for more groups and a longer run change no bit."""
    asked, encode = [], PromptEncoder.encode
    monkeypatch.setattr(
        PromptEncoder,
        "encode",
        lambda self, prompts, *rest: asked.append(prompts) or encode(self, prompts, *rest),
    )
    monkeypatch.setattr(window, "AHEAD", 2)
    run = distill(config(teacher_folder, tmp_path, max_train_steps=9))
    assert_same_bits_until(run, windowed, 8)
    training = [prompts for prompts in asked if prompts[0] in SET and prompts != SET[:4]]
    assert 3 <= len(training) <= 4
    assert max(map(len, training)) <= 6
    assert len(training[0]) > 2
    out = capsys.readouterr().out
    assert "prompts: all 120 would take 0.000229 GiB encoded" in out
    assert "s beside the training, which waited" in out
    assert encoding_threads() == []


def kill_at(step, options):
    """Distil with the groups of these tests, and in this step kill the own process."""
    window.GROUP, usual = 6, Trainer.step

    def signalled(trainer, current):
        losses = usual(trainer, current)
        if current == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    Trainer.step = signalled
    distill(options)


def test_a_killed_run_goes_on_to_the_same_bits(teacher_folder, tmp_path, windowed):
    """Killed within a group; the first steps after it take the rest of that group."""
    options = config(teacher_folder, tmp_path)
    found, _, err = Process(tmp_path, kill_at, 5, options).communicate()
    assert found == -signal.SIGKILL, err
    distill(DistillConfig.of(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_bits_until(tmp_path / "run", windowed, 8)
    assert len(metrics(tmp_path / "run")) == 8


def test_the_limit_belongs_to_the_run(teacher_folder, tmp_path, windowed):
    with pytest.raises(WadiError, match="--embeddings-limit: the run was started with"):
        distill(DistillConfig.of(resume_from_checkpoint=str(windowed), embeddings_limit=1.0))


MISTAKES = {
    "limit": (
        {"embeddings_limit": 11 * PROMPT / 2**30},
        r"^--embeddings-limit .*twice the 6 prompts .* must fit; give at least 0\.001$",
    ),
    "device": ({"text_encoder_device": "gpu"}, "^--text-encoder-device gpu: the training runs on the CPU"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_before_the_training(teacher_folder, tmp_path, mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises(WadiError, match=message):
        distill(config(teacher_folder, tmp_path, **options))
    assert not (tmp_path / "run").exists()


def test_only_prompts_that_are_drawn_must_be_short_enough(teacher_folder, tmp_path):
    """The first prompt that the run draws, and one that it never draws, are too long."""
    options = config(teacher_folder, tmp_path)
    seen = []
    usual = Window.numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "numbers", lambda self, steps: seen.append(usual(self, steps)) or seen[-1])
        patch.setattr(Trainer, "step", lambda self, step: pytest.fail("it trains"))
        lines = SET.copy()
        with pytest.raises(pytest.fail.Exception):
            distill(options)
        never = next(number for number in range(len(SET)) if number not in seen[0] and number > 4)
        lines[never] = "a" * 99
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        with pytest.raises(pytest.fail.Exception):
            distill(options.replace(output_dir=str(tmp_path / "second")))
        lines[seen[0][-1]] = "b" * 99
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        message = f"1 of {len(seen[0])} prompts that the run draws are longer .* line {seen[0][-1] + 1} "
        with pytest.raises(WadiError, match=message):
            distill(options.replace(output_dir=str(tmp_path / "third")))


def failing(monkeypatch, error):
    """Let the third group fail."""
    encode, groups = PromptEncoder.encode, []

    def fail(self, prompts, *rest):
        if threading.current_thread() is not threading.main_thread():
            groups.append(prompts)
            if len(groups) == 3:
                raise error
        return encode(self, prompts, *rest)

    monkeypatch.setattr(PromptEncoder, "encode", fail)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore"),
            "step 6 .*CUDA out of memory.; --text-encoder-device",
        ),
        (WadiError("text_encoder: damaged"), "^text_encoder: damaged$"),
    ],
)
def test_a_failure_of_the_thread_is_one_line_and_stops_the_run(
    teacher_folder, tmp_path, monkeypatch, error, message
):
    failing(monkeypatch, error)
    with pytest.raises(WadiError, match=message):
        distill(config(teacher_folder, tmp_path))
    assert metrics(tmp_path / "run")[-1]["step"] == 6
    assert encoding_threads() == []


def two(options, fail=False):
    window.GROUP = 6
    with pytest.MonkeyPatch.context() as patch:
        if fail and os.environ["RANK"] == "1":
            failing(patch, RuntimeError("broken"))
        try:
            distill(options)
        except WadiError as error:
            raise SystemExit(f"error: {error}") from None


def test_two_processes_encode_their_shares(teacher_folder, tmp_path, windowed):
    """Equal to one process with twice the batch to rounding; a failure of one is told once and stops both."""
    options = config(teacher_folder, tmp_path, train_batch_size=1)
    done = [process.communicate() for process in start_two(tmp_path, two, options)]
    assert [code for code, _, _ in done] == [0, 0], done
    assert sum(out.count("s beside the training") for _, out, _ in done) == 1
    for row, want in zip(metrics(tmp_path / "run"), metrics(windowed), strict=True):
        assert row["fake_loss"] == pytest.approx(want["fake_loss"], rel=1e-3)
    options = options.replace(output_dir=str(tmp_path / "failing"), max_train_steps=40)
    done = [process.communicate() for process in start_two(tmp_path, two, options, True)]
    told = "".join(err for _, _, err in done)
    assert told.count("error: the prompts of step 12 could not be encoded: broken") == 1
    assert "Traceback" not in told
    assert 0 not in [code for code, _, _ in done]


def test_the_command_says_that_the_set_is_large(teacher_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(SET))
    command = [
        "prompts",
        "encode",
        "--teacher",
        str(teacher_folder),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    assert main([*command, "--embeddings-dir", str(tmp_path / "all")]) == 0
    assert "--embeddings-limit" not in capsys.readouterr().err
    monkeypatch.setattr("wadi.prompts.cache.Embeddings.bytes_a_prompt", 2**30)
    assert main([*command, "--embeddings-dir", str(tmp_path / "all")]) == 0
    assert "only with --embeddings-limit 120 or more" in capsys.readouterr().err
