"""The fast path makes the plain pipeline's pictures; what it spares is spared."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from peft import get_peft_model
from PIL import Image

from tests.tiny import one_level_pipeline, tiny_pipeline
from wadi import LoRaDConfig, WadiError, cli
from wadi.onestep import StudentPipeline
from wadi.onestep.fast import MAX_SHAPES, to_bytes

PROMPTS = ["a red cat", "a blue dog"]


def differences(some, others):
    """Largest difference of bytes between two lists of pictures."""
    assert len(some) == len(others)
    pairs = zip(some, others, strict=True)
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in pairs)


def pair(folder, dtype=torch.float32, device="cpu", **options):
    """The plain and the fast pipeline."""
    plain = StudentPipeline.from_pretrained(folder, torch_dtype=dtype, device=device)
    fast = StudentPipeline.from_pretrained(folder, torch_dtype=dtype, device=device)
    return plain, fast.compile(**options)


@pytest.fixture(scope="module")
def plain(teacher_folder):
    return StudentPipeline.from_pretrained(teacher_folder)


@pytest.fixture(scope="module")
def fast(teacher_folder):
    return StudentPipeline.from_pretrained(teacher_folder, fast=True)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """An `AutoencoderTiny` folder of the tiny model's latents; its scaling factor is not 1."""
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**blocks, **counts, scaling_factor=0.5).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [None, 24])
def test_same_pictures(plain, fast, size):
    arguments = {"seed": 3, "num_images_per_prompt": 3, "height": size, "width": size}
    assert differences(plain(PROMPTS, **arguments), fast(PROMPTS, **arguments)) <= 1
    for output_type in ("np", "pt"):
        expected, found = (p(PROMPTS, output_type=output_type, **arguments) for p in (plain, fast))
        assert found.shape == expected.shape
        assert abs(found - expected).max() <= 0.5 / 255 + 1e-5
    expected, found = (p(PROMPTS, output_type="latent", **arguments) for p in (plain, fast))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_same_noise_from_any_kind_of_generator(plain, fast):
    for make in (
        lambda: torch.Generator().manual_seed(5),
        lambda: [torch.Generator().manual_seed(i) for i in (5, 7)],
    ):
        expected, found = (p(PROMPTS, generator=make()) for p in (plain, fast))
        assert differences(expected, found) <= 1
    torch.manual_seed(1)
    expected = plain(PROMPTS)
    torch.manual_seed(1)
    assert differences(expected, fast(PROMPTS)) <= 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_is_the_formula_in_float64(prediction_type):
    stock = tiny_pipeline(prediction_type)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    embeds, _ = stock.encode_prompt(PROMPTS[0], "cpu", 1, False)
    with torch.no_grad():
        prediction = stock.unet(z, 999, embeds).sample.double()
    alpha, sigma = 0.0047**0.5, (1 - 0.0047) ** 0.5
    if prediction_type == "epsilon":
        expected = (z.double() - sigma * prediction) / alpha
    else:
        expected = alpha * z.double() - sigma * prediction
    x0 = StudentPipeline(stock, 0.0047).compile()(PROMPTS[0], seed=7, output_type="latent")
    assert (x0 - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(teacher_folder, plain, dtype):
    """As near to float32 as the plain pipeline's half precision is allowed to be."""
    fast = StudentPipeline.from_pretrained(teacher_folder, torch_dtype=dtype, fast=True)
    expected = plain(PROMPTS, seed=3, output_type="np")
    half = StudentPipeline.from_pretrained(teacher_folder, torch_dtype=dtype)(
        PROMPTS, seed=3, output_type="np"
    )
    found = fast(PROMPTS, seed=3, output_type="np")
    assert np.abs(found - half).max() < 10 * torch.finfo(dtype).eps + 1 / 255
    assert np.abs(found - expected).mean() < 1.5 * np.abs(half - expected).mean() + 0.5 / 255


def test_batches_are_one_shape_and_the_last_is_padded(teacher_folder, plain):
    fast = StudentPipeline.from_pretrained(teacher_folder).compile(batch_size=4)
    expected = plain(PROMPTS, seed=3, num_images_per_prompt=3)
    fast.fast.mode = "default"  # fixed shapes, without the compiler
    assert differences(expected, fast(PROMPTS, seed=3, num_images_per_prompt=3)) <= 1
    assert list(fast.fast.warmup_seconds) == [(4, 16, 16)]
    assert differences(expected[:1], fast(PROMPTS[0], seed=3)) <= 1
    assert list(fast.fast.warmup_seconds) == [(4, 16, 16)]


def test_only_so_many_graphs_are_kept(teacher_folder):
    fast = StudentPipeline.from_pretrained(teacher_folder, fast=True)
    for count in range(1, MAX_SHAPES + 3):
        fast(PROMPTS[0], seed=0, num_images_per_prompt=count, output_type="latent")
    assert len(fast.fast.warmup_seconds) == MAX_SHAPES + 2
    assert len(fast.fast._graphs) == MAX_SHAPES


def test_a_prompt_is_encoded_once(teacher_folder, plain, monkeypatch):
    fast = StudentPipeline.from_pretrained(teacher_folder, fast=True)
    encoded = []
    encoder = fast.pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda _, args, kwargs: encoded.append(len(args[0])), with_kwargs=True)
    fast(["a", "b", "a"], seed=0, num_images_per_prompt=2)
    assert encoded == [2]
    monkeypatch.setattr(fast.pipeline, "tokenizer", None)  # not even cut into tokens again
    found = fast(["b", "a"], seed=0)
    assert encoded == [2]
    assert differences(plain(["b", "a"], seed=0), found) <= 1


