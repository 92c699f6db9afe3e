"""The student's pipeline, and the exported folder in stock diffusers, on a tiny real Stable Diffusion."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionPipeline,
)
from peft import get_peft_model
from PIL import Image

from tests.tiny import mark_student, tiny_pipeline, tiny_pixart
from wadi import LoRaDConfig, WadiError
from wadi.onestep import (
    StudentPipeline,
    export_pipeline,
    image_grid,
    labelled_grid,
    load_pipeline,
    save_image,
)
from wadi.onestep.pipeline import load_for_steps
from wadi.onestep.scheduler import fractions

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return teacher_folder


@pytest.fixture(scope="module")
def adapter(teacher, tmp_path_factory):
    """A student that was turned a good deal, with an alpha_T of its own."""
    folder = tmp_path_factory.mktemp("adapter")
    unet = StableDiffusionPipeline.from_pretrained(teacher).unet
    config = LoRaDConfig(r=4, target_modules=["to_q", "to_k", "to_v", "time_emb_proj", "ff.net.2"])
    adapted = get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lorad_" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(folder)
    mark_student(folder, alpha_T_squared=0.0047)
    return folder


@pytest.fixture(scope="module")
def student(teacher, adapter):
    return StudentPipeline.from_pretrained(teacher, adapter)


def generators(seed, count):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


STOCK_ONLY = """
import json, sys
sys.modules["wadi"] = sys.modules["peft"] = None  # any import of them raises
import numpy as np, torch
from diffusers import StableDiffusionPipeline
folder, out, prompt, seed, count = json.loads(sys.argv[1])
pipeline = StableDiffusionPipeline.from_pretrained(folder)
generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
images = pipeline(
    prompt, num_inference_steps=1, guidance_scale=1.0, num_images_per_prompt=count, generator=generator
).images
np.save(out, np.stack([np.asarray(image) for image in images]))
"""


def test_stock_diffusers_without_wadi_gives_the_same_pixels(teacher, adapter, student, tmp_path):
    export_pipeline(teacher, adapter, tmp_path / "pipeline")
    argument = json.dumps([str(tmp_path / "pipeline"), str(tmp_path / "stock.npy"), PROMPT, 3, 4])
    subprocess.run([sys.executable, "-I", "-c", STOCK_ONLY, argument], check=True, capture_output=True)
    ours = np.stack([np.asarray(image) for image in student(PROMPT, seed=3, num_images_per_prompt=4)])
    assert np.array_equal(np.load(tmp_path / "stock.npy"), ours)
    assert ours.std() > 10


def test_exported_folder_is_stock_and_knows_no_path(teacher, adapter, student, tmp_path):
    export_pipeline(teacher, adapter, tmp_path / "pipeline")
    texts = {path: path.read_text() for path in (tmp_path / "pipeline").rglob("*.json")}
    index = json.loads(texts[tmp_path / "pipeline" / "model_index.json"])
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert not [path for path, text in texts.items() if "wadi" in text or str(teacher) in text]
    assert not list((tmp_path / "pipeline").rglob("*.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    reloaded = StudentPipeline.from_pretrained(tmp_path / "pipeline")
    images = [pipeline(PROMPT, seed=0, output_type="np") for pipeline in (student, reloaded)]
    assert np.array_equal(*images)


def test_is_the_formula_on_the_merged_unet(student):
    pipeline = student.pipeline
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    embeds, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    with torch.no_grad():
        eps = pipeline.unet(z, 999, embeds).sample.double()
    expected = (z.double() - (1 - 0.0047) ** 0.5 * eps) / 0.0047**0.5
    x0 = student(PROMPT, seed=7, output_type="latent").double()
    assert (x0 - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_adapter_changes_the_picture_and_is_merged(teacher, student):
    before = StudentPipeline.from_pretrained(teacher)(PROMPT, seed=3, output_type="np")
    after = student(PROMPT, seed=3, output_type="np")
    assert np.abs(before - after).max() > 0.05
    assert not [name for name, _ in student.pipeline.unet.named_parameters() if "lorad" in name]


def test_image_of_a_seed_does_not_depend_on_how_many(student):
    many = student(PROMPT, seed=3, num_images_per_prompt=5, output_type="np")
    alone = student(PROMPT, seed=6, output_type="np")
    assert np.allclose(many[3], alone[0], atol=1e-5)
    assert not np.allclose(many[2], alone[0], atol=1e-2)
    listed = student([PROMPT, "a dog"], seed=3, num_images_per_prompt=2, output_type="np")
    assert np.allclose(listed[:2], many[:2], atol=1e-5)


def test_same_generators_same_picture(student):
    seeded = student(PROMPT, seed=3, num_images_per_prompt=2, output_type="np")
    given = student(PROMPT, generator=generators(3, 2), num_images_per_prompt=2, output_type="np")
    assert np.array_equal(seeded, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_and_exports(teacher, adapter, student, dtype, tmp_path):
    half = StudentPipeline.from_pretrained(teacher, adapter, torch_dtype=dtype)
    expected = student(PROMPT, seed=3, output_type="np")
    assert np.abs(half(PROMPT, seed=3, output_type="np") - expected).max() < 20 * torch.finfo(dtype).eps
    export_pipeline(teacher, adapter, tmp_path / "pipeline", dtype=dtype)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=dtype)
    assert {module.dtype for module in (stock.unet, stock.vae, stock.text_encoder)} == {dtype}
    merged = half.pipeline.unet.state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in stock.unet.state_dict().items())


def test_half_precision_files_are_loaded_in_float32(teacher, tmp_path):
    StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float16).save_pretrained(
        tmp_path / "half"
    )
    pipeline = StudentPipeline.from_pretrained(tmp_path / "half").pipeline
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_an_export_has_the_dtypes_of_the_teachers_files(teacher, adapter, tmp_path):
    """As diffusers users keep them: a network in half precision, a VAE in float32. Merging is in float32."""
    mixed = StableDiffusionPipeline.from_pretrained(teacher)
    mixed.unet.to(torch.bfloat16)
    mixed.text_encoder.to(torch.float16)
    mixed.save_pretrained(tmp_path / "mixed")
    export_pipeline(tmp_path / "mixed", adapter, tmp_path / "pipeline")
    parts = load_pipeline(tmp_path / "pipeline", "auto").components
    dtypes = {"unet": torch.bfloat16, "text_encoder": torch.float16, "vae": torch.float32}
    assert {name: parts[name].dtype for name in dtypes} == dtypes
    whole = StudentPipeline.from_pretrained(tmp_path / "mixed", adapter).pipeline.unet.state_dict()
    merged = parts["unet"].state_dict()
    assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in whole.items())


def test_wrapping_leaves_the_teacher_as_it_is(teacher):
    stock = StableDiffusionPipeline.from_pretrained(teacher)
    scheduler = stock.scheduler
    wrapped = StudentPipeline(stock, 0.0047)
    assert stock.scheduler is scheduler
    assert wrapped.pipeline.unet is stock.unet
    assert isinstance(wrapped.pipeline.scheduler, LCMScheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, r"^guidance_scale 2: .*cannot be guided.* distil with another"),
        ({"guidance_scale": 0.0}, r"^guidance_scale 0: "),
        ({"negative_prompt": "ugly"}, r"^negative_prompt: .*cannot be guided.* say in the prompt what"),
        ({"num_inference_steps": 4}, r"^num_inference_steps 4: .* 1 step.* multi-step teacher"),
        ({"seed": 1, "generator": torch.Generator()}, "one of the two"),
        ({"prompt": "cat " * 200}, "tokens"),
    ],
)
def test_refusals(student, arguments, message):
    with pytest.raises(WadiError, match=message):
        student(**{"prompt": PROMPT, **arguments})


def test_missing_and_broken_inputs_are_one_line(teacher, adapter, tmp_path):
    def broken(name, source, change):
        folder = tmp_path / name
        subprocess.run(["cp", "-r", source, folder], check=True)
        change(folder)
        return folder

    no_vae = broken("no_vae", teacher, lambda f: (f / "vae").rename(tmp_path / "vae"))
    unet = "unet/diffusion_pytorch_model.safetensors"
    no_weights = broken("no_weights", teacher, lambda f: (f / unet).rename(f / "unet" / "weights.bin"))
    cut = broken("cut", teacher, lambda f: (f / unet).write_bytes((f / unet).read_bytes()[:1000]))
    no_config = broken("no_config", adapter, lambda f: (f / "adapter_config.json").unlink())
    weights = "adapter_model.safetensors"
    pickled = broken("pickled", adapter, lambda f: (f / weights).rename(f / "adapter_model.bin"))
    empty_weights = broken("other", adapter, _drop_one_weight)
    cases = [
        (tmp_path / "nowhere", None, "no such folder"),
        (tmp_path, None, "but it holds 3 of them; name one"),
        (no_vae, None, "'vae'"),
        (no_weights, None, "has its weights in unet/weights.bin, in a format that can run code"),
        (cut, None, "could not read"),
        (teacher, tmp_path / "nowhere", "no such folder"),
        (teacher, no_config, "adapter_config.json is missing"),
        (teacher, pickled, "wadi convert .*pickled --out NEW_FOLDER"),
        (teacher, empty_weights, "does not fit"),
    ]
    for folder, adapter_folder, message in cases:
        with pytest.raises(WadiError, match=message) as caught:
            StudentPipeline.from_pretrained(folder, adapter_folder)
        assert "\n" not in str(caught.value)


def _drop_one_weight(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")


def test_pixart_runs_in_one_step_too():
    """The transformer's learned sigma is cut off, and x0 is the formula with the student's own alpha_T."""
    pipeline = StudentPipeline(tiny_pixart(), 0.0047)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    embeds, mask, *_ = pipeline.pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    transformer = pipeline.pipeline.transformer
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        eps = transformer(z, embeds, torch.tensor([999]), conditions, encoder_attention_mask=mask).sample[
            :, :4
        ]
    expected = (z.double() - (1 - 0.0047) ** 0.5 * eps.double()) / 0.0047**0.5
    x0 = pipeline(PROMPT, seed=7, output_type="latent", use_resolution_binning=False).double()
    assert (x0 - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_grids_hold_every_picture_where_it_belongs():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255)]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    grid = image_grid(images, columns=3)
    found = [(grid.getpixel((70 + 134 * (i % 3), 70 + 134 * (i // 3)))) for i in range(5)]
    assert found == colours
    labelled = labelled_grid([("before", images[:2]), ("after", images[2:4])], headings=["one", "two"])
    assert labelled.width > 2 * 134
    assert np.asarray(labelled)[:, 100:175].min() < 128  # the labels' ink
    # a long heading stays within its column, on more lines
    long = labelled_grid([("", images[:2])], headings=["a heading of some more words", ""])
    assert long.height > labelled_grid([("", images[:2])], headings=["one", ""]).height
    assert np.asarray(long)[: long.height - 134, 144:].min() == 255


@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", "PNG"), ("x.JPG", "JPEG"), ("x.jpeg", "JPEG"), ("x.webp", "WEBP")]
)
def test_the_suffix_says_what_a_picture_is_written_as(name, kind, tmp_path):
    save_image(Image.new("RGB", (9, 5), (200, 30, 40)), tmp_path / name)
    with Image.open(tmp_path / name) as found:
        assert (found.format, found.size) == (kind, (9, 5))
    with pytest.raises(WadiError, match=r"x\.txt: the name of the file must end in \.png"):
        save_image(Image.new("RGB", (9, 5)), tmp_path / "x.txt")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_student_in_several_steps_is_refused(teacher, adapter):
    assert isinstance(load_for_steps(teacher, adapter).scheduler, LCMScheduler)
    assert not isinstance(load_for_steps(teacher, None, 4).scheduler, LCMScheduler)
    with pytest.raises(WadiError, match="a one-step student takes 1 step, not 4; omit the adapter"):
        load_for_steps(teacher, [adapter], 4)


@pytest.mark.parametrize("count", [1, 4])
def test_a_student_that_is_loaded_for_evaluation_is_not_guided(count, tmp_path):
    """Its images would be measured as they never are: guidance was built in by distillation."""
    StudentPipeline(tiny_pipeline(), steps=fractions(4)).save_pretrained(tmp_path / "student")
    with pytest.raises(WadiError, match=r"guidance_scale 2: a student cannot be guided"):
        load_for_steps(tmp_path / "student", None, count, guidance_scale=2.0)
