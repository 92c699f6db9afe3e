"""Students that are not LoRaD: what is trained, and that the pipeline holds exactly it."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.distill.test_processes import config
from tests.distill.test_trainer import make
from wadi.backbones import student_config
from wadi.distill import DistillConfig, distill
from wadi.distill.methods import merged_state, method_config
from wadi.distill.roles import build_roles, trainable
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.onestep import load_pipeline


@pytest.fixture(scope="module")
def options(teacher_folder, tmp_path_factory):
    return config(teacher_folder, tmp_path_factory.mktemp("methods")).replace(
        max_train_steps=2,
        validation_steps=0,
        student_learning_rate=1e-2,
    )


def run(options, folder, **changes):
    return distill(options.replace(output_dir=str(folder), **changes))


def merged(weight, method, tensors, layer):
    """The weight that an adapter's tensors make, from its paper."""
    if method == "full":
        return tensors[f"{layer}.weight"]
    A, B = (tensors[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    return weight + B @ A


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_pipeline_is_the_averaged_student(options, tmp_path, method):
    folder = run(options, tmp_path / "run", student_method=method)
    average = load_tensors(folder / "checkpoints/step-000002/ema.safetensors")
    teacher = load_pipeline(options.model.pretrained_model_name_or_path).unet
    student = load_pipeline(folder / "pipeline").unet
    assert not any(isinstance(module, BaseTunerLayer) for module in student.modules())
    assert not (folder / "adapter").exists()
    layers = sorted(student_config(teacher, 2).target_modules)
    changed = 0
    for layer in layers:
        before, after = (network.get_submodule(layer).weight for network in (teacher, student))
        torch.testing.assert_close(after, merged(before, method, average, layer), rtol=1e-5, atol=1e-6)
        changed += not torch.equal(before, after)
    assert changed > len(layers) / 2
    others = {
        name: torch.equal(tensor, student.state_dict()[name])
        for name, tensor in teacher.state_dict().items()
        if name.removesuffix(".weight") not in layers
    }
    # an adapter leaves everything else alone; full fine-tuning moves biases, norms and convolutions too
    assert all(others.values()) if method != "full" else not any(others.values())


@pytest.mark.parametrize(("student", "fake"), [("lorad", "full"), ("lora", "lorad"), ("full", "lora")])
def test_all_start_as_the_teacher_and_leave_it_alone(teacher_folder, student, fake):
    base = load_pipeline(teacher_folder).unet
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    like = student_config(base, 2)
    roles = build_roles(base, method_config(student, like), method_config(fake, like), seed=0)
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 16)
    expected = roles.teacher(x, t, c).sample
    for network in (roles.student, roles.fake):
        torch.testing.assert_close(network(x, t, c).sample, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for parameter in trainable(network).values():
                parameter.add_(0.1)
        assert not torch.allclose(network(x, t, c).sample, expected, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert merged_state(roles.student, before).keys() == before.keys()


@pytest.mark.parametrize(("method", "share"), [("lorad", 2), ("lora", 1)])
def test_trainable_numbers_are_those_of_the_shapes(method, share):
    """A (out, r) and B (r, fan-in; LoRaD: half of it) in the linear layers of blocks."""
    ranks = {"student_rank": 2, "fake_rank": 4}
    trainer = make(student_method=method, fake_method=method, **ranks)
    expected = {"student": 0, "fake": 0}
    for name, module in trainer.backbone.network.named_modules():
        if isinstance(module, torch.nn.Linear) and "block" in name:
            for who in expected:
                expected[who] += ranks[f"{who}_rank"] * (len(module.weight) + module.in_features // share)
    for who, count in expected.items():
        assert sum(p.numel() for p in getattr(trainer, f"{who}_parameters").values()) == count


def test_a_full_student_resumes_the_same_bits(options, tmp_path):
    changes = {"student_method": "full", "fake_method": "lora"}
    whole = run(options, tmp_path / "whole", **changes)
    half = run(options, tmp_path / "half", max_train_steps=1, **changes)
    distill(DistillConfig.of(resume_from_checkpoint=str(half), max_train_steps=2))
    first, second = (load_tensors(r / "checkpoints/step-000002/ema.safetensors") for r in (whole, half))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_method": "full", "mixed_precision": "bf16"}, "use --mixed-precision no"),
        ({"fake_method": "full", "mixed_precision": "bf16"}, "use --mixed-precision no"),
        ({"student_method": "lora", "student_adapter": "x"}, "--student-adapter: is a LoRaD adapter"),
        ({"student_method": "lokr"}, "--student-method: must be one of lorad, lora, full"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(WadiError, match=message):
        DistillConfig.of(**changes)
