"""Condition maps, ControlNets on one-step students, and the measure of agreement."""

import builtins
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from tests.tiny import tiny_pipeline
from wadi import cli, emoji
from wadi.emoji.captions import COLOURS
from wadi.emoji.glyphs import NAMES
from wadi.emoji.judge import Judge
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks import Sampling, condition_map, edge_map, load_controlnet, with_controlnets
from wadi.tasks.control import canny, edge_agreement, layout_map, one_for_each, steer


def square(side=16, low=4, high=12, colour=(255, 255, 255)):
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[low:high, low:high] = colour
    return Image.fromarray(pixels)


def tiny_controlnet(seed, **options):
    """A ControlNet that does something: its last convolutions are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(
            tiny_pipeline(**options).unet, conditioning_embedding_out_channels=(8, 16)
        )
        for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(module.weight, std=0.3)
        torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=2.0)
    return controlnet.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("controlnets")
    for name, seed in (("first", 1), ("second", 2)):
        tiny_controlnet(seed).save_pretrained(root / name)
    return root


@pytest.fixture
def student(teacher_folder):
    return load_for_steps(teacher_folder, None, 1)


def as_array(images):
    return np.stack([np.asarray(image, np.float64) for image in images])


def test_edges_of_a_square_are_its_outline():
    edges = np.asarray(edge_map(square()))
    assert edges.shape == (16, 16, 3)
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges[..., 0])
    # The outline is between pixels 3 and 4, and 11 and 12; nothing inside, nothing outside.
    near = np.minimum(np.abs(rows - 3.5), np.abs(rows - 11.5)) < 1
    near |= np.minimum(np.abs(columns - 3.5), np.abs(columns - 11.5)) < 1
    assert near.all()
    assert 20 <= len(rows) <= 40
    assert not np.asarray(edge_map(Image.new("RGB", (16, 16), "red"))).any()


def test_edges_between_colours_of_one_brightness():
    left, right = (200, 0, 0), (0, 102, 0)  # 0.299 R = 0.587 G
    pixels = np.array([[left] * 8 + [right] * 8] * 16, np.uint8)
    assert np.ptp(np.asarray(Image.fromarray(pixels).convert("L"))) <= 1
    edges = canny(pixels)
    assert (edges.any(0).nonzero()[0] // 2 == [3]).all() or set(edges.any(0).nonzero()[0]) <= {7, 8}
    assert edges[2:-2].any(1).all()


def test_thresholds():
    faint = square(colour=(40, 40, 40))
    assert not canny(np.asarray(faint), 200, 400).any()
    assert canny(np.asarray(faint), 20, 40).any()
    with pytest.raises(WadiError, match="thresholds"):
        condition_map(faint, "canny", (16, 16), 200, 100)


def test_without_opencv_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WadiError, match=r"pip install opencv-python-headless.*--condition map"):
        edge_map(square())
    assert condition_map(square(), "map", (16, 16)).size == (16, 16)


def test_a_map_is_cut_to_the_shape_of_the_result():
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (16, 0, 48, 32))  # the middle
    assert np.asarray(condition_map(wide, "map", (16, 16))).min() > 230  # but for ringing
    assert condition_map(wide, "canny", (24, 8)).size == (24, 8)


def test_layout_of_two_boxes():
    boxes = torch.tensor(
        [[[0.0, 0.0, 0.5, 0.25], [0.5, 0.5, 1.0, 1.0]], [[0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0]]]
    )
    maps = layout_map(boxes, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :4] = expected[4:, 4:] = True
    assert torch.equal(maps[0], expected)
    assert maps[1].all()
    assert not layout_map(torch.zeros(1, 2, 4), 8).any()


def test_agreement_of_edges_counted_by_hand():
    condition = torch.zeros(5, 12, 12)
    condition[:4, 2, 2:10] = 1  # a line of 8 pixels
    result = torch.zeros_like(condition)
    result[0, 2, 2:10] = 1  # the same
    result[1, 3, 2:10] = 1  # one pixel lower
    result[2, 4, 2:10] = 1  # two
    result[3, 2, 2:6] = 1  # its first half, and 4 pixels elsewhere
    result[3, 9, 2:6] = 1
    # of the half 5 of 8 are found with one pixel's tolerance; of the result 4 of 8
    share = 2 * 0.5 * 5 / 8 / (0.5 + 5 / 8)
    expected = torch.tensor([1, 1, 0, share, 1], dtype=torch.float64)
    torch.testing.assert_close(edge_agreement(condition, result), expected)
    exact = torch.tensor([1, 0, 0, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(edge_agreement(condition, result, 0), exact)
    only = edge_agreement(condition[:1], torch.zeros(1, 12, 12))
    assert only.item() == 0


def test_scale_zero_is_the_student_alone_and_one_is_not(folders, student):
    steered = with_controlnets(student, [load_controlnet(folders / "first", student)])
    assert type(steered) is StableDiffusionControlNetPipeline
    assert steered.unet is student.unet
    alone = as_array(StudentPipeline(student)("a cat", seed=5, num_images_per_prompt=3))
    made = {scale: as_array(steer(steered, "a cat", [square()], [scale], 5, 3)) for scale in (0.0, 0.5, 1.0)}
    assert np.abs(made[0.0] - alone).max() <= 1
    half, whole = (np.abs(made[scale] - alone).mean() for scale in (0.5, 1.0))
    assert 1 < half < whole


def test_the_condition_decides_and_the_batch_does_not(folders, student):
    steered = with_controlnets(student, [load_controlnet(folders / "first", student)])
    whole = as_array(steer(steered, "a cat", [square()], [1.0], 5, 3))
    split = as_array(steer(steered, "a cat", [square()], [1.0], 5, 3, batch_size=2))
    assert np.abs(whole - split).max() <= 1
    other = as_array(steer(steered, "a cat", [Image.new("RGB", (16, 16))], [1.0], 5, 3))
    assert np.abs(whole - other).mean() > 1


@torch.no_grad()
def test_what_several_add_is_summed(folders, student):
    """Against epsilon written out: the residuals of both, each with its scale, on the U-Net's."""
    nets = [load_controlnet(folders / name, student) for name in ("first", "second")]
    maps, scales = [square(), square(low=2, high=6)], [0.7, 0.4]
    steered = with_controlnets(student, nets)
    latents = StudentPipeline(steered)(
        "a cat", seed=3, image=maps, controlnet_conditioning_scale=scales, output_type="latent"
    )
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    states = student.encode_prompt("a cat", "cpu", 1, False)[0]
    down, middle = 0, 0
    for net, image, scale in zip(nets, maps, scales, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        own = net(z, 999, states, pixels, return_dict=False)
        down = [scale * new + old for new, old in zip(own[0], down or [0] * len(own[0]), strict=True)]
        middle = middle + scale * own[1]
    epsilon = student.unet(
        z, 999, states, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    alpha_squared = student.scheduler.alphas_cumprod[-1]
    expected = (z - (1 - alpha_squared).sqrt() * epsilon) / alpha_squared.sqrt()
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-3)


def test_many_steps_of_a_teacher(folders, teacher_folder):
    teacher = load_for_steps(teacher_folder, None, 3)
    teacher.scheduler = UniPCMultistepScheduler.from_config(teacher.scheduler.config)
    steered = with_controlnets(teacher, [load_controlnet(folders / "first", teacher)])
    images = steer(
        steered,
        "a cat",
        [square()],
        [1.0],
        0,
        2,
        sampling=Sampling(num_inference_steps=3, guidance_scale=2.0),
    )
    assert [image.size for image in images] == [(16, 16)] * 2
    assert np.ptp(as_array(images)) > 0


def test_what_does_not_fit_is_said(folders, tmp_path, student):
    def refuses(match, name):
        with pytest.raises(WadiError, match=match):
            load_controlnet(name, student)

    refuses("no such folder", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refuses("holds no config.json, and so no ControlNetModel", tmp_path / "empty")
    tiny_controlnet(0, channels=(16, 48)).save_pretrained(tmp_path / "wide")
    refuses(r"block_out_channels is \(16, 48\), and the model's is \(16, 32\)", tmp_path / "wide")
    unet = tiny_pipeline().unet
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16)).save_pretrained(
        tmp_path / "four"
    )
    refuses(
        "shrinks its condition 4 times, and the model's autoencoder shrinks images 2 times", tmp_path / "four"
    )
    with pytest.raises(WadiError, match="the model is a SimpleNamespace"):
        with_controlnets(SimpleNamespace(), [tiny_controlnet(0)])
    with pytest.raises(WadiError, match="at least one"):
        with_controlnets(student, [])
    steered = with_controlnets(student, [load_controlnet(folders / "first", student)])
    with pytest.raises(WadiError, match="cannot be guided"):
        steer(steered, "a cat", [square()], [1.0], sampling=Sampling(guidance_scale=2.0))


