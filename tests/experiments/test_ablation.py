"""The comparison of adapters: which runs there are, that adapters are of equal size, and that a run works."""

import dataclasses
import math

import ablation
import pytest
import torch
from peft import inject_adapter_in_model

from wadi.backbones import student_config
from wadi.directions.change import with_norms_of
from wadi.distill import PRESETS
from wadi.distill.methods import method_config
from wadi.distill.roles import view
from wadi.emoji import teacher_folder
from wadi.errors import WadiError
from wadi.files import read_json, write_json
from wadi.onestep import load_pipeline


@pytest.fixture(scope="module")
def network():
    return load_pipeline(teacher_folder(), without=("text_encoder", "vae")).unet


@pytest.fixture(scope="module")
def ranks(network):
    return ablation.Ranks(network)


@pytest.mark.parametrize("method", ["lorad", "lora"])
def test_adapters_train_a_tenth_of_the_parameters(network, ranks, method):
    rank = ranks.equal(method, 0.1)
    adapted = inject_adapter_in_model(method_config(method, student_config(network, rank)), view(network))
    own = {id(p) for p in network.parameters()}
    count = sum(p.numel() for p in adapted.parameters() if id(p) not in own)
    assert count / ranks.total == pytest.approx(0.1, abs=0.004)


def test_every_method_is_tried_as_often_and_trained_with_every_seed(ranks):
    rates = ablation.runs_of("rates", ranks, {})
    tried = {m: [run for run in rates if run.changes["student_method"] == m] for m in ablation.RATES}
    assert len({len(runs) for runs in tried.values()}) == 1
    assert {run.prompts for run in rates} == {"selection"}
    assert {run.seed for run in rates}.isdisjoint(ablation.SEEDS)
    chosen = dict.fromkeys(ablation.RATES, 1e-3)
    runs = [
        run
        for suite in ("methods", "ranks", "fake", "guidance")
        for run in ablation.runs_of(suite, ranks, chosen)
    ]
    assert len({(run.suite, run.name) for run in runs}) == len(runs)
    finals = [(run.changes["student_method"], run.seed) for run in runs if run.suite == "methods"]
    assert sorted(finals) == sorted((m, seed) for m in ablation.RATES for seed in ablation.SEEDS)
    assert {run.prompts for run in runs} == {"test"}
    above = ablation.runs_of("next", ranks, chosen)
    assert {run.changes["student_learning_rate"] for run in above} == {3e-3}  # of the tried, after 1e-3
    tried = [(run.changes["student_method"], run.seed) for run in above]
    assert sorted(tried) == sorted((m, seed) for m in ("lorad", "lora") for seed in ablation.SEEDS)
    with pytest.raises(WadiError, match="LoRaD: 1e-02 is the highest rate tried"):
        ablation.runs_of("next", ranks, chosen | {"lorad": 1e-2})
    gap = ablation.runs_of("gap", ranks, chosen)
    assert len({run.name for run in gap}) == len({str(run.changes) for run in gap}) == len(gap)
    assert {run.prompts for run in gap} == {"selection"}  # the best of them is to be chosen
    preset = PRESETS["emoji"]
    for run in (*rates, *runs, *gap):
        preset.replace(**run.changes)  # nothing that does not go together


def test_the_rate_is_chosen_by_the_distance_and_a_run_that_failed_never(tmp_path):
    for method, tried in ablation.RATES.items():
        for i, rate in enumerate(tried):
            figures = None if i == 0 else {"frechet_distance": 5.0 - i}
            write_json(tmp_path / "rates" / f"{method}-{rate:.0e}.json", {"figures": figures})
    assert ablation.chosen_rates(tmp_path, "rates") == {m: tried[-1] for m, tried in ablation.RATES.items()}
    (tmp_path / "rates" / "lora-1e-03.json").unlink()
    with pytest.raises(WadiError, match=r"lora-1e-03.json: is missing"):
        ablation.chosen_rates(tmp_path, "rates")


