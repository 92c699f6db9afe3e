"""What every backbone does alike: its blocks, its schedule, its encoding, images to latents and back."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.backbones.cases import CASES, NEARLY, PROMPTS, as_shipped, close, make, noise, stock
from tests.tiny import tiny_pipeline
from wadi.backbones import BACKBONES, load_backbone, load_prompt_encoder
from wadi.errors import WadiError

every = pytest.mark.parametrize("case", CASES)


def test_there_is_a_tiny_pipeline_of_every_kind():
    assert {type(build()).__name__ for build in CASES.values()} == BACKBONES.keys()


@every
def test_blocks_are_in_the_network(case):
    backbone = make(case)
    found = {type(module).__name__ for module in backbone.network.modules()}
    assert backbone.blocks
    assert set(backbone.blocks) <= found


@every
def test_the_fake_models_layers_are_some_of_the_students(case):
    backbone = make(case)
    student, fake = backbone.student_layers(), backbone.fake_layers()
    assert fake
    assert set(fake) <= set(student)
    assert all(isinstance(backbone.network.get_submodule(name), torch.nn.Linear) for name in student)


@every
def test_latents_are_decoded_as_by_the_stock_pipeline(case):
    backbone = make(case)
    options = {"num_inference_steps": 2, "z": noise(backbone)}
    images = backbone.decode(stock(backbone, output_type="latent", **options))
    for pair in zip(images, stock(backbone, **options), strict=True):
        ours, theirs = (np.asarray(image, dtype=int) for image in pair)
        assert abs(ours - theirs).max() <= (case in NEARLY)  # of 255


@every
def test_images_of_any_size_become_latents_of_their_middle(case):
    backbone = make(case)
    height, width = backbone.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, 2 * width, 3), dtype=np.uint8)
    found = backbone.encode_images([Image.fromarray(pixels)] * 2)
    assert found.shape == (2, *backbone.latent_shape)
    middle = torch.from_numpy(pixels[:, width // 2 : -(width // 2)]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = backbone._encoded(middle)
    torch.testing.assert_close(backbone.unscaled(found[:1]), encoded, rtol=1e-4, atol=1e-5)


@every
def test_scaling_has_an_inverse(case):
    backbone = make(case)
    z = noise(backbone)
    torch.testing.assert_close(backbone.scaled(backbone.unscaled(z)), z, rtol=1e-5, atol=1e-5)


@every
def test_a_folder_gives_the_conditions_that_the_stock_pipeline_sees(case, tmp_path):
    """Encoders that are loaded for as long as they work, with or without the network beside them."""
    backbone = make(case)
    backbone.pipeline.save_pretrained(tmp_path)
    expected = backbone.encode(["a cat", ""])
    loaded, encoder = load_backbone(tmp_path), load_prompt_encoder(tmp_path)
    assert expected.keys() == encoder.dimensions.keys()
    assert loaded.text.identity() == encoder.identity()
    assert loaded.text.length == encoder.length == make(case, tokens=None).text.length
    for text in (loaded.text, encoder):
        text.length = backbone.text.length
        found = text.encode(["a cat", ""])
        assert all(getattr(text.pipeline, part) is None for part in text.parts)
        assert {name: tensor.ndim for name, tensor in found.items()} == encoder.dimensions
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    encoder.length = 1 + (encoder.length or 0)  # is part of the condition, so other entries of the cache
    assert loaded.text.identity() != encoder.identity()


@every
def test_one_step_is_the_stock_pipelines_bit_for_bit(case):
    """x0 of `predict` at the last time, from noise and `encode`, against the pipeline as it is shipped."""
    backbone = make(case, tokens=None)
    schedule, z = backbone.schedule(), noise(backbone)
    as_shipped(backbone)
    t = schedule.last.expand(2)
    with torch.no_grad():
        prediction = backbone.predict(backbone.network, z, schedule.timestep(t), backbone.encode(PROMPTS))
        expected = stock(backbone, z=z, num_inference_steps=1, output_type="latent")
    close(case, schedule.x0(prediction, z, t), expected)


@pytest.mark.parametrize("loader", [load_backbone, load_prompt_encoder])
def test_other_pipelines_get_one_line(tmp_path, loader):
    tiny_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(
        index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionImg2ImgPipeline"')
    )
    with pytest.raises(WadiError, match=r"holds a StableDiffusionImg2Img.*; name one of StableDiff") as error:
        loader(tmp_path)
    assert all(name in str(error.value) for name in BACKBONES)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_network_gets_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(WadiError, match="FluxPipeline, and lists neither a U-Net nor a transformer; name a"):
        load_backbone(tmp_path)


@every
def test_times_end_at_pure_noise(case):
    """The student's one step starts where the schedule has no signal left, or nearly none."""
    schedule = make(case).schedule()
    alpha, sigma = schedule.levels(schedule.last[None])
    assert float(alpha) < 0.1 < 0.99 < float(sigma)


@every
def test_a_resolution_that_does_not_fit_gets_one_line(case):
    pipeline = make(case).pipeline
    for resolution in (7, 1, 0, -8, True, 64.0):
        with pytest.raises(WadiError, match="--resolution") as caught:
            BACKBONES[type(pipeline).__name__](pipeline, resolution=resolution)
        assert "\n" not in str(caught.value)


@every
def test_the_resolution_is_the_users_where_the_network_has_none(case):
    backbone = make(case)
    pipeline, (side, _) = backbone.pipeline, backbone.image_size
    if backbone.network.config.get("sample_size") is None:
        again = type(backbone)(pipeline, resolution=2 * side)
        assert again.image_size == (2 * side, 2 * side)
        assert again.latent_shape[1:] == tuple(2 * n for n in backbone.latent_shape[1:])
    else:
        assert type(backbone)(pipeline, resolution=side).image_size == (side, side)
        with pytest.raises(WadiError, match=f"makes images of {side} x {side} pixels; omit"):
            type(backbone)(pipeline, resolution=2 * side)


@pytest.mark.parametrize("case", ["sd", "sd3"])
def test_large_images_are_decoded_in_tiles(case, monkeypatch):
    backbone = make(case)
    for name in ("WHOLE", "TILE"):
        monkeypatch.setattr(f"wadi.backbones.base.{name}", 8)
    latents, sides = noise(backbone), []
    vae = make(case).pipeline.vae
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 8, 4
    backbone.pipeline.vae.decoder.register_forward_pre_hook(
        lambda _, inputs: sides.append(inputs[0].shape[-1])
    )
    images = backbone.decode(latents)
    assert max(sides) == 4
    expected = vae.decode(backbone.unscaled(latents)).sample.detach()
    expected = backbone.pipeline.image_processor.postprocess(expected)
    assert all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))
    assert not backbone.pipeline.vae.use_tiling


@every
def test_one_text_encoder_is_on_the_device_at_a_time(case, monkeypatch):
    backbone = make(case)
    text = type(backbone.text)(backbone.pipeline, device=torch.device("cpu", 0))  # not where they rest
    text.length = backbone.text.length
    encoders = {id(getattr(backbone.pipeline, part)): part for part in text.parts}
    there, most, move = set(), [], transformers.PreTrainedModel.to

    def record(module, *args, **kwargs):
        if id(module) in encoders:
            (there.add if torch.device(args[0]) == text.device else there.discard)(id(module))
            most.append(len(there))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "to", record)
    text.encode(["a cat", "a dog", "a hat"], batch_size=1)
    assert max(most) == 1
    assert there == set()
