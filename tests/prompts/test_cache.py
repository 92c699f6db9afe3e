"""`wadi prompts encode`: encoded once, whatever happens in between."""

import errno
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import PROMPTS
from wadi.backbones import PromptEncoder, load_prompt_encoder
from wadi.cli import main
from wadi.distill import DistillConfig, distill
from wadi.errors import WadiError
from wadi.outputs import MARKER
from wadi.prompts import EmbeddingCache

TEXTS = [f"{prompt} {i}" for i in range(2) for prompt in PROMPTS]


@pytest.fixture
def cache(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("wadi.prompts.cache.SHARD_SIZE", 4)
    return EmbeddingCache(load_prompt_encoder(teacher_folder), tmp_path / "cache")


def counted(monkeypatch, encoder):
    """The prompts that the encoder is asked for, from now on."""
    asked, encode = [], encoder.encode

    def count(prompts, *rest):
        asked.extend(prompts)
        return encode(prompts, *rest)

    monkeypatch.setattr(encoder, "encode", count)
    return asked


def failing_after(monkeypatch, shards, error):
    """Let `shards` files of tensors be written, and fail on the next one."""
    save, left = safetensors.torch.save_file, [shards]

    def write(tensors, path, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(b"half")
            raise error
        return save(tensors, path, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", write)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != MARKER)


def test_an_interrupted_encoding_goes_on_where_it_stopped(cache, teacher_folder, monkeypatch):
    with monkeypatch.context() as patch:
        failing_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            cache.encode(TEXTS)
    assert files(cache.folder) == ["index.json", "shard-000000.safetensors", "shard-000001.safetensors"]
    assert cache.encoder.pipeline.text_encoder is None
    asked = counted(monkeypatch, cache.encoder)
    (embeddings,) = cache.encode(TEXTS)
    assert asked == TEXTS[8:]
    stock = StableDiffusionPipeline.from_pretrained(teacher_folder, safety_checker=None)
    expected = stock.encode_prompt(TEXTS, "cpu", 1, False)[0]
    found = embeddings.take(torch.arange(len(TEXTS)))["encoder_hidden_states"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: {**tensors, "encoder_hidden_states": torch.tensor(1.0)},
        lambda tensors: {name: tensor[:-1] for name, tensor in tensors.items()},
        lambda tensors: {name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()},
        lambda tensors: {"mask": torch.ones(4, 3)},
        lambda tensors: {**tensors, "encoder_attention_mask": torch.ones(4, 3)},
    ],
    ids=["no dimension", "shorter", "narrower", "other tensors", "a tensor more"],
)
def test_a_damaged_shard_is_told_and_encoded_again(cache, monkeypatch, capsys, damage):
    whole = [{k: v.clone() for k, v in shard.items()} for shard in cache.encode(TEXTS)[0].shards]
    path = cache.entry(TEXTS) / "shard-000000.safetensors"
    safetensors.torch.save_file(damage(whole[0]), path)
    asked = counted(monkeypatch, cache.encoder)
    shards = cache.encode(TEXTS)[0].shards
    assert asked == TEXTS[:4]
    assert capsys.readouterr().err.count(f"{path}: damaged; encoding its prompts again") == 1
    assert all(
        torch.equal(shard[name], other[name])
        for shard, other in zip(shards, whole, strict=True)
        for name in other
    )


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(cache, monkeypatch):
    failing_after(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(WadiError, match=r"shard-000001\.safetensors: .*No space left on device") as error:
        cache.encode(TEXTS)
    assert "\n" not in str(error.value)
    assert files(cache.folder) == ["index.json", "shard-000000.safetensors"]


def test_another_encoder_or_other_prompts_are_another_entry(cache, teacher_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    weights = other / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = min(tensors)
    safetensors.torch.save_file(tensors | {name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    changed = EmbeddingCache(load_prompt_encoder(other), cache.folder)
    half = EmbeddingCache(load_prompt_encoder(teacher_folder, torch.bfloat16), cache.folder)
    entries = {
        cache.entry(TEXTS),
        cache.entry(TEXTS[1:]),
        cache.entry(TEXTS[::-1]),
        changed.entry(TEXTS),
        half.entry(TEXTS),
    }
    assert len(entries) == 5
    again = EmbeddingCache(load_prompt_encoder(teacher_folder), cache.folder)
    assert again.entry(TEXTS) == cache.entry(TEXTS)


def test_command_encodes_and_distill_finds_it(teacher_folder, tmp_path, capsys, monkeypatch):
    source, folder = tmp_path / "prompts.txt", tmp_path / "cache"
    source.write_text("\n".join(TEXTS))
    command = ["prompts", "encode", "--teacher", str(teacher_folder), "--prompts", str(source)]
    command += ["--embeddings-dir", str(folder), "--mixed-precision", "no"]
    shown = []
    for _ in range(2):
        assert main(command) == 0
        shown.append(capsys.readouterr().out.split())
    assert [words[words.index("now") + 1] for words in shown] == ["1", "0"]
    monkeypatch.setattr(PromptEncoder, "loaded", lambda self: pytest.fail("the encoder was loaded"))
    run = distill(
        DistillConfig.of(
            pretrained_model_name_or_path=str(teacher_folder),
            prompts=str(source),
            embeddings_dir=str(folder),
            output_dir=str(tmp_path / "run"),
            student_rank=2,
            fake_rank=2,
            max_train_steps=1,
        )
    )
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def test_long_prompts_are_refused(teacher_folder, tmp_path, capsys):
    source = tmp_path / "prompts.txt"
    source.write_text("a cat\n" + "a" * 99)
    assert main(["prompts", "encode", "--teacher", str(teacher_folder), "--prompts", str(source)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_only_a_folder_of_its_own_becomes_the_cache(cache, tmp_path):
    cache.encode(TEXTS)
    assert EmbeddingCache(cache.encoder, cache.folder).missing(TEXTS) == []
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    with pytest.raises(WadiError, match="foreign: is not empty, and wadi prompts encode did not write it"):
        EmbeddingCache(cache.encoder, foreign)
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]
