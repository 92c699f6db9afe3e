"""The protocol on a tiny pipeline, with the judge and a tiny CLIP in place of Inception and the real one."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from tests.onestep.test_adapters import write_adapter
from tests.processes import start_two
from tests.tiny import tiny_pipeline, tiny_tokenizer
from wadi.cli import main
from wadi.emoji.judge import load_judge_features
from wadi.errors import WadiError, WadiWarning
from wadi.files import save_tensors
from wadi.metrics import feature_statistics, spread
from wadi.metrics.evaluate import evaluate
from wadi.metrics.evaluate_config import EvaluateConfig
from wadi.metrics.extractors import SPACES, Clip
from wadi.metrics.generation import resized
from wadi.metrics.reference import distances, too_few

CAPTIONS = [f"a {thing} number {i}" for i, thing in enumerate(("cat", "dog", "cup", "kite") * 2)]


@pytest.fixture
def config(teacher_folder, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    return EvaluateConfig(
        captions=tmp_path / "captions.txt",
        out=tmp_path / "out",
        model=str(teacher_folder),
        num_samples=6,
        resolution=64,
        features="emoji",
        spread_prompts=2,
        spread_samples=3,
        batch_size=4,
        device="cpu",
    )


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(24)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def real_images(folder, count):
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def pictures(out):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "pictures").iterdir())}


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_a_set_against_itself(config):
    """All of it inside; the spread is that of the judge's features of the pictures."""
    evaluate(config)
    made = pictures(config.out)
    assert list(made) == [f"{i:06d}.png" for i in range(6)] + [
        f"spread-{i:06d}-{k:03d}.png" for i in range(2) for k in range(3)
    ]
    assert {array.shape for array in made.values()} == {(64, 64, 3)}
    reference = config.out.parent / "reference"
    reference.mkdir()
    for i in range(6):
        shutil.copy(config.out / f"pictures/{i:06d}.png", reference)
    config = dataclasses.replace(config, reference=reference, save_reference=reference / "s.safetensors")
    with pytest.warns(WadiWarning, match="the Frechet distance is omitted.*at least 256 .* holds 6"):
        figures = evaluate(config)
    assert "frechet_distance" not in figures
    assert (figures["precision"], figures["recall"]) == (1.0, 1.0)
    assert (figures["samples"], figures["reference_samples"]) == (6, 6)
    stacked = torch.stack([torch.from_numpy(made[n].copy()).permute(2, 0, 1) for n in made if "spread" in n])
    features = load_judge_features()(stacked)
    assert figures["spread"] == pytest.approx(spread(features.unflatten(0, (2, 3))), rel=1e-4)
    again = dataclasses.replace(config, reference=reference / "s.safetensors", save_reference=None)
    with pytest.warns(WadiWarning, match="omitted"):
        assert evaluate(again) == figures
    with pytest.raises(WadiError, match="was made with --resize lanczos; give the same"):
        evaluate(dataclasses.replace(again, resize="box", out=config.out.parent / "box"))


