"""What is written holds the files of untouched parts as they were, and loads in stock diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer

from tests.tiny import tiny_tokenizer
from wadi.directions.swap import swap_rows
from wadi.onestep import StudentPipeline, load_embedding, load_pipeline
from wadi.onestep.saving import copy_part, save_pipeline
from wadi.onestep.student import STUDENT_FILE
from wadi.outputs import MARKER

ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def teacher(teacher_folder, tmp_path):
    """Files as public folders have them: an older tokenizer, keys with CLIP's prefix, an origin."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    vocab = tiny_tokenizer().get_vocab()
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    words = {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")}
    config = {"model_max_length": 32, "tokenizer_class": "CLIPTokenizer", **words}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / ENCODER)
    save_file(
        {f"text_model.{key}": tensor for key, tensor in tensors.items()}, folder / ENCODER, {"format": "pt"}
    )
    for part in ("text_encoder", "vae"):
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "/home/someone/model"}))
    return folder


def files(folder):
    """What stock diffusers reads: all but the notes of wadi."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, STUDENT_FILE)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def exported(teacher, out, dtype=None):
    StudentPipeline.from_pretrained(teacher, torch_dtype=dtype).save_pretrained(out)
    return out


def swapped(teacher, out, dtype=None):
    swap_rows(teacher, teacher, "norms", out)
    return out


@pytest.mark.parametrize("write", [exported, swapped])
def test_untouched_parts_are_copied_bit_for_bit(teacher, tmp_path, write):
    written, before = files(write(teacher, tmp_path / "out")), files(teacher)
    for name, content in before.items():
        if name.startswith(("tokenizer", "text_encoder", "vae")) and not name.endswith("/config.json"):
            assert written[name] == content
    assert {name for name in written if not name.startswith("unet")} == {
        name for name in before if not name.startswith("unet")
    }
    assert not any(b"someone" in content or str(teacher).encode() in content for content in written.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_dtype_keeps_the_names_of_the_weights(teacher, tmp_path, dtype):
    out = exported(teacher, tmp_path / "out", dtype)
    for name in (ENCODER, "vae/diffusion_pytorch_model.safetensors"):
        before, after = load_file(teacher / name), load_file(out / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor.to(dtype)) for key, tensor in before.items())
    load_pipeline(out, dtype)


def test_images_are_those_of_the_pipeline(teacher, tmp_path):
    pipeline = StudentPipeline.from_pretrained(teacher)
    pipeline.save_pretrained(tmp_path / "out")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "out").to("cpu")
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    image = stock("a cat", num_inference_steps=1, guidance_scale=1.0, generator=generator, output_type="np")
    expected = pipeline("a cat", seed=3, output_type="np")
    assert (image.images == expected).all()


def test_a_learned_word_is_written(teacher, tmp_path):
    pipeline = load_pipeline(teacher)
    word = {"<cat>": torch.ones(1, 16)}
    save_file(word, tmp_path / "cat.safetensors")
    load_embedding(pipeline, tmp_path / "cat.safetensors")
    (tmp_path / "out").mkdir()
    save_pipeline(pipeline, tmp_path / "out")
    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "out" / ENCODER))
    loaded = load_pipeline(tmp_path / "out")
    index = loaded.tokenizer.convert_tokens_to_ids("<cat>")
    assert torch.equal(loaded.text_encoder.get_input_embeddings().weight[index], word["<cat>"][0])


def test_a_changed_network_is_not_taken_for_the_old_one(teacher, tmp_path):
    pipeline = load_pipeline(teacher)
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[5] += 1
        next(pipeline.vae.parameters()).mul_(2)
    (tmp_path / "out").mkdir()
    save_pipeline(pipeline, tmp_path / "out")
    loaded = load_pipeline(tmp_path / "out")
    for part in ("text_encoder", "vae"):
        state = getattr(loaded, part).state_dict()
        for key, tensor in getattr(pipeline, part).state_dict().items():
            assert torch.equal(state[key], tensor)


def test_another_autoencoder_is_written(teacher, tmp_path):
    pipeline = load_pipeline(teacher)
    pipeline.vae = AutoencoderKL.from_config(pipeline.vae.config, layers_per_block=2)
    (tmp_path / "out").mkdir()
    save_pipeline(pipeline, tmp_path / "out")
    assert load_pipeline(tmp_path / "out").vae.config.layers_per_block == 2


def test_a_bound_length_is_written(teacher, tmp_path):
    path = teacher / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    out = exported(teacher, tmp_path / "out")
    assert json.loads((out / "tokenizer/tokenizer_config.json").read_text()) == {
        **config,
        "model_max_length": 32,
    }
    assert (out / "tokenizer/vocab.json").read_bytes() == (teacher / "tokenizer/vocab.json").read_bytes()


@pytest.mark.parametrize("write", [exported, swapped])
@pytest.mark.parametrize("shards", [False, True])
def test_variants_become_plain_files(teacher_folder, tmp_path, write, shards):
    size = {"max_shard_size": "30KB"} if shards else {}
    load_pipeline(teacher_folder).save_pretrained(tmp_path / "half", variant="fp16", **size)
    out = write(tmp_path / "half", tmp_path / "out")
    assert not [path for path in out.rglob("*") if "fp16" in path.name]
    stock, expected = StableDiffusionPipeline.from_pretrained(out), load_pipeline(teacher_folder)
    for part in ("vae", "text_encoder"):
        state = getattr(stock, part).state_dict()
        for key, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(state[key], tensor)


def test_only_safetensors_are_copied(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("config.json", "model.bin", "model.fp16.bin", "flax_model.msgpack", "vocab.json"):
        (tmp_path / "part" / name).write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "part/model.fp16.safetensors")
    copy_part(tmp_path / "part", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.json",
    ]


def test_a_tokenizer_of_sentencepiece(tmp_path):
    """T5's as PixArt folders have it, spiece.model alone: loads, and is copied as it is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "words.txt").write_text("\n".join(["a red cat and a blue dog", "two green birds in the sun"]))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "spiece.vocab").unlink()
    tokenizer = T5Tokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a red cat").input_ids, skip_special_tokens=True) == "a red cat"
    from wadi.onestep.saving import _save_tokenizer

    _save_tokenizer(tokenizer, folder, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(folder)
