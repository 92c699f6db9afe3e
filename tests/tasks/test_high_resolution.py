"""Re-dilated convolutions: what they compute, that nothing of them stays, and that objects repeat less."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.tiny import tiny_pipeline, tiny_pixart
from wadi.cli import main
from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import sample_captions, stated
from wadi.emoji.judge import Judge, attributes_right
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import StudentPipeline
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks import growth, redilated
from wadi.tasks.high_resolution import inner_convolutions, tell_larger

STATES = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def unet():
    return tiny_pipeline().unet.eval()


@pytest.fixture(scope="module")
def student():
    return load_for_steps(teacher_folder(), student_folder(), 1)


@torch.no_grad()
def predict(unet, height=16, width=16):
    x = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))
    return unet(x, torch.tensor([999]), STATES).sample


def trace(unet):
    """Everything that a block could leave behind."""
    return {
        name: (dict(vars(module)), module._forward_hooks.copy(), module._forward_pre_hooks.copy())
        for name, module in unet.named_modules()
    }


def spread(kernel, dilation):
    """The kernel with zeros between its taps: what dilation means."""
    out, into, _, _ = kernel.shape
    rows, columns = dilation
    wide = torch.zeros(out, into, 2 * rows + 1, 2 * columns + 1)
    wide[:, :, ::rows, ::columns] = kernel
    return wide


@pytest.mark.parametrize("factor", [2.0, 3.0, (2.0, 1.0), (1.0, 3.0)])
def test_a_convolution_reaches_as_many_times_as_far(unet, factor):
    dilation = tuple(map(int, factor)) if isinstance(factor, tuple) else (int(factor),) * 2
    x = torch.randn(2, 32, 9, 12)
    with redilated(unet, factor) as names, torch.no_grad():
        assert "mid_block.resnets.0.conv1" in names
        conv = unet.mid_block.resnets[0].conv1
        found = conv(x)
        expected = F.conv2d(x, spread(conv.weight, dilation), conv.bias, padding=dilation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_twice_the_size_of_an_input_gives_twice_the_size_of_the_output(unet):
    """conv stretched by s, of an input whose pixels are s times as large, is the plain output so enlarged."""
    conv, x = unet.mid_block.resnets[0].conv1, torch.randn(1, 32, 5, 6)
    with torch.no_grad():
        small = conv(x)
        for factors in ((2, 2), (3, 1), (1, 4)):
            with redilated(unet, tuple(map(float, factors))):
                large = conv(x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3))
            enlarged = small.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
            torch.testing.assert_close(large, enlarged, rtol=1e-4, atol=1e-5)


def test_a_factor_between_stretches_convolves_and_shrinks(unet):
    conv, x = unet.mid_block.resnets[0].conv1, torch.randn(1, 32, 12, 9)
    with redilated(unet, 1.5), torch.no_grad():
        found = conv(x)
    wide = F.interpolate(x, size=(16, 12), mode="bilinear", align_corners=False)
    wide = F.conv2d(wide, spread(conv.weight, (2, 2)), conv.bias, padding=2)
    expected = F.interpolate(wide, size=(12, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_only_inner_levels_are_stretched(unet):
    names = set(inner_convolutions(unet))
    assert names == {
        f"{block}.conv{i}"
        for i in (1, 2)
        for block in (
            "down_blocks.1.resnets.0",
            "mid_block.resnets.0",
            "mid_block.resnets.1",
            "up_blocks.0.resnets.0",
            "up_blocks.0.resnets.1",
        )
    }
    assert len(inner_convolutions(unet, 0)) == len(names) + 6


@pytest.mark.parametrize("damping", [0.0, 0.25])
@pytest.mark.parametrize("factor", [2.0, 1.5])
def test_nothing_stays_behind(unet, factor, damping):
    before, plain = trace(unet), predict(unet)
    with redilated(unet, factor, damping=damping):
        assert not torch.equal(predict(unet), plain)
    assert trace(unet) == before
    with pytest.raises(ZeroDivisionError), redilated(unet, factor, damping=damping):
        raise ZeroDivisionError
    assert trace(unet) == before
    assert torch.equal(predict(unet), plain)


@pytest.mark.parametrize("factor", [2.0, 1.5])
def test_damping_mixes_in_the_plain_prediction(unet, factor):
    plain = predict(unet)
    with redilated(unet, factor):
        stretched = predict(unet)
    with redilated(unet, factor, damping=0.25), torch.no_grad():
        mixed = predict(unet)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(unet(x, torch.tensor([999]), STATES, return_dict=False)[0], mixed)
    torch.testing.assert_close(mixed, 0.75 * stretched + 0.25 * plain, rtol=1e-4, atol=1e-5)


def test_no_growth_is_no_change(unet):
    plain = predict(unet)
    with redilated(unet, 1.0) as names:
        assert names == []
        assert torch.equal(predict(unet), plain)


def test_growth_is_of_the_models_own_size(student):
    assert growth(student, 128, None) == (2.0, 1.0)
    assert growth(student, 32, 96) == (1.0, 1.5)
    assert growth(tiny_pixart(), 4096, 4096) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"factor": 0.5}, "factor: must be at least 1, but is 0.5"),
        ({"factor": float("nan")}, "factor: must be at least 1"),
        ({"factor": 2.0, "damping": 1.0}, "damping: must be at least 0 and less than 1"),
        ({"factor": 2.0, "outer_levels": 2}, "outer_levels: must be from 0 to 1"),
    ],
)
def test_what_cannot_be_is_told(unet, options, told):
    with pytest.raises(WadiError, match=told), redilated(unet, **options):
        pass


def test_twice_is_told(unet):
    with redilated(unet, 2.0), pytest.raises(WadiError, match="stretched already"), redilated(unet, 2.0):
        pass


def test_objects_repeat_less_and_are_more_often_right(student):
    """For real: 24 captions of one object at twice the size, read by the judge at its own."""
    captions = [c for c in sample_captions(60, "selection") if len(c.emoji) == 1][:24]
    texts, aligned = [caption.text for caption in captions], {}
    for name, factor in (("plain", 1.0), ("redilated", 2.0)):
        with redilated(student.unet, factor):
            large = student(
                texts,
                num_inference_steps=1,
                guidance_scale=1.0,
                height=128,
                width=128,
                generator=[torch.Generator().manual_seed(seed) for seed in range(len(texts))],
                output_type="pt",
            ).images
        aligned[name] = share_right(F.interpolate(large, size=64, mode="area"), captions)
    assert aligned["redilated"] > aligned["plain"] + 0.15


@pytest.mark.parametrize(
    ("height", "width", "told"),
    [(None, None, 0), (64, 64, 0), (32, None, 0), (96, None, 1), (None, 72, 1), (32, 128, 1)],
)
def test_a_larger_image_is_told_to_be_poor(student, recwarn, height, width, told):
    tell_larger(student, height, width)
    messages = [str(w.message) for w in recwarn if issubclass(w.category, WadiWarning)]
    assert len(messages) == told
    assert all("larger than those that the model was trained for" in message for message in messages)


def share_right(pictures, captions):
    judge = Judge.load(assets_folder() / "judge.safetensors")
    return attributes_right(judge.read(pictures), stated(captions))["all"].double().mean().item()


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["generate", "a big panda", "--height", "96", "--width", "128", "--seed", "3", "--device", "cpu"]
    for name, more in (("a.png", []), ("b.png", ["--no-redilate"]), ("c.png", ["--fast"])):
        assert main([*common, "--out", name, *more]) == 0
        assert capsys.readouterr().err.count("will be grainy") == 1
    pictures = {name: Image.open(f"{name}.png") for name in "abc"}
    assert pictures["a"].size == (128, 96)
    pipeline = StudentPipeline.from_pretrained(teacher_folder(), student_folder())
    with redilated(pipeline.pipeline.unet, (1.5, 2.0)):
        expected = pipeline("a big panda", seed=3, height=96, width=128)[0]
    assert pictures["a"].tobytes() == expected.tobytes()
    assert pictures["b"].tobytes() == pipeline("a big panda", seed=3, height=96, width=128)[0].tobytes()
    assert pictures["a"].tobytes() != pictures["b"].tobytes()
    a, c = (torch.frombuffer(bytearray(pictures[name].tobytes()), dtype=torch.uint8).int() for name in "ac")
    assert (a - c).abs().max() <= 1
