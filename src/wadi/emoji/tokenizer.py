"""The tokenizers of the emoji world, of CLIP's and T5's kinds; every word of the grammar is one token.

Merges and scores are built here, because the trainers of `tokenizers` do not always give the same ids.
"""

from __future__ import annotations

import math
import re
import string
from itertools import pairwise

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

from wadi.emoji.captions import COLOURS, LEADS, PLACES, RELATIONS, SIZES
from wadi.emoji.glyphs import NAMES

MAX_LENGTH = 24
_SPELLED = -12.0  # log probability of a single character: lower than any word's, so that words stay whole


def words_of_the_grammar() -> list[str]:
    """Every word that a caption can hold, in alphabetical order."""
    phrases = (*NAMES, *COLOURS, *LEADS, *PLACES, *RELATIONS, *SIZES, "a", "an", "background")
    return sorted({word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)})


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges after which each word is one symbol.

    The merges of earlier words are applied to a word first, and the symbols that remain are joined from the
    left. Later merges rank lower, so they never change an earlier word.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: merges.get(pair, len(merges)))
            merges.setdefault(best, len(merges))
            symbols = _join(symbols, best)
    return list(merges)


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined, position = [], 0
    while position < len(symbols):
        if tuple(symbols[position : position + 2]) == pair:
            joined.append("".join(pair))
            position += 2
        else:
            joined.append(symbols[position])
            position += 1
    return joined


def build_tokenizer() -> CLIPTokenizer:
    """Build the CLIP tokenizer, always the same."""
    merges = byte_pair_merges(words_of_the_grammar())
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """Build the T5 tokenizer, always the same: a unigram model of the grammar's words and ASCII characters.

    All words are equally likely. It takes as many tokens as `PixArtAlphaPipeline` pads to.
    """
    words = words_of_the_grammar()
    likely = -math.log(len(words))
    characters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"▁{word}", likely) for word in words if len(word) > 1]
    vocab += [(f"▁{letter}", likely if letter in words else _SPELLED) for letter in characters]
    vocab += [("▁", _SPELLED), *((letter, _SPELLED) for letter in characters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, prompts: list[str]) -> torch.Tensor:
    """Tokens (N, 24) int64 of N prompts, padded as StableDiffusionPipeline does.

    PixArtAlphaPipeline pads to more tokens, but masks them, which gives the same images.
    """
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
