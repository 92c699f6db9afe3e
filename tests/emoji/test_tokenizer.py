"""Every word is one token, and the shipped tokenizer is the one that the code builds."""

import pytest
from hypothesis import given
from transformers import CLIPTokenizer

from tests.emoji.cases import captions
from wadi.emoji import teacher_folder
from wadi.emoji.captions import Caption, sample_captions
from wadi.emoji.glyphs import NAMES
from wadi.emoji.tokenizer import MAX_LENGTH, build_tokenizer, byte_pair_merges, words_of_the_grammar

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("word", words_of_the_grammar())
def test_every_word_is_one_token(word):
    start, token, end = TOKENIZER(word).input_ids
    assert (start, end) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert TOKENIZER.convert_ids_to_tokens(token) == f"{word}</w>"


@given(captions)
def test_a_caption_has_as_many_tokens_as_words_and_reads_back(caption):
    ids = TOKENIZER(caption.text).input_ids
    assert len(ids) == len(caption.text.split()) + 2
    assert TOKENIZER.decode(ids, skip_special_tokens=True).strip() == caption.text


def test_the_longest_caption_fits():
    longest = sorted(range(len(NAMES)), key=lambda emoji: len(NAMES[emoji].split()))[-2:]
    caption = Caption(tuple(longest), relation=1, background=0, lead=1)
    assert len(TOKENIZER(caption.text).input_ids) <= MAX_LENGTH


def test_other_words_are_spelled_not_lost():
    assert TOKENIZER.decode(TOKENIZER("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"


def test_merges_leave_earlier_words_alone():
    assert byte_pair_merges(["ab", "abc"]) == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]


def test_shipped_tokenizer_is_this_one():
    shipped = CLIPTokenizer.from_pretrained(teacher_folder() / "tokenizer")
    assert shipped.get_vocab() == TOKENIZER.get_vocab()
    assert shipped.model_max_length == MAX_LENGTH
    texts = [caption.text for caption in sample_captions(200, "tokenizer")] + ["", "zebra, Big PANDA!"]
    assert shipped(texts).input_ids == TOKENIZER(texts).input_ids
