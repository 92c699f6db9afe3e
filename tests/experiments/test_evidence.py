"""docs/evidence.md says what the files of the trainings say; files that do not fit together make no table."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from wadi.errors import WadiError

SCRIPT = Path(__file__).parents[2] / "experiments" / "evidence.py"


@pytest.fixture(scope="module")
def evidence():
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("evidence")
    sys.path.remove(str(SCRIPT.parent))


def a_run(suite, name, distance, *, label="LoRaD", **changes):
    """Content of one file; a distance of None is a run that diverged. Figures go by the distance."""
    config = {
        "student_method": "lorad",
        "student_rank": 24,
        "student_learning_rate": 3e-3,
        "fake_method": "lorad",
        "fake_rank": 24,
        "fake_updates": 2,
        "fake_learning_rate": 3e-3,
        "guidance_scale": 1.5,
        "fake_guidance_scale": 1.0,
        "seed": 0,
        "train_batch_size": 64,
        "max_train_steps": 1000,
    }
    config |= {key: changes.pop(key) for key in list(changes) if key in config}
    curve = [{"step": step, **figures(1000 / step, 2000)} for step in (250, 500, 1000)]
    return {
        "suite": suite,
        "name": name,
        "teacher": "unet",
        "label": label,
        "config": config,
        "trainable_parameters": 775_123,
        "fake_parameters": 775_123,
        "network_parameters": 7_751_230,
        "prompts": "test",
        "curve": curve,
        "losses": [],
        "figures": None if distance is None else figures(distance, 10_000),
        "status": "not finite" if distance is None else "finished",
        "environment": {"device": "Abacus", "torch": "2.11.0", "date": "2026-11-24", "commit": "1234abc"},
        **changes,
    }


def figures(distance, samples):
    entropies = {"place_entropy": 3.0, "size_entropy": 1.9, "order_entropy": 1.8}
    shares = {"precision": 0.9, "recall": 0.8, "alignment": 1 - distance / 100}
    background = {"background_entropy": 3.3 - distance / 10}
    return {"samples": samples, "frechet_distance": distance, **shares, **background, **entropies}


def write(folder, *runs):
    for run in runs:
        path = folder / run["suite"] / f"{run['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))


def rates_runs():
    """Two methods at three rates; the highest of LoRaD diverged."""
    tried = {"lorad": {1e-3: 2.5, 3e-3: 1.5, 1e-2: None}, "lora": {1e-4: 3.0, 3e-4: 2.0, 1e-3: 2.2}}
    names = {"lorad": "LoRaD", "lora": "LoRA"}
    return [
        a_run(
            *("rates", f"{method}-{rate:.0e}", distance),
            label=names[method],
            student_method=method,
            student_learning_rate=rate,
            prompts="selection",
        )
        for method, distances in tried.items()
        for rate, distance in distances.items()
    ]


def methods_runs():
    """LoRaD 1.4, 1.5, 1.6; LoRA the same and a third of it diverged; OFT far off."""
    found = {"lorad": (1.4, 1.5, 1.6), "lora": (1.45, 1.6, None), "oft": (4.0, 4.1, 4.2)}
    names = {"lorad": "LoRaD", "lora": "LoRA", "oft": "OFT"}
    return [
        a_run("methods", f"{m}-seed{seed}", distance, label=names[m], student_method=m, seed=seed)
        for m, distances in found.items()
        for seed, distance in enumerate(distances, 1)
    ]


def all_runs():
    ranks = [
        a_run("ranks", f"{share}-seed{seed}", 1 + 5 / share + seed / 10, student_rank=share, seed=seed)
        | {"trainable_parameters": 77_512 * share}
        for share in (1, 5, 20)
        for seed in (1, 2)
    ]
    fake = [
        a_run(
            "fake",
            f"r{rank}-x{n}",
            distance,
            label=f"LoRaD r{rank}, {n} updates",
            fake_rank=rank,
            fake_updates=n,
        )
        for rank, n, distance in ((4, 2, 3.0), (4, 4, 2.5), (24, 2, 1.5), (24, 4, None))
    ]
    guidance = [
        a_run("guidance", f"{scale}", 1 + scale, label=f"{scale} / 1", guidance_scale=scale)
        for scale in (1.0, 1.5, 2.0)
    ]
    gap = [a_run("gap", "sid", 1.1, label="SiD"), a_run("gap", "dmd", 1.5, label="DMD", max_train_steps=2000)]
    return [*rates_runs(), *methods_runs(), *ranks, *fake, *guidance, *gap]


COST = {
    "header": "unet, batch 64, Abacus",
    "rows": [
        {
            "label": "LoRaD",
            "method": "lorad",
            "ms_per_step": 31.24,
            "peak_gib": 2.345,
            "trainable_parameters": 775_123,
            "graph": True,
        }
    ],
}


class Page:
    """A page of its own with results of its own."""

    def __init__(self, evidence, folder):
        self.module, self.data, self.path = evidence, folder / "ablation", folder / "docs" / "page.md"
        self.options = evidence.Options(self.path, self.data, folder / "docs" / "images")
        self.path.parent.mkdir()

    def write(self, *names):
        parts = [f"## {n}\n\n<!-- table: {n} -->\nold\n<!-- /table -->\n\nFindings of {n}.\n" for n in names]
        self.path.write_text("# Evidence\n\nProse.\n\n" + "\n".join(parts))

    def main(self, **changes):
        for name, value in changes.items():
            setattr(self.options, name, value)
        return self.module.main(self.options)

    @property
    def text(self):
        return self.path.read_text()

    def rows(self, first):
        """Cells of all rows with this first cell."""
        lines = [line[2:-2].split(" | ") for line in self.text.splitlines() if line.startswith("|")]
        return [cells for cells in lines if cells[0] == first]


@pytest.fixture
def page(evidence, tmp_path):
    return Page(evidence, tmp_path)


# --- statistics ---


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [  # of printed tables
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 10, 2.22814),
        (0.9, 7, 1.41492),
        (0.975, 1e6, 1.95997),
        (0.025, 4, -2.77645),
    ],
)
def test_quantiles(evidence, probability, freedom, expected):
    assert evidence.student_t_quantile(probability, freedom) == pytest.approx(expected, rel=3e-6)


def test_interval(evidence):
    """1, 2, 3: deviation 1, so 4.30265 / sqrt(3)."""
    found = evidence.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2, 3)
    assert found.half == pytest.approx(2.48414, rel=1e-5)
    assert evidence.estimate([1.0]).half is None


def test_difference(evidence):
    """Equal sizes and deviations: 2 (n - 1) degrees of freedom, as in the classical test."""
    found = evidence.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert found.mean == 1
    assert found.half == pytest.approx(2.77645 * math.sqrt(2 / 3), rel=1e-5)
    # one of the two without scatter: the degrees of freedom are the other's
    assert evidence.difference([1.0, 2.0, 3.0], [5.0] * 9).half == pytest.approx(2.48414, rel=1e-5)
    assert evidence.difference([1.0, 1.0], [2.0, 2.0]).half == 0
    assert evidence.difference([1.0], [2.0, 2.1]).half is None


def test_interval_covers(evidence):
    """Of 2000 intervals of five normal numbers each 95 % hold the truth; so do Welch's."""
    generator = np.random.default_rng(0)
    samples = generator.normal(0, (1, 3), (2000, 5, 2))
    found = [evidence.estimate(list(row)) for row in samples[..., 0]]
    assert sum(abs(each.mean) < each.half for each in found) / 2000 == pytest.approx(0.95, abs=0.015)
    found = [evidence.difference(list(row[:, 0]), list(row[:, 1])) for row in samples]
    assert sum(abs(each.mean) < each.half for each in found) / 2000 == pytest.approx(0.95, abs=0.015)


