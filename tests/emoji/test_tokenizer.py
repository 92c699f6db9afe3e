"""Every word is one token, of both tokenizers; the shipped one is the one that the code builds."""

import pytest
from hypothesis import given
from transformers import CLIPTokenizer, T5Tokenizer

from tests.emoji.cases import captions
from wadi.emoji import teacher_folder
from wadi.emoji.captions import Caption, sample_captions
from wadi.emoji.glyphs import NAMES
from wadi.emoji.tokenizer import (
    MAX_LENGTH,
    build_t5_tokenizer,
    build_tokenizer,
    byte_pair_merges,
    words_of_the_grammar,
)

TOKENIZER, T5_TOKENIZER = build_tokenizer(), build_t5_tokenizer()


def test_every_word_is_one_token():
    for word in words_of_the_grammar():
        start, token, end = TOKENIZER(word).input_ids
        assert (start, end) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
        assert TOKENIZER.convert_ids_to_tokens(token) == f"{word}</w>"
        assert T5_TOKENIZER.convert_ids_to_tokens(T5_TOKENIZER(word).input_ids) == [f"▁{word}", "</s>"]


@given(captions)
def test_a_caption_has_as_many_tokens_as_words_and_reads_back(caption):
    for tokenizer, around in ((TOKENIZER, 2), (T5_TOKENIZER, 1)):
        ids = tokenizer(caption.text).input_ids
        assert len(ids) == len(caption.text.split()) + around
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption.text


def test_the_longest_caption_fits():
    longest = sorted(range(len(NAMES)), key=lambda emoji: len(NAMES[emoji].split()))[-2:]
    caption = Caption(tuple(longest), relation=1, background=0, lead=1)
    assert len(TOKENIZER(caption.text).input_ids) <= MAX_LENGTH
    assert len(T5_TOKENIZER(caption.text).input_ids) <= MAX_LENGTH


@pytest.mark.parametrize("tokenizer", [TOKENIZER, T5_TOKENIZER], ids=["clip", "t5"])
def test_other_words_are_spelled_not_lost(tokenizer):
    assert tokenizer.decode(tokenizer("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"


def test_merges_leave_earlier_words_alone():
    assert byte_pair_merges(["ab", "abc"]) == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]


def test_shipped_tokenizer_is_this_one():
    shipped = CLIPTokenizer.from_pretrained(teacher_folder() / "tokenizer")
    assert shipped.get_vocab() == TOKENIZER.get_vocab()
    assert shipped.model_max_length == MAX_LENGTH
    texts = [caption.text for caption in sample_captions(200, "tokenizer")] + ["", "zebra, Big PANDA!"]
    assert shipped(texts).input_ids == TOKENIZER(texts).input_ids


def test_t5_tokenizer_is_always_the_same_and_loads_from_its_folder(tmp_path):
    T5_TOKENIZER.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.backend_tokenizer.to_str() == build_t5_tokenizer().backend_tokenizer.to_str()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.model_max_length) == (0, 1, 120)
    texts = [caption.text for caption in sample_captions(200, "tokenizer")] + ["", "zebra, Big PANDA! ÿ"]
    assert loaded(texts).input_ids == T5_TOKENIZER(texts).input_ids
    assert loaded("").input_ids == [1]