def test_only_so_many_embeddings_are_kept(fast, plain, monkeypatch):
    monkeypatch.setattr("wadi.onestep.fast.MAX_PROMPTS", 2)
    prompts = ["a", "b", "c", "d"]
    assert differences(plain(prompts, seed=0), fast(prompts, seed=0)) <= 1
    assert list(fast.fast._embeds) == ["c", "d"]


def test_one_graph_no_break(monkeypatch):
    """Dynamo traces U-Net and decoder whole: nothing of a call goes back to Python."""
    modes, compile_ = [], torch.compile

    def trace(function, mode, dynamic):
        modes.append(mode)
        return compile_(function, backend="eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", trace)
    plain = StudentPipeline(one_level_pipeline())
    fast = StudentPipeline(one_level_pipeline()).compile("max-autotune-no-cudagraphs")
    assert differences(plain(PROMPTS, seed=3), fast(PROMPTS, seed=3)) <= 1
    assert modes == ["max-autotune-no-cudagraphs"] * 2


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    compile_ = torch.compile

    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: compile_(f, backend=no_compiler))
    fast = StudentPipeline(one_level_pipeline()).compile("default")
    with pytest.raises(WadiError, match="mode='eager'") as caught:
        fast(PROMPTS, seed=3)
    assert "\n" not in str(caught.value)


def test_bytes_are_those_of_diffusers():
    image = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = VaeImageProcessor().postprocess(image, output_type="pil")
    assert differences(expected, to_bytes(image).numpy()) == 0


def test_what_the_safety_checker_flags_is_black(teacher_folder):
    fast = StudentPipeline.from_pretrained(teacher_folder, fast=True)
    expected = fast(PROMPTS, seed=3, output_type="np")

    class Features:
        def __call__(self, images, return_tensors):
            self.pixel_values = torch.stack([torch.from_numpy(np.array(image)) for image in images])
            return self

    def checker(images, clip_input):
        assert np.array_equal(images, clip_input.numpy())
        images[1] = 0
        return images, [False, True]

    fast.pipeline.safety_checker, fast.pipeline.feature_extractor = checker, Features()
    found = fast(PROMPTS, seed=3, output_type="np")
    assert np.array_equal(found[0], expected[0])
    assert not found[1].any()
    assert not fast(PROMPTS, seed=3, output_type="pt")[1].any()


def test_another_autoencoder(teacher_folder, tiny_vae, plain):
    """Its own scaling factor divides the latents, fast or not."""
    vae = AutoencoderTiny.from_pretrained(tiny_vae)
    x0 = plain(PROMPTS, seed=3, output_type="latent")
    with torch.no_grad():
        image = vae.decode(x0 / 0.5).sample
    expected = (image.double() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    for fast in (False, True):
        pipeline = StudentPipeline.from_pretrained(teacher_folder, vae=tiny_vae, fast=fast)
        assert np.abs(np.stack(pipeline(PROMPTS, seed=3)) - expected).max() <= 0.51


def test_autoencoders_that_do_not_fit(teacher_folder, tiny_vae, tmp_path):
    AutoencoderTiny(latent_channels=16, **_blocks(2)).save_pretrained(tmp_path / "channels")
    AutoencoderTiny(**_blocks(3)).save_pretrained(tmp_path / "factor")
    AutoencoderTiny(**_blocks(2)).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name, message in [
        (tmp_path / "channels", "16 latent channels, but the model needs 4"),
        (tmp_path / "factor", "4 pixels a latent, but the model needs 2"),
        (tmp_path / "cut", "could not read the safetensors file"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "is None; use AutoencoderTiny or AutoencoderKL"),
        (teacher_folder / "unet", "is UNet2DConditionModel"),
    ]:
        with pytest.raises(WadiError, match=message) as caught:
            StudentPipeline.from_pretrained(teacher_folder, vae=name)
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)