def test_the_distance_is_given_from_twice_the_features_on(tmp_path):
    features = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))

    def figures(real, generated):
        return distances(feature_statistics(real) | {"features": real}, generated)

    assert figures(features[:24], features[:24])["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert figures(features[:24], features + 2)["frechet_distance"] > 12
    for real, generated in ((features[:23], features), (features, features[:23])):
        assert figures(real, generated).keys() == {"reference_samples", "precision", "recall"}


@pytest.mark.parametrize(("generated", "real"), [(3, 6), (6, 3), (1, 1)])
@pytest.mark.parametrize("statistics", [False, True])
def test_too_few_images_for_any_figure_are_refused_first(config, tmp_path, generated, real, statistics):
    reference = real_images(tmp_path / "real", real)
    if statistics:
        features = torch.zeros(real, 128)
        reference = tmp_path / "statistics.safetensors"
        save_tensors(reference, feature_statistics(features) | {"features": features})
    config = dataclasses.replace(config, num_samples=generated, spread_prompts=0, reference=reference)
    message = f"at least 4 images .* 256, but --num-samples is {generated}, --reference holds {real}"
    with pytest.raises(WadiError, match=message) as error:
        evaluate(config)
    assert "\n" not in str(error.value)
    assert not config.out.exists()


@pytest.mark.parametrize("features", SPACES)
def test_the_distance_is_omitted_just_below_its_minimum(config, features):
    """Asked of the check alone: thousands of images would have to be made."""
    fewest = 2 * SPACES[features].width
    reference = config.out.parent / "statistics.safetensors"
    zeros = torch.zeros(5, SPACES[features].width)
    for count, said in ((fewest, ""), (fewest - 1, f"omitted, because it needs at least {fewest} images")):
        save_tensors(
            reference, {**feature_statistics(zeros), "count": torch.tensor(count), "features": zeros}
        )
        asked = dataclasses.replace(config, num_samples=fewest, features=features, reference=reference)
        assert said in too_few(asked)
        assert bool(too_few(asked)) == bool(said)


def test_statistics_of_another_feature_space_are_refused_first(config, tmp_path):
    statistics = feature_statistics(torch.zeros(9, 7)) | {"features": torch.zeros(9, 7)}
    save_tensors(tmp_path / "s.safetensors", statistics)
    with pytest.raises(WadiError, match="has 7 features an image"):
        evaluate(dataclasses.replace(config, reference=tmp_path / "s.safetensors"))
    assert not config.out.exists()


def test_what_is_missing_is_made_again_to_the_same_bits(config):
    evaluate(config)
    before = pictures(config.out)
    for name in ("000001.png", "spread-000001-002.png"):
        (config.out / "pictures" / name).unlink()
    evaluate(dataclasses.replace(config, batch_size=3))
    after = pictures(config.out)
    assert before.keys() == after.keys()
    # another batch: the same noise, to the rounding of a product
    assert all(np.abs(before[n].astype(int) - after[n]).max() <= 1 for n in before)
    assert not same({"": before["000000.png"]}, {"": before["000001.png"]})


def test_the_result_holds_what_repeats_it(config):
    evaluate(config)
    result = json.loads((config.out / "result.json").read_text())
    assert result["options"] == {
        name: str(value) if name in ("captions", "out") else value
        for name, value in dataclasses.asdict(config).items()
    }
    assert result["torch"] == torch.__version__
    assert len(result["captions_sha256"]) == len(result["choice_sha256"]) == 64


def test_pictures_of_other_settings_are_refused(config):
    evaluate(config)
    for change in ({"seed": 5}, {"resize": "box"}, {"choice_seed": 3}):
        with pytest.raises(WadiError, match="were made with other"):
            evaluate(dataclasses.replace(config, **change))


def test_pictures_are_of_a_model_and_not_of_its_path(config, teacher_folder, tmp_path):
    """A moved model goes on; another one at the same path, or with another adapter, is refused."""
    model = shutil.copytree(teacher_folder, tmp_path / "model")
    config = dataclasses.replace(config, model=str(model))
    evaluate(config)
    made = pictures(config.out)
    moved = dataclasses.replace(config, model=str(model.rename(tmp_path / "moved")))
    evaluate(moved)
    assert same(made, pictures(config.out))
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(WadiError, match=r"were made with other settings \(adapter\)"):
        evaluate(dataclasses.replace(moved, adapter=str(adapter)))
    tiny_pipeline(seed=5).save_pretrained(moved.model)
    with pytest.raises(WadiError, match=r"were made with other settings \(model\)"):
        evaluate(moved)
    assert same(made, pictures(config.out))


def test_clip_score_is_the_cosine_of_the_models_own_embeddings(config, clip_folder):
    figures = evaluate(dataclasses.replace(config, clip_model=clip_folder))
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    chosen = json.loads((config.out / "settings.json").read_text())
    assert chosen["choice_sha256"]
    cosines = []
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:6].sort().values
    for i, index in enumerate(order.tolist()):
        image = Image.open(config.out / f"pictures/{i:06d}.png")
        inputs = processor(text=[CAPTIONS[index]], images=image, return_tensors="pt", truncation=True)
        with torch.no_grad():
            cosines.append(model(**inputs).logits_per_image.item() / model.logit_scale.exp().item())
    expected = sum(max(0.0, 100 * cosine) for cosine in cosines) / 6
    assert figures["clip_score"] == pytest.approx(expected, rel=1e-4)
    assert "frechet_distance" not in figures


def test_clip_reads_long_captions(clip_folder):
    noise = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8)
    assert Clip(clip_folder).score(noise, ["a" * 500, "b"]).shape == (2,)


def test_a_reference_that_is_no_picture_is_named(config, tmp_path):
    real_images(tmp_path / "real", 3)
    (tmp_path / "real" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(WadiError, match=r"broken.png: could not read the image"):
        evaluate(dataclasses.replace(config, reference=tmp_path / "real"))


def test_resizing_is_pillows_after_a_square_crop(config):
    wide = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8))
    expected = wide.crop((10, 0, 50, 40)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(resized(wide, config)), np.asarray(expected))


def test_two_processes_make_the_pictures_of_one(config, tmp_path):
    evaluate(config)
    alone = pictures(config.out)
    arguments = {"captions": config.captions, "out": tmp_path / "two", "model": config.model}
    arguments |= {"num-samples": 6, "resolution": 64, "features": "emoji", "device": "cpu"}
    arguments |= {"spread-prompts": 2, "spread-samples": 3}
    command = ["evaluate", *(f"--{name}={value}" for name, value in arguments.items())]
    processes = start_two(tmp_path, main, command)
    codes, out, err = zip(*(process.communicate() for process in processes), strict=True)
    assert codes == (0, 0), err
    both = pictures(tmp_path / "two")
    assert both.keys() == alone.keys()
    assert all(np.abs(alone[name].astype(int) - both[name]).max() <= 1 for name in alone)
    assert "".join(out).count("spread") == 1
    assert "".join(err).count("images: 0/") == 1  # one process tells how far it is


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spread_prompts": 0}, "nothing to measure"),
        ({"spread_prompts": 7}, "--spread-prompts 7"),
        ({"num_samples": 9}, "8 captions, fewer than --num-samples 9"),
        ({"reference": "nowhere"}, "--reference nowhere: no such"),
        ({"clip_model": "nowhere/at-all"}, "--clip-model nowhere/at-all"),
        ({"spread_samples": 1}, "--spread-samples"),
    ],
)
def test_mistakes_are_one_line(config, change, message, capsys):
    options = dataclasses.asdict(config) | change
    arguments = [
        f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value not in (None, False)
    ]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("wadi: error: ")
    assert message in error


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(WadiError, match=r"torch-fidelity"):
        SPACES["inception"].load()