def test_one_value_is_for_all():
    assert one_for_each("--x", ["a"], 3) == ["a"] * 3
    assert one_for_each("--x", ["a", "b"], 2) == ["a", "b"]
    with pytest.raises(WadiError, match="IMAGE: 0 given; name one"):
        one_for_each("IMAGE", [], 1)
    with pytest.raises(WadiError, match="one for each of 3"):
        one_for_each("--x", ["a", "b"], 3)


def run(*arguments):
    return cli.main(["control", *map(str, arguments)])


def test_the_command_with_two_controlnets(folders, teacher_folder, tmp_path, capsys):
    square(40).save(tmp_path / "picture.png")
    square().save(tmp_path / "map.png")
    named = ["--prompt", "a cat", "--model", teacher_folder, "--device", "cpu"]
    nets = ["--controlnet", folders / "first", "--controlnet", folders / "second"]
    each = [
        "--condition",
        "canny",
        "--condition",
        "map",
        "--conditioning-scale",
        0.5,
        "--conditioning-scale",
        1,
    ]
    inputs = [tmp_path / "picture.png", tmp_path / "map.png"]
    assert run(*inputs, *named, *nets, *each, "-n", 3, "--seed", 7, "--out", tmp_path / "out") == 0
    assert "3 images, one step each" in capsys.readouterr().out
    student = load_for_steps(teacher_folder, None, 1)
    controlnets = [load_controlnet(folders / name, student) for name in ("first", "second")]
    maps = [condition_map(square(40), "canny", (16, 16)), square()]
    expected = steer(with_controlnets(student, controlnets), "a cat", maps, [0.5, 1.0], 7, 3)
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [file.name for file in files] == [f"seed-00000{seed}.png" for seed in (7, 8, 9)]
    assert np.array_equal(as_array(map(Image.open, files)), as_array(expected))
    assert run(inputs[0], *named, *nets[:2], "--out", tmp_path / "sheet.png") == 0
    cell = 128 + 6  # picture, edges and four results
    assert (Image.open(tmp_path / "sheet.png").width - 6) // cell == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--controlnet: name a ControlNet"),
        (["--controlnet", "nowhere"], "nowhere: no such folder"),
        (["--controlnet", "first", "-n", "0"], "must be at least 1"),
        (["--controlnet", "first", "--guidance-scale", "2"], "cannot be guided"),
        (["--controlnet", "first", "--width", "15"], "--width 15: must be a multiple of 8; use 8 or 16"),
        (["--controlnet", "first", "--conditioning-scale", "1", "--conditioning-scale", "1"], "2 given"),
        (["--controlnet", "first", "--adapter", "x", "--num-inference-steps", "2"], "x: no such folder"),
        (["--controlnet", "first", "--low", "300"], "thresholds must be in order"),
    ],
)
def test_mistakes_are_told_in_a_line(options, message, folders, teacher_folder, tmp_path, capsys):
    square().save(tmp_path / "picture.png")
    options = [str(folders / option) if option == "first" else option for option in options]
    named = ["--prompt", "a cat", "--model", teacher_folder, "--out", tmp_path / "out.png"]
    assert run(tmp_path / "picture.png", *named, *options) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("wadi: error: ")
    assert message in told
    assert not (tmp_path / "out.png").exists()


