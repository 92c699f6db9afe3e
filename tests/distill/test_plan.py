"""What a run needs, known from configurations alone, against what is then really there."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.teachers.original import save_original
from tests.test_cli import run
from tests.tiny import PROMPTS, tiny_pipeline, tiny_sd3, tiny_sdxl
from tests.tiny_flows import tiny_sana, tiny_z_image
from wadi.backbones import load_backbone, student_config
from wadi.backbones.outline import META, longest_condition, outline, outlined_encoders
from wadi.distill import DistillConfig, Trainer, make_accelerator
from wadi.distill.plan import GIB, announce, describe, make_plan, measure_speed, peak_line, warn_if_short
from wadi.distill.rehearsal import Ledger, fused_attention
from wadi.distill.roles import build_roles, trainable
from wadi.distill.update import Average, Update
from wadi.errors import WadiWarning
from wadi.prompts import encode_prompts

PIPELINES = {"sd": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "sana": tiny_sana}
NOT_CONFIGURATIONS = ("*.safetensors", "tokenizer.json", "*.txt")


@pytest.fixture(scope="module", params=PIPELINES)
def folders(request, tmp_path_factory):
    """A whole teacher, and the same without weights and vocabularies."""
    whole = tmp_path_factory.mktemp("planned") / "whole"
    PIPELINES[request.param]().save_pretrained(whole)
    return whole, shutil.copytree(
        whole, whole.with_name("configurations"), ignore=shutil.ignore_patterns(*NOT_CONFIGURATIONS)
    )


def config_of(folder, **options):
    common = {"student_rank": 3, "fake_rank": 2, "fake_layers": "student", "mixed_precision": "bf16"}
    return DistillConfig.of(pretrained_model_name_or_path=str(folder), **common | options)


@pytest.fixture(scope="module")
def planned(folders):
    return make_plan(config_of(folders[1]))


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_parameters_and_what_is_held_are_those_of_the_real_networks(folders, planned):
    backbone = load_backbone(folders[0], torch.bfloat16)
    network, config = backbone.network, planned.config
    base = size([*network.parameters(), *network.buffers()])
    roles = build_roles(network, student_config(network, 3), student_config(network, 2), 0)
    student, fake = trainable(roles.student), trainable(roles.fake)
    accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    updates = [Update(config.optimizer, accelerator, some, 1e-4) for some in (student, fake)]
    assert planned.rehearsal.parameters == {
        "network": sum(p.numel() for p in network.parameters()),
        "student": sum(p.numel() for p in student.values()),
        "fake": sum(p.numel() for p in fake.values()),
    }
    assert planned.rehearsal.held == {
        "frozen base": base,
        "adapters": size([*student.values(), *fake.values()]),
        "AdamW's moments": size(x for update in updates for x in update.moments().values()),
        "average": size(Average(student, 0.9).tensors.values()),
    }
    assert planned.image_size == backbone.image_size
    assert sum(planned.rehearsal.held.values()) == planned.held


def test_outlines_say_what_the_whole_pipelines_say(folders):
    whole, sketch = load_backbone(folders[0], torch.bfloat16), outline(folders[1], torch.bfloat16)
    assert sketch.latent_shape == whole.latent_shape
    assert (sketch.student_layers(), sketch.fake_layers()) == (whole.student_layers(), whole.fake_layers())
    shapes = [{k: (v.shape, v.dtype) for k, v in b.network.state_dict().items()} for b in (whole, sketch)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in sketch.network.parameters()} == {"meta"}
    with whole.text.loaded():
        for name, encoder in outlined_encoders(folders[1], sketch).items():
            real = getattr(whole.pipeline, name)
            assert size(encoder.parameters()) == size(real.parameters())


def test_conditions_have_the_shapes_of_encoded_prompts(folders):
    sketch = outline(folders[1], torch.bfloat16)
    expected = load_backbone(folders[0], torch.bfloat16).encode(["a red cat", "a blue dog"])
    found = longest_condition(sketch, outlined_encoders(folders[1], sketch), 2)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }


def test_every_part_of_a_step_needs_more_than_is_held(planned):
    found = planned.rehearsal
    gradients = 4 * found.parameters["student"]
    assert found.student > gradients
    assert found.fake > 4 * found.parameters["fake"]
    assert planned.most == max(planned.peaks.values()) > planned.held > found.held["frozen base"]
    assert found.student_work.operations > found.fake_work.operations > 0


def test_memory_and_work_follow_the_options(teacher_folder):
    def of(**options):
        return make_plan(config_of(teacher_folder, validation_steps=0, **options))

    one = of(train_batch_size=2)
    twice, recomputed = of(train_batch_size=4), of(train_batch_size=2, gradient_checkpointing=True)
    gradients = 4 * one.rehearsal.parameters["student"]
    assert 1.7 < (twice.rehearsal.student - gradients) / (one.rehearsal.student - gradients) < 2.1
    assert recomputed.rehearsal.student < one.rehearsal.student
    assert recomputed.operations > 1.1 * one.operations
    assert one.grid == 0
    spread = make_plan(one.config.replace(shard_base=True), processes=4).rehearsal.held
    assert spread["frozen base"] == one.rehearsal.held["frozen base"] // 4
    assert 0 < spread.pop("gathered blocks") < one.rehearsal.held["frozen base"]
    assert spread.keys() == one.rehearsal.held.keys()
    # the longest roll-out: three more steps without gradient
    four = of(train_batch_size=2, student_steps=4)
    assert four.operations > 1.1 * one.operations
    assert one.rehearsal.student <= four.rehearsal.student < 1.2 * one.rehearsal.student
    student, fake = one.rehearsal.student_work.operations, one.rehearsal.fake_work.operations
    longer = replace(one, config=one.config.replace(gradient_accumulation_steps=3, fake_updates=2))
    assert longer.operations == 3 * (student + 2 * fake)


def test_a_ledger_counts_what_is_alive():
    ledger = Ledger()
    with ledger:
        a = torch.empty(256, device=META)
        b = a + 1
        view = b.view(16, 16)
        with ledger.part() as found:
            c = (view * 2) @ view
            del c
        assert (ledger.live, found.peak) == (2 * 1024, 2 * 1024)
        assert found.work.operations == 2 * 16**3
        del b
        assert ledger.live == 2 * 1024  # its view holds it
        del view
    assert ledger.live == 1024
    assert a.shape == (256,)


def test_operations_are_those_that_torch_counts():
    with META:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
        x = torch.empty(2, 3, 8, 8)
    counter, ledger = FlopCounterMode(display=False), Ledger()
    with counter:
        network(x).sum().backward()
    with ledger, ledger.part() as found:
        network(x).sum().backward()
    assert found.work.operations == counter.get_total_flops() > 0


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_attention_does_not_write_all_pairs(mask):
    with META:
        q = torch.empty(1, 2, 512, 8, requires_grad=True)
        bias = None if mask is None else torch.empty(1, 1, 1, 512, dtype=mask)
    ledger = Ledger()
    ledger.hold([q, bias])
    with ledger, fused_attention(), ledger.part() as found:
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias).sum().backward()
    assert found.peak < 512 * 512 * 4
    assert q.grad.shape == q.shape


def test_the_command_prints_a_plan_and_writes_nothing(teacher_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("distill", "--plan", "--teacher", teacher_folder, "--student-rank", 2, "--fake-rank", 2) == 0
    printed = capsys.readouterr()
    assert "StableDiffusionPipeline" in printed.out
    for part in ("frozen base", "adapters", "AdamW's moments", "average", "activations", "TFLOP"):
        assert part in printed.out
    assert not printed.err
    assert not list(tmp_path.iterdir())


def test_a_single_file_is_planned_by_its_configurations(teacher_folder, tmp_path, capsys):
    file = save_original(tiny_pipeline(), tmp_path / "model.safetensors")
    own = ["--teacher", file, "--teacher-config", teacher_folder, "--student-rank", 2, "--fake-rank", 2]
    assert run("distill", "--plan", *own) == 0
    printed = capsys.readouterr().out
    assert run("distill", "--plan", *own, "--text-encoder-device", "cpu") == 0
    assert "encoding of prompts" in printed
    assert "encoding of prompts" not in capsys.readouterr().out


def test_a_plan_says_in_one_line_what_is_missing(tmp_path, capsys, teacher_folder):
    tiny_z_image().save_pretrained(tmp_path / "z")
    damaged = shutil.copytree(teacher_folder, tmp_path / "damaged")
    (damaged / "unet" / "config.json").write_text("{")
    for arguments, said in (
        ([], "--teacher: is required"),
        (["--preset", "sdxl"], "stabilityai/stable-diffusion-xl-base-1.0: there is no such folder"),
        (["--teacher", tmp_path / "none"], "no such folder"),
        (["--teacher", damaged], "unet"),
        (["--teacher", teacher_folder, "--student-rank", 4096], "--student-rank 4096"),
        (["--teacher", tmp_path / "z", "--cuda-graphs"], "--cuda-graphs: the network of a ZImagePipeline"),
        (["--teacher", teacher_folder, "--preset", "sdxl"], "--preset sdxl: is for a StableDiffusionXL"),
    ):
        assert run("distill", "--plan", *arguments) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert len(printed.err.splitlines()) == 1
        assert not printed.out


def test_a_run_that_does_not_fit_is_told_and_goes_on(planned):
    with pytest.warns(WadiWarning, match=r"needs about .* are free"):
        warn_if_short(planned, planned.most - 1)
    warn_if_short(planned, planned.most)


def test_the_line_of_a_run(teacher_folder, capsys):
    plan = announce(config_of(teacher_folder), torch.device("cpu"))
    assert capsys.readouterr().out.count("\n") == 1
    assert peak_line(plan, 3 * GIB).startswith("memory: 3.00 GiB allocated")
    assert announce(config_of("nobody/nothing"), torch.device("cpu")) is None


def test_time_follows_the_speed_of_a_device(planned):
    speed = measure_speed(torch.device("cpu"), torch.float32, side=64)
    assert min(speed.operations, speed.traffic, speed.launches) > 0
    slower = type(speed)(speed.operations / 2, speed.traffic / 2, speed.launches / 2)
    assert planned.seconds(slower) == pytest.approx(2 * planned.seconds(speed))
    assert " s\n" in describe(planned, GIB, speed)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_estimate_is_what_a_gpu_allocates(tmp_path, gradient_checkpointing):
    """Without the workspaces of cuBLAS and cuDNN, which the first of two steps allocates."""
    folder, wide = tmp_path / "teacher", tiny_pipeline(channels=(256, 512))
    wide.save_pretrained(folder)
    options = {"train_batch_size": 16, "gradient_checkpointing": gradient_checkpointing}
    config = config_of(folder, validation_steps=0, **options)
    plan = make_plan(config)
    accelerator = make_accelerator(config)
    before = torch.cuda.memory_allocated()
    backbone = load_backbone(folder, torch.bfloat16, accelerator.device)
    trainer = Trainer(config, backbone, encode_prompts(backbone.text, PROMPTS, []), accelerator)
    trainer.step(0)
    torch.cuda.synchronize()
    workspaces = torch.cuda.memory_allocated() - before - plan.held
    torch.cuda.reset_peak_memory_stats()
    trainer.step(1)
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before - workspaces
    assert max(plan.peaks["update of the student"], plan.held) == pytest.approx(measured, rel=0.15)
