"""Which prompts a training takes from its source, and the one clear line for each mistake."""

import sys

import pytest
import torch

from tests.tiny import PROMPTS, tiny_pipeline, tiny_tokenizer
from wadi.backbones import UNetBackbone
from wadi.errors import WadiError
from wadi.prompts import Prompt, check_length, encode_prompts, read_prompts


def test_blank_and_repeated_prompts_are_dropped(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\nb \n  \na\nb\n")
    assert read_prompts(str(tmp_path / "p.txt")) == [Prompt("a", 1), Prompt("b", 3)]


def test_a_dataset_id(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.csv").write_text("\n".join(["caption", *PROMPTS]))
    assert [p.text for p in read_prompts(str(tmp_path), "caption")] == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.parquet", b"not parquet", "not a readable parquet"),
        ("p.docx", b"a", "unknown kind of prompt file"),
    ],
)
def test_bad_files_give_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WadiError, match=message) as error:
        read_prompts(str(path))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(WadiError, match=r"pip install datasets"):
        read_prompts("someone/prompts")


def test_long_prompts_are_counted_and_located():
    tokenizer = tiny_tokenizer(10)  # one token a letter, and two for start and end
    prompts = [Prompt("a" * 8, 1), Prompt("b" * 9, 4), Prompt("c" * 20, 7)]
    check_length(prompts[:1], tokenizer, "p.txt")
    with pytest.raises(
        WadiError, match=r"p\.txt: 2 of 3 .* 10 tokens .* line 4 \(11 tokens\).*--truncate-prompts"
    ):
        check_length(prompts, tokenizer, "p.txt")
    check_length(prompts, tokenizer, "p.txt", truncate=True)


def test_embeddings_are_diffusers_own():
    pipeline = tiny_pipeline()
    encoded = encode_prompts(UNetBackbone(pipeline).text, PROMPTS, [PROMPTS[1], "another"])
    expected, null = pipeline.encode_prompt([*PROMPTS, "another"], "cpu", 1, True)
    states = encoded.embeddings.take(torch.arange(len(PROMPTS)))["encoder_hidden_states"]
    torch.testing.assert_close(states, expected[:-1])
    torch.testing.assert_close(encoded.null["encoder_hidden_states"], null[:1])
    torch.testing.assert_close(encoded.validation["encoder_hidden_states"], expected[[1, -1]])


def test_embeddings_have_the_compute_dtype():
    pipeline = tiny_pipeline()
    pipeline.unet.bfloat16()
    encoded = encode_prompts(UNetBackbone(pipeline).text, ["a"], [])
    assert encoded.null["encoder_hidden_states"].dtype == torch.bfloat16
