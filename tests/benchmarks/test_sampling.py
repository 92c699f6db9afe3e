"""The benchmark runs, its model is the one that it names, and its table says what its JSON says."""

import json

import pytest
import sampling
import torch


def test_tiny_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "STEPS", 2)
    out = tmp_path / "sampling.json"
    options = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--batch", "2", "--repeats", "3"]
    sampling.main(sampling.parse([*options, "--out", str(out)]))
    report = json.loads(out.read_text())
    names = [row["name"] for row in report["rows"]]
    assert len(names) == len(set(names)) == 6
    shown = capsys.readouterr().out
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][-6:]
    assert [cells[0].removeprefix("| ") for cells in rows] == names
    for row, cells in zip(report["rows"], rows, strict=True):
        assert float(cells[1]) == pytest.approx(row["batch_1"]["milliseconds"], abs=0.006)
        ratio = report["rows"][0]["batch_1"]["milliseconds"] / row["batch_1"]["milliseconds"]
        assert float(cells[3]) == pytest.approx(ratio, abs=0.06)
        larger = row["batch_2"]
        assert larger["images_a_second"] == pytest.approx(2000 / larger["milliseconds"])
        assert larger["calls"] == 3
    assert report["torch"] == torch.__version__
    assert report["pixels"] == 16


def test_it_is_stable_diffusion_1_5():
    """Parameter counts as published: U-Net 859.5 M, VAE 83.7 M, CLIP ViT-L/14's text encoder 123.1 M."""
    pipeline, tiny_vae = sampling.build("sd15", "meta", torch.bfloat16)
    counts = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, tiny_vae)
    ]
    assert counts == [859_520_964, 83_653_863, 123_060_480, 2_445_063]
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 512
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