def test_what_weights_moved():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 200, generator=generator)
    longer = ablation.weights_moved([(weight, 1.01 * weight)])
    assert longer["norm"] == pytest.approx(0.01, rel=1e-3)
    assert longer["angle"] == pytest.approx(0.0, abs=1e-6)
    # any change of these lengths that points anywhere: E|t| = sqrt(2 / (pi n)), and the angle is the length
    moved = weight + 0.01 * torch.randn(60, 200, generator=generator)
    figures = ablation.weights_moved([(weight, moved), (weight, weight + 0.0)])
    assert figures["null_norm"] == pytest.approx(0.005 * math.sqrt(2 / (math.pi * 200)), rel=0.05)
    assert figures["null_angle"] == pytest.approx(0.005, rel=0.05)
    assert figures["norm"] == pytest.approx(figures["null_norm"], rel=0.3)
    assert 0.3 < figures["null_energy"] < figures["energy"] + 0.1 < 1
    turned = with_norms_of(moved, weight)
    assert ablation.weights_moved([(weight, turned)])["norm"] == pytest.approx(0.0, abs=1e-6)


def test_a_run_is_trained_judged_and_not_run_again(tmp_path, monkeypatch, capsys):
    every = ablation.read_prompts
    monkeypatch.setattr(ablation, "read_prompts", lambda source: every(source)[:8])
    for method, tried in ablation.RATES.items():
        for i, rate in enumerate(tried):
            write_json(
                tmp_path / "rates" / f"{method}-{rate:.0e}.json", {"figures": {"frechet_distance": float(i)}}
            )
    options = ablation.Options(
        suites=("methods",),
        names=("lora-seed1",),
        out=tmp_path,
        max_train_steps=1,
        train_batch_size=2,
        num_samples=8,
        curve_samples=8,
        device="cpu",
    )
    ablation.main(options)
    path = tmp_path / "methods" / "lora-seed1.json"
    result = read_json(path)
    assert result["status"] == "finished"
    assert result["config"]["student_learning_rate"] == ablation.RATES["lora"][0]
    assert [point["step"] for point in result["curve"]] == [1]
    assert result["figures"] == {k: v for k, v in result["curve"][0].items() if k != "step"}
    swapped = result["directions"]["with_teacher_norms"]
    assert swapped["samples"] == 8
    assert result["directions"]["energy"] > 0.98  # rank 18 of at least 64, to first order
    before = path.read_bytes()
    assert "1 runs, 1 to do" in capsys.readouterr().out
    ablation.main(options)
    assert "1 runs, 0 to do" in capsys.readouterr().out
    assert path.read_bytes() == before
    with pytest.raises(WadiError, match=r"lora-seed1.json: was made with --max-train-steps 1, not 2"):
        ablation.main(dataclasses.replace(options, max_train_steps=2))


def test_a_run_that_skips_every_update_is_not_finite(monkeypatch):
    """Skipped updates leave finite losses behind, of the untrained student."""
    every = ablation.read_prompts
    monkeypatch.setattr(ablation, "read_prompts", lambda source: every(source)[:8])
    world = ablation.World(teacher_folder(), "cpu", 8)
    options = ablation.Options(device="cpu", train_batch_size=2, max_train_steps=1000)
    run = ablation.Run("gap", "x", "x", ablation.student("lora", 1e-3, 4))
    student = ablation.Student(run, world, options)
    with torch.no_grad():
        next(iter(student.trainer.student_parameters.values())).fill_(math.nan)
    losses, limit = student.trainer.step(0), student.config.optimizer.max_skipped_steps
    assert student.trainer.skipped.tolist() == [1, 1]
    finite = dict.fromkeys(losses, torch.zeros(()))
    for in_a_row, done in ((limit - 1, False), (limit, True)):
        student.step, student.trainer.skipped[1] = 199, in_a_row
        student.look(finite)
        assert student.done == done
    assert student.result()["status"] == "not finite"


@pytest.mark.parametrize(
    ("suite", "line"),
    [
        ("sizes", "--suites: 'sizes' is unknown"),
        ("dit-rates", "--dit: the suite dit-rates needs the folder"),
    ],
)
def test_what_cannot_be_is_one_line(suite, line):
    with pytest.raises(WadiError, match=line):
        ablation.main(ablation.Options(suites=(suite,), device="cpu"))
