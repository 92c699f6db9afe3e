"""The experiment on grain runs, and its cleaned image is the one of the equation."""

import grain
import torch

from wadi.emoji import teacher_folder
from wadi.files import read_json
from wadi.onestep.pipeline import load_for_steps


def test_a_cleaned_latent_is_the_equations():
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


def test_it_runs(tmp_path, capsys):
    out = tmp_path / "grain.json"
    grain.main(grain.Options(samples=2, batch_size=2, device="cpu", out=out))
    rows = read_json(out)["rows"]
    assert [row["name"] for row in rows] == list(grain.PARTS)
    assert rows[0]["kept"] == 1.0
    assert capsys.readouterr().out.count("alignment") == 4