def test_choice(evidence):
    assert evidence.choose_rate({1e-3: [2.0, 2.2], 3e-3: [1.5, 2.6], 1e-4: [3.0]}) == 3e-3
    # the best of the runs that finished, but another of its rate did not
    assert evidence.choose_rate({1e-3: [2.0, 2.2], 3e-3: [1.0, None]}) == 1e-3
    assert evidence.choose_rate({3e-3: [2.0], 1e-3: [2.0]}) == 1e-3
    with pytest.raises(WadiError, match=r"none of the learning rates 1e-3, 3e-3 gave figures"):
        evidence.choose_rate({1e-3: [None], 3e-3: [None]})


# --- tables ---


def test_methods(page):
    write(page.data, *methods_runs())
    page.write("methods")
    page.main()
    lorad, lora = page.rows("LoRaD")[0], page.rows("LoRA")[0]
    # deviation 0.1: half is 4.30265 * 0.1 / sqrt(3)
    assert lorad[:6] == ["LoRaD", "775 123", "10.0 %", "3e-3", "3", "1.500 ± 0.248"]
    assert lora[4] == "2 of 3, not finite: seed 3"
    alike, far = page.rows("LoRA less LoRaD")[0], page.rows("OFT less LoRaD")[0]
    assert alike[1].startswith("+0.025 ± ")
    assert alike[1].endswith(", no difference shown")
    assert far[1] == f"+2.600 ± {2.77645 * 0.1 * math.sqrt(2 / 3):.3f}, higher"
    assert far[4].endswith(", lower")
    assert far[2] == "+0.0000 ± 0.0000, no difference shown"


