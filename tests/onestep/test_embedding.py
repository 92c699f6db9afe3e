"""Learned words of every kind of file: known under the right name, used where the prompt has them."""

import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline
from wadi.cli import main
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import StudentPipeline, load_embedding
from wadi.onestep.embedding import NAMELESS, as_learned, holds_word

WIDTH = 16


def vectors(count=1, seed=0, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def encoded(pipeline, prompt):
    """What the stock pipeline makes of a prompt, as `StudentPipeline` hands it over."""
    return pipeline.encode_prompt(as_learned(pipeline, [prompt]), "cpu", 1, False)[0]


@pytest.mark.parametrize("tensor", NAMELESS)
def test_a_tensor_that_is_no_word_takes_the_files_name(tmp_path, tensor):
    save_file({tensor: vectors(3)}, tmp_path / "MyWord.safetensors")
    pipeline = tiny_pipeline()
    with pytest.warns(WadiWarning, match=f"name, {tensor.replace('*', '.')}, is not a word; .* name, MyWord"):
        assert load_embedding(pipeline, tmp_path / "MyWord.safetensors") == "MyWord"
    folder = tmp_path / "word of a folder"
    folder.mkdir()
    save_file({tensor: vectors()}, folder / "learned_embeds.safetensors")
    with pytest.warns(WadiWarning):
        assert load_embedding(pipeline, folder) == "word of a folder"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("word", ["myword", "MyWord", "my word", "<R>", "art", "Über-Stil", "v1.5_x"])
def test_a_word_is_found_in_upper_and_lower_case_and_only_where_it_stands(tmp_path, word, count):
    path = tmp_path / "word.safetensors"
    save_file({word: vectors(count)}, path)
    pipeline, plain = tiny_pipeline(), tiny_pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        assert load_embedding(pipeline, path) == word
        for spelled in (word, word.lower(), word.upper()):
            prompt = f"a {spelled}, x"
            ids = pipeline.tokenizer(
                pipeline.maybe_convert_prompt(as_learned(pipeline, [prompt]), pipeline.tokenizer)
            ).input_ids[0]
            rows = pipeline.text_encoder.get_input_embeddings()(torch.tensor(ids))
            assert torch.equal(rows[2 : 2 + count], vectors(count)), prompt
            assert holds_word(pipeline, prompt, word)
    other = f"st{word}en" if word[0].isalnum() else "a cat"
    assert not holds_word(pipeline, other, word)
    assert torch.equal(encoded(pipeline, other), encoded(plain, other))


def test_a_word_within_another_one_is_told_where_diffusers_would_replace_it(tmp_path):
    save_file({"art": vectors(2)}, tmp_path / "art.safetensors")
    pipeline = tiny_pipeline()
    load_embedding(pipeline, tmp_path / "art.safetensors")
    with pytest.warns(WadiWarning, match="has 'art' inside another word too"):
        as_learned(pipeline, ["the start of art"])


def test_the_same_image_from_both_kinds_of_file(tmp_path):
    save_file({"emb_params": vectors(2)}, tmp_path / "myword.safetensors")
    save_file({"myword": vectors(2)}, tmp_path / "other.safetensors")
    images = []
    for name in ("myword", "other"):
        student = StudentPipeline(tiny_pipeline())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WadiWarning)
            assert student.load_embedding(tmp_path / f"{name}.safetensors") == "myword"
        images.append(student("a MYWORD", seed=0, output_type="np"))
    plain = StudentPipeline(tiny_pipeline())("a MYWORD", seed=0, output_type="np")
    assert (images[0] == images[1]).all()
    assert (images[0] != plain).any()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": vectors(), "clip_g": vectors(width=20)}, "a word for SDXL"),
        ({"clip_g": vectors(width=20)}, "a word for SDXL"),
        ({"a": vectors(), "b": vectors()}, "not one learned word .it holds a, b"),
        ({}, "not one learned word .it holds nothing"),
        ({"w": vectors()[None]}, r"w has the shape \(1, 1, 16\)"),
        ({"w": torch.zeros(0, 16)}, "not one learned word"),
        ({"w": torch.zeros(2, 16, dtype=torch.int64)}, "not one learned word"),
        ({"w": vectors(width=20)}, "w has 20 numbers and the model's words have 16"),
        ({"w": vectors() / 0}, "not finite numbers"),
        ({"x": vectors()}, "the model has 'x' already"),
        ({"<|endoftext|>": vectors()}, "already"),
        ({" ": vectors()}, "the model has ' ' already"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "file.safetensors")
    pipeline = tiny_pipeline()
    with pytest.raises(WadiError, match=message) as error:
        load_embedding(pipeline, tmp_path / "file.safetensors")
    assert "file.safetensors" in str(error.value)
    assert len(pipeline.tokenizer) == len(tiny_pipeline().tokenizer)


def test_a_word_is_not_loaded_twice(tmp_path):
    save_file({"myword": vectors(2)}, tmp_path / "a.safetensors")
    save_file({"MyWord": vectors(1)}, tmp_path / "b.safetensors")
    pipeline = tiny_pipeline()
    load_embedding(pipeline, tmp_path / "a.safetensors")
    for name in ("a", "b"):
        with pytest.raises(WadiError, match="the model has 'myword' already"):
            load_embedding(pipeline, tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["word.pt", "word.bin", "word.safetensors"])
def test_pickles_are_refused_unread(tmp_path, name, zipped, monkeypatch):
    torch.save({"string_to_param": {"*": vectors()}}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(
        WadiError, match=rf"is a file of torch\.save, .*wadi convert {tmp_path / name} --out NEW"
    ):
        load_embedding(tiny_pipeline(), tmp_path / name)


def test_the_command_says_which_word_and_whether_the_prompt_has_it(tmp_path, teacher_folder, capsys):
    save_file({"MyWord": vectors(2)}, tmp_path / "word.safetensors")
    command = ["--model", str(teacher_folder), "--embedding", str(tmp_path / "word.safetensors")]
    for prompt, missing in (("a myword", False), ("a cat", True)):
        assert main(["generate", prompt, *command, "--out", str(tmp_path / f"{missing}.png")]) == 0
        said = capsys.readouterr()
        assert "word.safetensors: learned word MyWord" in said.out
        assert ("the prompt does not contain the word MyWord" in said.err) == missing


@pytest.mark.parametrize(
    "content", [lambda rows: {"<cat>": rows}, lambda rows: {"string_to_param": {"*": rows}}]
)
def test_a_pickled_word_is_loaded_after_its_conversion(tmp_path, content, capsys):
    torch.save(content(vectors()), tmp_path / "word.pt")
    assert main(["convert", str(tmp_path / "word.pt"), "--out", str(tmp_path / "word.safetensors")]) == 0
    assert torch.equal(next(iter(load_file(tmp_path / "word.safetensors").values())), vectors())
    with warnings.catch_warnings(record=True):
        assert load_embedding(tiny_pipeline(), tmp_path / "word.safetensors") in ("<cat>", "word")
