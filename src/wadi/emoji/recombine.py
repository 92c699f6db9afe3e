"""Recombination: the state of each word is taken from a caption in which the other emoji were replaced.

In a text encoder with causal attention, the states of "background" and of the end token depend on the emoji
before them. A U-Net that reads the emoji there learns whole captions by heart, and fails on combinations that
it was never shown. Where the other emoji of a caption are random, only the word itself tells what it means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPTokenizer

from wadi.emoji.captions import (
    COLOURS,
    LEADS,
    RELATIONS,
    Caption,
    held_out_background,
    is_held_out_pair,
    with_article,
)
from wadi.emoji.glyphs import NAMES

VARIANTS = 3
"""Captions that are encoded for each caption: itself, all its emoji replaced, only the first one replaced."""


class Recombination:
    """Draws the captions whose states are used.

    Args:
        tokenizer: tokenizer of the emoji world, with one token for each word.
        device: device of the tensors.
    """

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device | str) -> None:
        names = tokenizer(list(NAMES), add_special_tokens=False).input_ids
        self.length = torch.tensor([len(name) for name in names], device=device)
        longest = int(self.length.max())
        self.names = torch.tensor([name + [0] * (longest - len(name)) for name in names], device=device)
        articles = [with_article(name).split()[0] for name in NAMES]
        self.article = torch.tensor(
            [ids[0] for ids in tokenizer(articles, add_special_tokens=False).input_ids], device=device
        )
        emoji = torch.arange(len(NAMES), device=device)
        # alike[e, f]: whether f can replace e without moving the tokens behind it
        self.alike = self.length[:, None] == self.length
        self.together = ~is_held_out_pair(emoji[:, None], emoji) & (emoji[:, None] != emoji)
        self.shown = held_out_background(emoji)[:, None] != torch.arange(len(COLOURS), device=device)

    def facts(self, captions: Sequence[Caption]) -> torch.Tensor:
        """What `draw` must know about captions: (N, 6) int64, on the CPU.

        The columns are the two emoji, the background (-1 if there is none), the positions of the first tokens
        of the two names, and whether a size stands before the first name.
        """
        length, rows = self.length.tolist(), []
        for caption in captions:
            sized = caption.size is not None
            first = 1 + len(LEADS[caption.lead].split()) + 1 + sized  # after the start token
            second = -1
            if caption.relation is not None:
                second = first + length[caption.emoji[0]] + len(RELATIONS[caption.relation].split()) + 1
            background = -1 if caption.background is None else caption.background
            rows.append([*(*caption.emoji, -1)[:2], background, first, second, sized])
        return torch.tensor(rows)

    def draw(
        self, ids: torch.Tensor, facts: torch.Tensor, share: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the captions whose states are used; none states a combination that training never shows.

        Args:
            ids: (N, L) int64, tokens of the captions.
            facts: (N, 6), what `facts` returned for them.
            share: probability that a caption is recombined at all.
            generator: source of the randomness, on the device.

        Returns:
            Tokens (N, 3, L) of each caption and its two variants, and (N, L) int64, which of the three gives
            the state of each token.
        """
        first, second, background, at_first, at_second, sized = facts.unbind(1)
        pair = second >= 0
        other = self._other(first, background, second, generator)
        only_first = self._replaced(ids, at_first, first, other, sized == 0)
        other = self._other(first, background, second, generator)
        both = self._replaced(ids, at_first, first, other, sized == 0)
        other = self._other(second.clamp(min=0), background, other, generator)
        both = torch.where(
            pair[:, None],
            self._replaced(both, at_second.clamp(min=1), second.clamp(min=0), other, pair),
            both,
        )
        position = torch.arange(ids.shape[1], device=ids.device)

        def inside(start: torch.Tensor, emoji: torch.Tensor) -> torch.Tensor:
            offset = position - start[:, None]
            return (offset >= 0) & (offset < self.length[emoji.clamp(min=0)][:, None])

        source = torch.where(inside(at_second, second) & pair[:, None], 2, 1)
        source = torch.where(inside(at_first, first), 0, source)
        apart = torch.rand(len(ids), 1, generator=generator, device=ids.device) < share
        return torch.stack([ids, both, only_first], 1), source * apart

    def _other(
        self, emoji: torch.Tensor, background: torch.Tensor, partner: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Draw emoji (N,) that can replace `emoji` beside this background and partner (-1: none)."""
        allowed = self.alike[emoji]
        allowed = allowed & ((background < 0)[:, None] | self.shown.T[background.clamp(min=0)])
        allowed = allowed & ((partner < 0)[:, None] | self.together[partner.clamp(min=0)])
        # where no other emoji is allowed, the emoji itself stays
        itself = emoji[:, None] == torch.arange(len(NAMES), device=emoji.device)
        allowed = torch.where(allowed.any(1, keepdim=True), allowed, itself)
        # the largest of random numbers, because torch.multinomial would wait for the device
        keys = torch.rand(allowed.shape, generator=generator, device=emoji.device)
        return torch.where(allowed, keys, -1.0).argmax(1)

    def _replaced(
        self,
        ids: torch.Tensor,
        start: torch.Tensor,
        old: torch.Tensor,
        new: torch.Tensor,
        renamed_article: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens (N, L) with the name `new` in place of `old` from `start` on, and its article before it."""
        ids = ids.clone()
        for k in range(self.names.shape[1]):
            at = (start + k).clamp(max=ids.shape[1] - 1)[:, None]
            value = torch.where(k < self.length[old], self.names[new, k], ids.gather(1, at)[:, 0])
            ids.scatter_(1, at, value[:, None])
        before = (start - 1)[:, None]
        article = torch.where(renamed_article, self.article[new], ids.gather(1, before)[:, 0])
        return ids.scatter_(1, before, article[:, None])
