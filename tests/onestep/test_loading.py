"""Broken, half and unusual models, in every place that loads: the model, or one line about it."""

import inspect
import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.files import edit
from tests.tiny import tiny_pipeline
from wadi.backbones import load_backbone, load_prompt_encoder
from wadi.device import chosen_device
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import StudentPipeline, load_pipeline
from wadi.onestep.loading import guidance_arguments, load_denoiser, load_vae
from wadi.tasks import load_controlnet

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {
    "unet": f"unet/{WEIGHTS}",
    "vae": f"vae/{WEIGHTS}",
    "text_encoder": "text_encoder/model.safetensors",
    "controlnet": f"controlnet/{WEIGHTS}",
    "other_vae": f"other_vae/{WEIGHTS}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline with a ControlNet and another autoencoder beside its parts; read only."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder)
    ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16)).save_pretrained(
        folder / "controlnet"
    )
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).save_pretrained(folder / "other_vae")
    return folder


@pytest.fixture
def model(whole, tmp_path):
    """A copy that a test breaks."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def encode(folder):
    return load_prompt_encoder(folder).encode(["a cat"])


def with_controlnet(folder):
    return load_controlnet(folder / "controlnet", load_pipeline(folder))


def with_other_vae(folder):
    return load_vae(str(folder / "other_vae"), load_pipeline(folder), torch.float32)


LOADERS = {
    "unet": (load_pipeline, load_backbone, load_denoiser),
    "vae": (load_pipeline, load_backbone),
    "text_encoder": (load_pipeline, encode),
    "controlnet": (with_controlnet,),
    "other_vae": (with_other_vae,),
}


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(loader, folder):
    """The line with which a loader refuses a folder."""
    with pytest.raises(WadiError) as caught:
        loader(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drop(tensors):
    del tensors[max(tensors)]


def reshape(tensors):
    tensors[max(tensors)] = torch.zeros(3, 5)


def poison(tensors):
    tensors[max(tensors)].view(-1)[0] = float("nan")


def swell(tensors):
    tensors[max(tensors)].view(-1)[0] = float("inf")


def add(tensors):
    tensors["layers_of_another.weight"] = torch.zeros(2)


BROKEN_TENSORS = {
    drop: "weights missing: 1, such as ",
    reshape: "weights of another shape than its config.json says: 1, such as ",
    poison: "not all finite",
    swell: "not all finite",
    add: "weights that its config.json does not describe: 1, such as layers_of_another.weight",
}


def everywhere(changes):
    """Pairs of a part and a change: the U-Net with each change, and each other part with some of them."""
    others = [part for part in FILES if part != "unet"]
    pairs = [("unet", change) for change in changes]
    return pairs + [(others[i % len(others)], change) for i, change in enumerate(changes)]


@pytest.mark.parametrize(("part", "change"), everywhere(BROKEN_TENSORS))
def test_weights_that_are_not_the_networks(model, part, change):
    rewrite(model / FILES[part], change)
    for loader in LOADERS[part]:
        line = refused(loader, model)
        assert part in line
        assert BROKEN_TENSORS[change] in line


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path):
    path.rename(path.with_name("diffusion_pytorch_model.bin"))


def renamed(path):
    path.rename(path.with_name("weights.safetensors"))


BROKEN_FILES = {
    cut: "could not read the safetensors file",
    lambda path: path.write_bytes(b""): "could not read the safetensors file",
    lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 3): "could not read",
    lambda path: save_file({}, path): "holds no tensors",
    pickled: "wadi convert",
    renamed: "give the file this name",
    Path.unlink: "is missing; fetch the folder again",
    lambda path: path.with_name("config.json").unlink(): "holds no config.json",
    lambda path: path.with_name("config.json").write_text("{"): "not valid JSON",
    lambda path: path.with_name("config.json").write_text("[]"): "not a configuration",
}


@pytest.mark.parametrize(("part", "change"), everywhere(BROKEN_FILES))
def test_files_that_cannot_be_read(model, part, change):
    change(model / FILES[part])
    for loader in LOADERS[part]:
        line = refused(loader, model)
        assert part in line
        assert BROKEN_FILES[change] in line or "is None" in line


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_configuration_of_another_network(model, part):
    edit(model / part / "config.json", layers_per_block=2)
    assert f"{part}: weights " in refused(load_pipeline, model).replace(f"/{WEIGHTS}", "")
    edit(model / part / "config.json", layers_per_block=1, block_out_channels=[32, 64])
    assert "of another shape" in refused(load_pipeline, model)


def test_a_shard_is_missing(model):
    unet = load_pipeline(model).unet
    (model / FILES["unet"]).unlink()
    unet.save_pretrained(model / "unet", max_shard_size="100KB")
    assert len(load_pipeline(model).unet.state_dict()) == len(load_file_of(model / "unet"))
    first = min((model / "unet").glob("*.safetensors"))
    first.unlink()
    for loader in LOADERS["unet"]:
        assert f"1 are missing, such as {first.name}" in refused(loader, model)


def load_file_of(folder):
    return {key for path in folder.glob("*.safetensors") for key in load_file(path)}


def test_harmless_keys_load(model):
    expected = load_pipeline(model)
    rewrite(
        model / FILES["text_encoder"],
        lambda tensors: tensors.update(
            {f"text_model.{key}": tensors.pop(key) for key in list(tensors)}
            | {"text_model.embeddings.position_ids": torch.arange(32)[None]}
        ),
    )

    def old(tensors):
        for key in list(tensors):
            name = key.replace(".to_out.0.", ".proj_attn.")
            for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
                name = name.replace(f".{new}.", f".{before}.")
            tensors[name] = tensors.pop(key)

    rewrite(model / FILES["vae"], old)
    assert any(".proj_attn." in key for key in load_file(model / FILES["vae"]))
    loaded = load_pipeline(model)
    for part in ("vae", "text_encoder"):
        states = [getattr(pipeline, part).state_dict() for pipeline in (expected, loaded)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("parts", [("unet",), ("vae", "text_encoder"), tuple(FILES)])
def test_variants_are_found_from_the_files(model, parts):
    for part in parts:
        path = model / FILES[part]
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    for part in parts:
        for loader in LOADERS[part]:
            loader(model)
    if "unet" in parts:  # of both, the plain file is read
        path = model / FILES["unet"]
        variant = path.with_name(path.name.replace(".safetensors", ".fp16.safetensors"))
        shutil.copy(variant, path)
        rewrite(variant, drop)
        load_pipeline(model)


def test_a_variant_in_shards(model):
    unet = load_pipeline(model).unet
    (model / FILES["unet"]).unlink()
    unet.save_pretrained(model / "unet", max_shard_size="100KB", variant="fp16")
    assert len(list((model / "unet").glob("*.safetensors"))) > 1
    loaded = load_pipeline(model).unet.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in unet.state_dict().items())


@pytest.mark.parametrize("length", [None, 512, 20])
def test_the_encoders_positions_bound_prompts(model, length):
    path = model / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length")
    path.write_text(json.dumps(config | ({} if length is None else {"model_max_length": length})))
    bound = length if length == 20 else 32
    assert load_pipeline(model).tokenizer.model_max_length == bound
    assert encode(model)["encoder_hidden_states"].shape[1] == bound
    student = StudentPipeline.from_pretrained(model)
    student("a cat", seed=0)
    with pytest.raises(WadiError, match=f"the model takes {bound}"):
        student("a cat " * 20)


def test_what_making_an_image_does_not_need_is_not_loaded(model, tmp_path):
    for number, checker in enumerate((None, "pytorch_model.bin")):
        index = {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
        }
        edit(model / "model_index.json", **index)
        if checker is not None:
            (model / "safety_checker").mkdir()
            (model / "safety_checker" / checker).write_bytes(b"not looked at")
        student = StudentPipeline.from_pretrained(model)
        student.save_pretrained(tmp_path / f"out-{number}")
        stock = StableDiffusionPipeline.from_pretrained(tmp_path / f"out-{number}")
        assert stock.safety_checker is None
        assert stock.config.requires_safety_checker is False


UNETS = {
    "inpainting": ({"in_channels": 9}, "takes 9 channels and gives 4"),
    "class": ({"num_class_embeds": 10}, "takes a class"),
    "class type": ({"class_embed_type": "timestep"}, "takes a class"),
    "SD XL": (
        {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
        "addition_embed_type 'text_time'",
    ),
    "LCM": ({"time_cond_proj_dim": 32}, "latent consistency"),
    "image prompt": ({"encoder_hid_dim_type": "image_proj"}, "no text embeddings"),
    "no size": ({"sample_size": None}, "sample_size is None"),
    "other latents": ({"in_channels": 16, "out_channels": 16}, "different models"),
    "other encoder": ({"cross_attention_dim": 64}, "width 64"),
}


@pytest.mark.parametrize("kind", UNETS)
def test_networks_that_cannot_be_used(model, kind):
    fields, message = UNETS[kind]
    edit(model / "unet/config.json", **fields)
    for loader in (*LOADERS["unet"], encode):
        line = refused(loader, model)
        assert message in line
        assert str(model / "unet") in line


INDEXES = {
    "unknown pipeline": ({"_class_name": "NoSuchPipeline"}, "no such class"),
    "no pipeline": ({"_class_name": None}, "no such class"),
    "unknown part": ({"unet": ["diffusers", "NoSuchModel"]}, "lists unet as NoSuchModel"),
    "no network": ({"unet": [None, None]}, "lists no unet"),
    "no encoder": ({"text_encoder": [None, None]}, "lists no text_encoder"),
    "no autoencoder": ({"vae": [None, None]}, "lists no vae"),
    "missing folder": ({"vae": ["diffusers", "NoSuchModel"]}, "lists vae"),
    "not a class": ({"scheduler": ["diffusers", 7]}, "lists scheduler as 7"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_broken_indexes(model, kind):
    fields, message = INDEXES[kind]
    edit(model / "model_index.json", **fields)
    for loader in (load_pipeline, load_denoiser, load_backbone, encode):
        assert message in refused(loader, model)


@pytest.mark.parametrize("content", ["{", "[1]", "", "7"])
def test_an_index_that_is_none(model, content):
    (model / "model_index.json").write_text(content)
    for loader in (load_pipeline, load_denoiser, load_backbone, encode):
        assert "model_index.json" in refused(loader, model)


def test_a_tokenizer_without_its_words(model):
    for path in (model / "tokenizer").glob("*.json"):
        if path.name != "tokenizer_config.json":
            path.unlink()
    for loader in (load_pipeline, encode):
        assert "holds no vocabulary" in refused(loader, model)


def test_a_tokenizer_of_another_model(model):
    edit(model / "text_encoder/config.json", vocab_size=100)
    assert "different models" in refused(encode, model)


def _run(whole, folder):
    (folder / "adapter").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).write_text("")
    return folder


def _holding(name, content=b"x"):
    def make(whole, folder):
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder

    return make


def _file(name):
    return lambda whole, folder: _holding(name)(whole, folder) / name


def _made(whole, folder):
    folder.mkdir()
    return folder


MISTAKES = {
    "nothing": (lambda whole, folder: folder, "no such folder"),
    "empty": (_made, "it is empty"),
    "part": (lambda whole, folder: whole / "unet", "a part of one; name"),
    "adapter": (_holding("adapter_config.json", b"{}"), "name it as --adapter"),
    "unfinished run": (_run, "--resume-from-checkpoint"),
    "network": (_holding("config.json", b"{}"), "of one network"),
    "checkpoint": (_file("model.safetensors"), "wadi generate --model"),
    "pickled checkpoint": (_file("model.ckpt"), "can run code"),
    "folder of a checkpoint": (_holding("sd.safetensors"), "wadi generate --model"),
    "text file": (_file("notes.txt"), "is one file"),
    "other folder": (_holding("notes.txt"), "name one with a model_index.json"),
    "parent": (lambda whole, folder: whole.parent, "name one, such as"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_is_named_by_mistake(whole, tmp_path, kind):
    make, message = MISTAKES[kind]
    folder = make(whole, tmp_path / "named")
    for loader in (load_pipeline, load_denoiser, load_backbone, encode):
        assert message in refused(loader, folder)


def test_a_hub_id_without_a_network_is_one_line():
    for loader in (load_pipeline, load_denoiser, load_backbone, encode):
        line = refused(loader, "owner/no-such-model")
        assert "could not be fetched from the hub" in line
        assert "name the folder" in line


def test_a_run_stands_for_its_pipeline(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run/pipeline")
    with pytest.warns(WadiWarning, match="its pipeline is used"):
        loaded = load_pipeline(tmp_path / "run")
    assert torch.equal(loaded.unet.conv_in.weight, load_pipeline(whole).unet.conv_in.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        load_pipeline(tmp_path / "run/pipeline")


def test_images_that_are_not_square(model):
    edit(model / "unet/config.json", sample_size=[8, 16])
    assert StudentPipeline.from_pretrained(model)("a cat", seed=0)[0].size == (32, 16)
    assert load_backbone(model).latent_shape == (4, 8, 16)


@pytest.mark.parametrize("name", ["cuda:99", "mps:7", "nonsense", "meta", "", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(WadiError, match=r"is not on this machine; name one of cpu"):
        chosen_device(name)


def test_a_device_that_is_there():
    assert chosen_device("cpu") == "cpu"
    assert chosen_device() in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["StableDiffusion3", "Sana", "ZImage"])
def test_no_guidance_is_said_as_each_pipeline_understands_it(name):
    """The next larger value is guidance: 1 is none for most, and w = 2 for Z-Image."""
    kind = getattr(diffusers, f"{name}Pipeline")
    pipeline = object.__new__(kind)
    (scale,) = guidance_arguments(pipeline).values()
    for value, guided in ((scale, False), (scale + 0.1, True)):
        vars(pipeline)["_guidance_scale"] = value
        assert pipeline.do_classifier_free_guidance == guided


@pytest.mark.parametrize("name", ["Flux", "QwenImage"])
def test_a_pipeline_with_a_true_guidance_keeps_the_other(name):
    """There guidance_scale is an input of the network, as it was trained with it."""
    kind = getattr(diffusers, f"{name}Pipeline")
    parameters = inspect.signature(kind.__call__).parameters
    assert guidance_arguments(object.__new__(kind)) == {"true_cfg_scale": 1.0}
    assert {"true_cfg_scale", "guidance_scale"} <= parameters.keys()
