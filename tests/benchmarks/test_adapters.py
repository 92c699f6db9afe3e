"""What the benchmarks of adapters and of the iteration compare is what they say it is."""

import json

import adapters
import iteration
import pytest
import torch
from published import NETWORKS, make_network
from torch import nn

from wadi.backbones import student_config
from wadi.lorad.rotation import Factors, rotated_linear


def test_forward_hook_computes_lorad():
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 6), torch.randn(3, 10)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    hook = adapters.HookAdapter(layer, r=2)
    nn.init.normal_(hook.A)
    ours = rotated_linear(x, weight, bias, [Factors(hook.A, hook.B)])
    torch.testing.assert_close(layer(x), ours)
    assert (ours - nn.functional.linear(x, weight, bias)).abs().max() > 0.1


def test_lora_gets_as_many_parameters():
    """Rank 198 on the 182 layers of SD 1.5: 83.62 M beside LoRaD's 83.80 M."""
    with torch.device("meta"):
        network = make_network("sd15")
    names = set(student_config(network).target_modules)
    assert adapters.equal_rank(network, names, 83_795_968) == 198
    shapes = [module.weight.shape for name, module in network.named_modules() if name in names]
    assert sum(198 * (out + fan_in) for out, fan_in in shapes) == pytest.approx(83.62e6, abs=5e3)


def test_plain_iteration_holds_three_networks():
    options = iteration.Options(model="tiny", device="cpu")
    plain = iteration.Plain(options, batch=1, checkpointing=False)
    pointers = [
        {parameter.data_ptr() for parameter in network.parameters()}
        for network in (plain.teacher, plain.student, plain.fake)
    ]
    assert not pointers[0] & pointers[1]
    assert not pointers[1] & pointers[2]
    before = [adapter.A.detach().clone() for adapter in (*plain.student_hooks, *plain.fake_hooks)]
    plain()
    plain()
    after = [adapter.A for adapter in (*plain.student_hooks, *plain.fake_hooks)]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_tables(tmp_path, capsys, monkeypatch):
    small = {
        "block_out_channels": (16,),
        "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    kind, config = NETWORKS["tiny"]
    monkeypatch.setitem(NETWORKS, "tiny", (kind, config | small))
    monkeypatch.setattr(iteration, "CHAIN", 1)
    common = {"model": "tiny", "batch_sizes": (1,), "repeats": 1, "device": "cpu"}
    adapters.main(adapters.Options(methods=("lorad", "full"), out=tmp_path / "a.json", **common))
    report = json.loads((tmp_path / "a.json").read_text())
    network = make_network("tiny")
    names = set(student_config(network).target_modules)
    shapes = [module.weight.shape for name, module in network.named_modules() if name in names]
    lorad = sum(adapters.RANKS["tiny"] * (out + fan_in // 2) for out, fan_in in shapes)
    assert [row["trainable"] for row in report["steps"][:2]] == [lorad, network.num_parameters()]
    error = report["rotation"]["relative_error"]
    # half a unit of 8 bits; 24 bits
    assert error["bfloat16"] < 3e-3
    assert error["float32"] < 1e-6
    iteration.main(iteration.Options(out=tmp_path / "i.json", gradient_checkpointing=(False,), **common))
    (row,) = json.loads((tmp_path / "i.json").read_text())["rows"]
    ratio = row["plain"]["ms"] / row["ours"]["ms"]
    assert f"| {ratio:.2f} x |" in capsys.readouterr().out