def test_the_built_in_student_keeps_to_the_edges(tmp_path, capsys):
    """The whole command as it comes: same seeds, with and without the ControlNet, read by the judge."""
    teacher = load_for_steps(emoji.teacher_folder(), None, 25)
    drawn = teacher(
        "a small panda on the left on a yellow background",
        num_inference_steps=25,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    drawn.save(tmp_path / "panda.png")
    judge = Judge.load(emoji.assets_folder() / "judge.safetensors")

    def made(*options):
        named = ["--prompt", "a panda on a red background", "-n", 6, "--device", "cpu", "--overwrite"]
        assert run(tmp_path / "panda.png", *named, "--out", tmp_path / "out", *options) == 0
        pixels = as_array(map(Image.open, sorted((tmp_path / "out").glob("*.png"))))
        edges = torch.from_numpy(np.stack([canny(image) for image in pixels.astype(np.uint8)]))
        condition = torch.from_numpy(canny(np.asarray(drawn)))[None].expand(6, -1, -1)
        agreement = edge_agreement(condition, edges).mean().item()
        return agreement, judge.read(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)

    true = judge.read(torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None])
    (steered, reading), (alone, free) = made(), made("--conditioning-scale", 0)
    assert steered == made("--conditioning-scale", emoji.CONTROLNET_SCALE)[0]
    assert steered > alone + 0.25
    off, anywhere = (64 * (of.center[:, 0] - true.center[:, 0]).norm(dim=1) for of in (reading, free))
    assert off.mean() < 4 < anywhere.mean()
    assert (reading.emoji[:, 0] == NAMES.index("panda")).sum() >= 5
    assert (reading.background == COLOURS.index("red")).sum() >= 5