def _blocks(count):
    return {
        "encoder_block_out_channels": (8,) * count,
        "decoder_block_out_channels": (8,) * count,
        "num_encoder_blocks": (1,) * count,
        "num_decoder_blocks": (1,) * count,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 15}, "--height 15: must be a multiple of 8"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1"),
        ({"clip_skip": 1}, "clip_skip"),
        ({"prompt": "cat " * 200}, "tokens"),
        ({"guidance_scale": 2.0}, "cannot be guided"),
    ],
)
def test_refusals(fast, arguments, message):
    with pytest.raises(WadiError, match=message):
        fast(**{"prompt": "a red cat", **arguments})


def test_what_cannot_be_compiled(teacher_folder, fast, tmp_path):
    stock = StableDiffusionPipeline.from_pretrained(teacher_folder)
    with pytest.raises(WadiError, match="reduce-overhead"):
        StudentPipeline(stock).compile(mode="reduce-overhead")
    with pytest.raises(WadiError, match="batch_size"):
        StudentPipeline(stock).compile(batch_size=0)
    with pytest.raises(WadiError, match="save it before"):
        fast.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    get_peft_model(stock.unet, LoRaDConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(WadiError, match="not merged"):
        StudentPipeline(stock).compile()


def test_command_line(teacher_folder, tiny_vae, tmp_path, capsys):
    model = ["--model", str(teacher_folder), "--vae", str(tiny_vae), "--device", "cpu", "--seed", "3"]
    for name, options in (("plain", []), ("fast", ["--fast"])):
        out = str(tmp_path / name)
        more = ["-n", "5", "--batch-size", "2", "--out", out, *options]
        assert cli.main(["generate", "a red cat", *model, *more]) == 0
    assert "ready after" in capsys.readouterr().out
    pictures = [sorted((tmp_path / name).glob("*.png")) for name in ("plain", "fast")]
    assert len(pictures[0]) == 5
    assert differences(*([Image.open(path) for path in paths] for paths in pictures)) <= 1


# --- on a GPU ---


@pytest.fixture
def full_float32():
    """Plain and fast may choose other convolutions; TF32 would make them differ by more than rounding."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_graph_gives_the_plain_pictures(teacher_folder, full_float32, dtype, mode):
    plain, fast = pair(teacher_folder, dtype, "cuda", mode=mode, batch_size=2)
    tolerance = 1.5 / 255 + (0 if dtype == torch.float32 else 30 * torch.finfo(dtype).eps)
    for prompts, count in ((PROMPTS, 3), (["the sun"], 1), (PROMPTS, 3)):  # a replay leaves nothing behind
        arguments = {"seed": 3, "num_images_per_prompt": count, "output_type": "np"}
        assert np.abs(fast(prompts, **arguments) - plain(prompts, **arguments)).max() < tolerance
    assert list(fast.fast.warmup_seconds) == [(2, 16, 16)]
    assert fast.fast._graphs[2, 16, 16].graph is not None


@pytest.mark.gpu
def test_the_host_waits_for_nothing(teacher_folder):
    fast = StudentPipeline.from_pretrained(teacher_folder, device="cuda").compile("eager")
    fast(PROMPTS, seed=3, output_type="pt")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = fast(PROMPTS, seed=4, output_type="pt")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.allclose(found.permute(0, 2, 3, 1).cpu(), fast(PROMPTS, seed=4, output_type="np"), atol=1e-6)


@pytest.mark.gpu
def test_shapes_share_memory_but_not_results(teacher_folder, full_float32):
    plain, fast = pair(teacher_folder, device="cuda", mode="eager")
    for count, size in ((1, 16), (3, 16), (1, 24), (1, 16), (3, 16)):
        arguments = {"seed": 5, "num_images_per_prompt": count, "height": size, "width": size}
        assert differences(plain(PROMPTS[0], **arguments), fast(PROMPTS[0], **arguments)) <= 2
