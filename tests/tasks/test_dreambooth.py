"""DreamBooth: the loss, what is trained and what not, exact resuming, adapters stacked on a student."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from PIL import Image

from tests.tiny import mark_student, tiny_pipeline, tiny_pixart, tiny_sdxl
from wadi.errors import WadiError
from wadi.files import load_tensors, read_json
from wadi.onestep import StudentPipeline, export_pipeline
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks.dreambooth import class_prompts, dreambooth, load_with_adapters
from wadi.tasks.dreambooth_config import DreamBoothConfig
from wadi.tasks.dreambooth_training import DreamBooth, dreambooth_loss
from wadi.tasks.exemplars import read_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of one pattern."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        pixels = np.zeros((16 + 4 * i, 20, 3), np.uint8)
        pixels[4:12, 4:12] = (200, 40 * i, 20)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(teacher_folder, pictures, tmp_path):
    return DreamBoothConfig(
        pictures,
        tmp_path / "run",
        str(teacher_folder),
        class_prompt="a cat",
        num_class_images=3,
        num_inference_steps=2,
        rank=2,
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=1e-2,
        device="cpu",
    )


def training(config, pipeline=None):
    pipeline = pipeline or StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path)
    prompts = class_prompts(config)
    painted = [Image.new("RGB", (16, 16), (i, 90, 30)) for i in range(len(prompts))]
    return DreamBooth(config, pipeline, read_images(config.instance_data_dir), painted, prompts)


# --- mathematics ---


def test_loss_is_that_of_the_paper():
    p, target = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    square = (p - target).double().pow(2)
    expected = square[:2].mean() + 0.7 * square[2:].mean()
    torch.testing.assert_close(dreambooth_loss(p, target, 2, 0.7).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(dreambooth_loss(p, target, 5, 0.7).double(), square.mean(), rtol=1e-5, atol=0)


# --- training ---


@pytest.mark.parametrize(("method", "train_text_encoder"), [("lorad", False), ("lora", True)])
def test_only_the_adapter_is_trained(config, method, train_text_encoder):
    config = dataclasses.replace(config, method=method, train_text_encoder=train_text_encoder)
    run = training(config)
    before = {name: p.clone() for name, p in run.backbone.pipeline.unet.named_parameters()}
    run.step(0)
    changed = {n for n, p in run.backbone.pipeline.unet.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(f"{method}_" in name for name in changed)
    assert any(name.startswith("text_encoder.") for name in run.parameters) == train_text_encoder
    assert all(f"{method}_" in name for name in run.parameters)
    assert all(p.dtype == torch.float32 for p in run.parameters.values())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_first_loss_is_of_the_model_as_it_was(config, prediction_type):
    """The adapter starts as the identity: the loss is that of the plain U-Net on what the step draws."""
    pipeline = tiny_pipeline(prediction_type)
    run = training(config, tiny_pipeline(prediction_type))
    x0, prompts, noise, t = run._draw(0)
    assert prompts == ["a zwx"] * 2 + ["a cat"] * 2
    with torch.no_grad():
        states = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        noisy = pipeline.scheduler.add_noise(x0, noise, t)
        predicted = pipeline.unet(noisy, t, states).sample
    velocity = pipeline.scheduler.get_velocity if prediction_type == "v_prediction" else None
    target = velocity(x0, noise, t) if velocity else noise
    square = (predicted - target).pow(2)
    torch.testing.assert_close(run.step(0), square[:2].mean() + square[2:].mean(), rtol=1e-4, atol=1e-5)


def test_the_loss_falls(config):
    run = training(dataclasses.replace(config, max_train_steps=20, rank=8, prior_loss_weight=0.0))
    losses = torch.stack([run.step(0) for _ in range(20)])  # the same draw again and again
    assert losses[-1] < 0.9 * losses[0]


def test_randomness_is_of_seed_and_step(config):
    run, other = training(config), training(dataclasses.replace(config, seed=1))
    for a, b in zip(run._draw(3), run._draw(3), strict=True):
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    assert not torch.equal(run._draw(3)[2], run._draw(4)[2])
    assert not torch.equal(run._draw(3)[2], other._draw(3)[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [(tiny_pixart, "the text encoder is a T5EncoderModel"), (tiny_sdxl, ".*XLPipeline has several text enc")],
)
def test_other_models_learn_a_subject_too(config, make, message):
    run = training(config, make())
    assert run.step(0).isfinite()
    with pytest.raises(WadiError, match=f"--train-text-encoder: {message}"):
        training(dataclasses.replace(config, train_text_encoder=True), make())


def test_the_rate_falls_to_zero_in_the_last_part(config):
    run = training(dataclasses.replace(config, max_train_steps=4, lr_decay_fraction=0.5))
    rates = []
    for step in range(4):
        run.step(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-2, 5e-3])


# --- the whole command, and going on ---


@pytest.mark.parametrize("method", ["lorad", "lora"])
def test_run_folder(config, method):
    config = dataclasses.replace(config, method=method, train_text_encoder=method == "lorad")
    run = dreambooth(config)
    assert len(list((run / "class").glob("*.png"))) == 3
    assert Image.open(run / "before-after.png").width > 4 * 128
    assert read_json(run / "adapter" / "adapter_config.json")["peft_type"] == method.upper()
    assert str(config.pretrained_model_name_or_path) not in "".join(
        path.read_text() for path in (run / "adapter").rglob("*.json")
    )
    # the pipeline is the model with the adapter in place
    stock = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    teacher = StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path)
    adapted = PeftModel.from_pretrained(teacher.unet, run / "adapter")
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected, found = adapted(x, 7, states).sample, stock.unet(x, 7, states).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    fresh = StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path)
    assert not torch.allclose(found, fresh.unet(x, 7, states).sample, atol=1e-4)
    same_text = all(
        torch.equal(a, b)
        for a, b in zip(fresh.text_encoder.parameters(), stock.text_encoder.parameters(), strict=True)
    )
    assert same_text == (method == "lora")


def test_ctrl_c_saves_and_the_run_goes_on_exactly(config, teacher_folder, monkeypatch, capsys):
    whole = dreambooth(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    step = DreamBooth.step

    def interrupted(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(DreamBooth, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        dreambooth(config)
    assert stop.value.code == 130
    assert "--resume" in capsys.readouterr().out
    assert [path.name for path in (config.output_dir / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(DreamBooth, "step", step)
    again = DreamBoothConfig(config.instance_data_dir, config.output_dir, resume=True, device="cpu")
    resumed = dreambooth(dataclasses.replace(again, pretrained_model_name_or_path=str(teacher_folder)))
    a, b = (load_tensors(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(WadiError, match=r"--learning-rate: the run was started with 0.01, it cannot go on"):
        dreambooth(dataclasses.replace(config, resume=True, learning_rate=1.0))
    with pytest.raises(WadiError, match="was written by wadi dreambooth before; go on with --resume"):
        dreambooth(config)


def test_an_infinite_loss_is_told(config, monkeypatch):
    monkeypatch.setattr(DreamBooth, "step", lambda self, step: torch.tensor(float("nan")))
    with pytest.raises(WadiError, match="the loss is nan; lower --learning-rate"):
        training(config).train()


# --- stacked on a student ---


def adapter(teacher_folder, folder, kind, seed):
    """An adapter folder that turns, or changes, a good deal; made by the room itself."""
    config = DreamBoothConfig(Path("unused"), method=kind, rank=2, prior_loss_weight=0.0, device="cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder)
    run = DreamBooth(config, pipeline, [Image.new("RGB", (16, 16))], [], [])
    generator = torch.Generator().manual_seed(seed)
    for p in run.parameters.values():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    run.network.save_pretrained(folder)
    return folder


def state(pipeline):
    return pipeline.pipeline.unet.state_dict()


def test_angles_of_student_and_subject_add(teacher_folder, tmp_path):
    student = adapter(teacher_folder, tmp_path / "student", "lorad", 1)
    subject = adapter(teacher_folder, tmp_path / "subject", "lorad", 2)
    mark_student(student, alpha_T_squared=0.0047)
    stacked = StudentPipeline.from_pretrained(teacher_folder, [student, subject])
    turned = StudentPipeline.from_pretrained(teacher_folder, [subject, student])
    export_pipeline(teacher_folder, student, tmp_path / "exported")
    later = StudentPipeline.from_pretrained(tmp_path / "exported", subject)
    # independently: both adapters active at once in PEFT, their angles summed before anything turns
    unet = StableDiffusionPipeline.from_pretrained(teacher_folder).unet
    both = PeftModel.from_pretrained(unet, student, "student")
    both.load_adapter(subject, "subject")
    both.base_model.set_adapter(["student", "subject"])
    expected = both.merge_and_unload().state_dict()
    for pipeline in (stacked, turned, later):
        for name, tensor in state(pipeline).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        assert abs(float(pipeline.pipeline.scheduler.alphas_cumprod[-1]) - 0.0047) < 1e-6
    alone = state(StudentPipeline.from_pretrained(teacher_folder, student))
    assert any(not torch.allclose(alone[name], expected[name], atol=1e-2) for name in expected)


def test_lora_and_lorad_are_merged_in_the_order_given(teacher_folder, tmp_path):
    student = adapter(teacher_folder, tmp_path / "student", "lorad", 1)
    subject = adapter(teacher_folder, tmp_path / "subject", "lora", 2)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    W = StableDiffusionPipeline.from_pretrained(teacher_folder).unet.get_submodule(name).weight.detach()
    prefix = f"base_model.model.{name}"
    lora = load_tensors(subject / "adapter_model.safetensors")
    lorad = load_tensors(student / "adapter_model.safetensors")
    change = lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
    theta = lorad[f"{prefix}.lorad_A"] @ lorad[f"{prefix}.lorad_B"]

    def turn(weight):
        o, e = weight[:, 0::2], weight[:, 1::2]
        pairs = torch.stack([o * theta.cos() - e * theta.sin(), o * theta.sin() + e * theta.cos()], 2)
        return pairs.flatten(1)

    for order, expected in (([student, subject], turn(W) + change), ([subject, student], turn(W + change))):
        found = state(StudentPipeline.from_pretrained(teacher_folder, order))[f"{name}.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_on_a_model_of_many_steps(teacher_folder, tmp_path):
    folders = [adapter(teacher_folder, tmp_path / str(seed), "lorad", seed) for seed in (1, 2)]
    many = load_with_adapters(str(teacher_folder), folders)
    one = load_for_steps(teacher_folder, folders)
    for name, tensor in many.unet.state_dict().items():
        assert torch.equal(tensor, one.unet.state_dict()[name])
    assert type(many.scheduler) is not type(one.scheduler)


# --- pictures and prompts ---


def test_pictures_are_upright_and_on_white(tmp_path):
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "a.png")
    sideways = Image.new("RGB", (8, 4), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    sideways.save(tmp_path / "b.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("not a picture")
    first, second = read_images(tmp_path)
    assert first.getpixel((0, 0)) == (255, 0, 0)
    assert first.getpixel((5, 2)) == (255, 255, 255)
    assert (first.size, second.size) == ((8, 4), (4, 8))


def test_prior_prompts_are_drawn_from_the_file(config, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(50)))
    many = dataclasses.replace(config, class_prompt=None, prior_prompts=file, num_class_images=20)
    drawn = class_prompts(many)
    assert len(set(drawn)) == 20
    assert drawn == class_prompts(many)
    assert drawn != class_prompts(dataclasses.replace(many, seed=1))
    assert class_prompts(config) == ["a cat"] * 3
    assert class_prompts(dataclasses.replace(config, prior_loss_weight=0.0)) == []


def test_mistakes_are_told(config, tmp_path):
    def told(match, **changes):
        with pytest.raises(WadiError, match=match):
            dreambooth(dataclasses.replace(config, **changes))
        assert not config.output_dir.exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    told("nowhere: no such folder", instance_data_dir=tmp_path / "nowhere")
    told("empty: has no images", instance_data_dir=tmp_path / "empty")
    told("a.png: could not read the image: it is none of PNG", instance_data_dir=tmp_path / "broken")
    told("--class-prompt: say what the subject is", class_prompt=None)
    told("--instance-prompt: 1 of 1 prompts are longer", instance_prompt="a zwx" * 20)
    told("--pretrained-model-name-or-path: is required", pretrained_model_name_or_path=None)
    told("not a run of wadi dreambooth", resume=True)
    for name, value in (("rank", 0), ("learning_rate", -1.0), ("prior_loss_weight", -1.0)):
        told(f"--{name.replace('_', '-')}", **{name: value})
    told("--lr-decay-fraction", lr_decay_fraction=2.0)
    told("fp16 needs a GPU", mixed_precision="fp16")
