"""The experiment on grain: the teacher's picture is the equation's, and the rows count what they say."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from wadi.emoji import teacher_folder
from wadi.emoji.captions import parse_caption, stated
from wadi.emoji.judge import Reading
from wadi.errors import WadiError
from wadi.files import read_json
from wadi.onestep.pipeline import load_for_steps

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def grain():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("grain")
    sys.path.remove(str(EXPERIMENTS))


def test_a_cleaned_latent_is_the_equations(grain):
    """alpha x0 + sigma n, and x0 again without the predicted noise, by diffusers' own scheduler."""
    teacher = load_for_steps(teacher_folder(), None, 25)
    x0, noise = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = teacher.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
    with torch.no_grad():
        found = grain.cleaned(teacher, x0, noise, text, 30)
        x_t = teacher.scheduler.add_noise(x0, noise, torch.tensor([30, 30]))
        eps = teacher.unet(x_t, 30, text).sample
    level = teacher.scheduler.alphas_cumprod[30].double()
    expected = (x_t.double() - (1 - level).sqrt() * eps.double()) / level.sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_count_what_was_mended_and_kept(grain):
    captions = [parse_caption("a cat")] * 4
    own = stated(captions)["emoji"]

    def reading(right):
        emoji = own.clone()
        emoji[:, 0] += (~torch.tensor(right)).long()
        score = torch.tensor([1.0, 0.0]).expand(4, 2)
        center, size = torch.full((4, 2, 2), 0.5), torch.full((4, 2), 0.4)
        return Reading(emoji, score, center, size, torch.tensor([0, 1, 2, 3]), torch.zeros(4, 128))

    shown = ([True, True, False, False], [True, True, True, False], [True, False, True, True], [False] * 4)
    rows = grain.figures([reading(right) for right in shown], captions)
    assert [row["name"] for row in rows] == list(grain.PARTS)
    assert [row["alignment"] for row in rows] == [0.5, 0.75, 0.75, 0.0]
    assert [row["mended"] for row in rows] == [0.0, 0.5, 1.0, 0.0]
    assert [row["kept"] for row in rows] == [1.0, 1.0, 0.5, 0.0]
    assert rows[0]["background_entropy"] == pytest.approx(2.0)


def test_it_runs(grain, tmp_path, capsys):
    out = tmp_path / "grain.json"
    grain.main(grain.Options(samples=6, batch_size=4, device="cpu", out=out))
    rows = read_json(out)["rows"]
    assert [row["name"] for row in rows] == list(grain.PARTS)
    assert rows[0]["kept"] == 1.0
    assert capsys.readouterr().out.count("alignment") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 0}, "--samples"), ({"block_size": 1}, "--block-size"), ({"timestep": 1000}, "--timestep")],
)
def test_bad_options_are_one_line(grain, options, message):
    with pytest.raises(WadiError, match=message):
        grain.main(grain.Options(**options))
