"""The benchmark of large sets runs, and its table says what its JSON says."""

import json

import prompt_sets
import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for the CPU")
def test_tiny_run(tmp_path, capsys):
    out = tmp_path / "sets.json"
    prompt_sets.main(
        prompt_sets.Options(model="tiny", count=5000, updates=1, max_train_steps=8, batch_size=2, out=out)
    )
    row = json.loads(out.read_text())["row"]
    shown = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert shown[0] == str(row["prompts"]) == "5000"
    assert float(shown[2]) == pytest.approx(row["milliseconds_encoded_beside"], abs=0.06)
    assert float(shown[3]) == pytest.approx(row["milliseconds_encoded_before"], abs=0.06)
    assert 0 <= row["share_waited"] < 1
    assert row["prompts_encoded_a_second"] > 0