def test_other_tables(page):
    write(page.data, *all_runs())
    (page.data / "cost.json").write_text(json.dumps(COST))
    page.write("rates", "methods", "ranks", "fake", "guidance", "gap", "cost")
    page.main()
    ranks = [cells for cells in page.rows("LoRaD") if cells[2] == "77 512"]
    assert ranks == [
        [
            "LoRaD",
            "1",
            "77 512",
            "1.0 %",
            "2",
            "6.15 (6.10 to 6.20)",
            "0.939 (0.938 to 0.939)",
            "2.68 (2.68 to 2.69)",
        ]
    ]
    assert page.rows("LoRaD r24, 4 updates")[0][3:5] == ["0 of 1, not finite: seed 0", "not finite"]
    assert page.rows("LoRaD r24, 2 updates")[0][4:] == ["1.50", "0.985", "3.15", "3.00"]
    assert page.rows("1.5")[0][:4] == ["1.5", "1", "1", "2.50"]
    assert page.rows("DMD")[0][:4] == ["DMD", "2000 x 64", "1", "1.50"]
    assert "1000 to 2000 updates" in page.text
    assert ["LoRaD", "775 123", "31.2", "2.35", "yes"] in page.rows("LoRaD")
    assert "unet, batch 64, Abacus" in page.text
    linked = {line.split("(")[-1].rstrip(")") for line in page.text.splitlines() if line.startswith("![")}
    assert linked == {f"images/{path.name}" for path in (page.path.parent / "images").iterdir()}
    assert len(linked) == 5


def test_there_is_a_table_for_every_suite(evidence):
    suites = importlib.import_module("ablation").SUITES
    assert set(suites) <= set(evidence.TABLES)


# --- the page ---


def test_check(page, capsys):
    write(page.data, *rates_runs(), *methods_runs())
    page.write("rates", "methods")
    before = page.text
    assert page.main(check=True) == 1
    error = capsys.readouterr().err
    assert "not what the files give: rates, methods" in error
    assert "evidence-rates.png" in error
    assert page.text == before
    assert page.main(check=False) == 0
    written = page.text
    assert page.main(check=True) == 0
    assert page.main(check=False) == 0
    assert page.text == written
    page.path.write_text(written.replace("| 1.500 ±", "| 1.400 ±"))
    capsys.readouterr()
    assert page.main(check=True) == 1
    assert "give: methods\n" in capsys.readouterr().err
    page.path.write_text(written.replace("Findings", "Other findings"))
    assert page.main(check=True) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nothing\n", "no <!-- table: rates --> for "),
        ("<!-- table: rates -->\n", "the table rates is not closed"),
        ("a\n<!-- /table -->\n", "line 2: closes a table that is not open"),
        ("<!-- table: rates -->\n<!-- table: methods -->\n", "line 2: opens a table inside of rates"),
        ("<!-- table: rats -->\n<!-- /table -->\n", "no table 'rats'; known are rates"),
        (2 * "<!-- table: rates -->\n<!-- /table -->\n", "line 3: the table rates was there before"),
        (
            "".join(f"<!-- table: {n} -->\n<!-- /table -->\n" for n in ("rates", "gap")),
            "gap: is missing, but ",
        ),
    ],
)
def test_markers(page, text, told):
    write(page.data, *rates_runs())
    page.path.write_text(text)
    with pytest.raises(WadiError) as error:
        page.main()
    assert told in str(error.value)
    assert str(page.path) in str(error.value)
    assert page.text == text
    assert not (page.path.parent / "images").exists()


# --- files ---


def changed(path, *keys, value=None, remove=False):
    data = json.loads(path.read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    if remove:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("label",), ..., "label is missing"),
        (("curve", 1, "step"), ..., "curve[1].step is missing"),
        (("figures", "alignment"), math.nan, "figures.alignment is nan, not a finite number"),
        (("figures",), None, "status is 'finished', but figures are null"),
        (("status",), "not finite", "status is 'not finite', but figures are given"),
        (("suite",), "ranks", "suite is 'ranks', its place says 'rates'"),
        (("network_parameters",), 0, "numbers of parameters must be positive"),
        # fits the form, not the others
        (("prompts",), "test", "prompts is test, of other runs of its table selection"),
        (("config", "max_train_steps"), 7, "config.max_train_steps is 7"),
        (("config", "student_learning_rate"), 3e-4, "has the seed of lora-1e-04"),
    ],
)
def test_bad_files(page, keys, value, told):
    """One line that names the file, and the page stays as it was."""
    write(page.data, *rates_runs())
    page.write("rates")
    before, path = page.text, page.data / "rates" / "lora-1e-04.json"
    changed(path, *keys, value=value, remove=value is ...)
    with pytest.raises(WadiError) as error:
        page.main()
    assert told in str(error.value)
    assert "rates/lor" in str(error.value)
    assert "\n" not in str(error.value)
    assert page.text == before


def test_the_page_says_what_the_files_say(evidence, capsys):
    docs = SCRIPT.parents[1] / "docs"
    options = evidence.Options(
        docs / "evidence.md", docs / "results" / "ablation", docs / "images", check=True
    )
    assert (evidence.main(options), capsys.readouterr().err) == (0, "")
