"""The grammar of the emoji world: what a caption states, its text, and how the text is read back.

    a [small|big] NAME [on the left|...] [on a COLOUR background]
    a NAME and|left of|above a NAME [on a COLOUR background]

with an optional beginning ("a picture of"). Captions are drawn with Python's own random generator, which
gives the same sequence in every version of Python: a seed always names the same captions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from wadi.emoji.glyphs import NAMES
from wadi.errors import WadiError
from wadi.files import read_json
from wadi.onestep.arguments import whole_number
from wadi.outputs import Output

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "white")
SIZES = ("small", "big")
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the center")
RELATIONS = ("and", "left of", "above")
LEADS = ("", "a picture of ", "an image of ", "a drawing of ")

Split = Literal["train", "held-out"]
PAIR_SHARE = 0.25
"""Probability that a caption names two emoji."""
KINDS = ("emoji", "size", "relation")
"""What training prompts can name more often; see `Focus`."""
EVALUATED = ("selection", "test")
"""Seeds of the captions on which students are evaluated."""


@dataclass(frozen=True)
class Caption:
    """What one caption states; None stands for what it leaves free.

    Attributes:
        emoji: one or two indices into ``NAMES``.
        size: index into ``SIZES``; single emoji only.
        place: index into ``PLACES``; single emoji only.
        relation: index into ``RELATIONS``; two emoji only.
        background: index into ``COLOURS``.
        lead: index into ``LEADS``.
    """

    emoji: tuple[int, ...]
    size: int | None = None
    place: int | None = None
    relation: int | None = None
    background: int | None = None
    lead: int = 0

    @property
    def text(self) -> str:
        """The text of the caption."""
        size = None if self.size is None else SIZES[self.size]
        words = [with_article(NAMES[self.emoji[0]], size)]
        if self.relation is not None:
            words += [RELATIONS[self.relation], with_article(NAMES[self.emoji[1]])]
        if self.place is not None:
            words.append(PLACES[self.place])
        if self.background is not None:
            words.append(f"on {with_article(COLOURS[self.background])} background")
        return LEADS[self.lead] + " ".join(words)


def with_article(noun: str, adjective: str | None = None) -> str:
    """A noun with its article: ``a panda``, ``an apple``, ``a unicorn``, ``a big apple``."""
    phrase = f"{adjective} {noun}" if adjective else noun
    vowel = phrase[0] in "aeiou" and not phrase.startswith("unicorn")
    return f"{'an' if vowel else 'a'} {phrase}"


def held_out_background(emoji: int | torch.Tensor) -> int | torch.Tensor:
    """The one colour that training never shows behind an emoji, as an index into ``COLOURS``."""
    return (7 * emoji + 3) % len(COLOURS)


def is_held_out_background(emoji: int, background: int) -> bool:
    """Whether training never shows this emoji on this background; each emoji has one such colour of ten."""
    return background == held_out_background(emoji)


def is_held_out_pair(first: int | torch.Tensor, second: int | torch.Tensor) -> bool | torch.Tensor:
    """Whether training never shows these two emoji together, which holds for one pair in ten."""
    return (first + second) % 10 == 0


def is_held_out(caption: Caption) -> bool:
    """Whether a caption states a combination that training never shows."""
    if len(caption.emoji) == 2 and is_held_out_pair(*caption.emoji):
        return True
    return caption.background is not None and any(
        is_held_out_background(emoji, caption.background) for emoji in caption.emoji
    )


@dataclass(frozen=True)
class Focus:
    """How often captions name each emoji, size and relation: weights in the order of the names."""

    emoji: tuple[float, ...]
    size: tuple[float, ...]
    relation: tuple[float, ...]

    @classmethod
    def on_errors(cls, alignment_by: dict[str, dict[str, float]], share: float) -> Focus:
        """Name more often what came out wrong in an evaluation.

        Args:
            alignment_by: for each emoji, size and relation, the share of captions that came out right
                (:func:`wadi.emoji.evaluate.alignment_by`); what is missing counts as right.
            share: share in [0, 1) of the names that are drawn in proportion to how often they came out wrong;
                the others are drawn evenly.
        """

        def weights(kind: str, names: Sequence[str]) -> tuple[float, ...]:
            wrong = [1 - alignment_by.get(kind, {}).get(name, 1.0) for name in names]
            even, total = 1 / len(names), sum(wrong)
            return tuple((1 - share) * even + share * (w / total if total else even) for w in wrong)

        return cls(weights("emoji", NAMES), weights("size", SIZES), weights("relation", RELATIONS))


def _one_of(rng: random.Random, count: int, weights: Sequence[float] | None) -> int:
    return rng.randrange(count) if weights is None else rng.choices(range(count), weights)[0]


def _two_of(rng: random.Random, count: int, weights: Sequence[float] | None) -> tuple[int, ...]:
    if weights is None:
        return tuple(rng.sample(range(count), 2))
    while True:
        two = tuple(rng.choices(range(count), weights, k=2))
        if two[0] != two[1]:
            return two


def sample_caption(
    rng: random.Random, split: Split = "train", pair_share: float = PAIR_SHARE, focus: Focus | None = None
) -> Caption:
    """Draw one caption: two emoji with probability `pair_share`, every attribute stated half the time.

    ``train`` never states a held-out combination, and ``held-out`` always does. A caption of the wrong split
    is drawn again, so a little fewer captions of ``train`` have two emoji: 22 % of them by default. Without a
    focus all emoji, sizes and relations are equally likely.
    """
    emojis, sizes, relations = (focus.emoji, focus.size, focus.relation) if focus else (None, None, None)
    while True:
        pair = rng.random() < pair_share
        emoji = _two_of(rng, len(NAMES), emojis) if pair else (_one_of(rng, len(NAMES), emojis),)
        caption = Caption(
            emoji=emoji,
            size=_one_of(rng, len(SIZES), sizes) if not pair and rng.random() < 0.5 else None,
            place=rng.randrange(len(PLACES)) if not pair and rng.random() < 0.5 else None,
            relation=_one_of(rng, len(RELATIONS), relations) if pair else None,
            background=rng.randrange(len(COLOURS)) if rng.random() < 0.5 else None,
            lead=rng.randrange(1, len(LEADS)) if rng.random() < 0.3 else 0,
        )
        if is_held_out(caption) == (split == "held-out"):
            return caption


def sample_captions(
    count: int,
    seed: int | str,
    split: Split = "train",
    pair_share: float = PAIR_SHARE,
    focus: Focus | None = None,
) -> list[Caption]:
    """Draw `count` captions; a seed gives the same list on every machine."""
    rng = random.Random(f"wadi-emoji-{split}-{seed}")
    return [sample_caption(rng, split, pair_share, focus) for _ in range(count)]


@dataclass
class PromptsConfig:
    """Write training prompts: captions of the emoji world, without combinations kept for the evaluation."""

    out: Path
    """Text file (.txt) to write, a caption in each line."""
    num_prompts: int = 20_000
    """Number of captions."""
    pair_share: float = PAIR_SHARE
    """Probability that a caption names two emoji. A student learns pairs more slowly than single objects."""
    focus_on: Path | None = None
    """File of `wadi emoji evaluate --out`; the emoji, sizes and relations that came out wrong there are named
    more often."""
    focus_share: float = 0.5
    """With --focus-on, the share of captions that name them in proportion to how often they came out wrong;
    the other captions name all of them evenly."""
    seed: str = "distill"
    """Seed of the captions: the same seed gives the same captions everywhere. The defaults give those that
    come with wadi. The seeds `selection` and `test` are kept for the evaluation."""
    overwrite: bool = False
    """Replace the file if it exists."""


def write_prompts(config: PromptsConfig) -> None:
    """Write captions of the emoji world into a text file.

    Raises:
        WadiError: an option is out of its range, or the file may not or cannot be written.
    """
    inputs = (config.focus_on,)
    output = Output(config.out, "emoji prompts", inputs, config.overwrite, suffixes=(".txt",))
    output.check()
    whole_number("--num-prompts", config.num_prompts, 1)
    if not 0 <= config.pair_share <= 1:
        raise WadiError(f"--pair-share: must be between 0 and 1, but is {config.pair_share}")
    if config.seed in EVALUATED:
        raise WadiError(f"--seed: {config.seed} makes the captions of the evaluation; name another seed")
    focus = None if config.focus_on is None else read_focus(config.focus_on, config.focus_share)
    captions = sample_captions(config.num_prompts, config.seed, pair_share=config.pair_share, focus=focus)
    with output.writing() as temporary:
        temporary.write_text("".join(f"{caption.text}\n" for caption in captions), encoding="utf-8")
    pairs = sum(len(caption.emoji) == 2 for caption in captions)
    print(f"{config.out}: {len(captions)} prompts, {pairs / len(captions):.0%} of two objects")


def read_focus(path: Path, share: float) -> Focus:
    """Read from an evaluation what came out wrong there, and focus on it.

    Raises:
        WadiError: not a file of `wadi emoji evaluate --out`, or a share out of its range.
    """
    if not 0 <= share < 1:  # with 1, what is always right would never be named
        raise WadiError(f"--focus-share: must be at least 0 and less than 1, but is {share}")
    try:
        found = read_json(path)["alignment_by"]
        shares = {kind: {name: float(value) for name, value in found[kind].items()} for kind in KINDS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # another file
        raise WadiError(
            f"--focus-on: {path} has no shares by emoji; make it with `wadi emoji evaluate --out`"
        ) from error
    if not all(0 <= value <= 1 for part in shares.values() for value in part.values()):
        raise WadiError(f"--focus-on: {path} has shares that are not between 0 and 1")
    return Focus.on_errors(shares, share)


_NAME = "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True))
_PATTERN = re.compile(
    rf"(?P<lead>{'|'.join(LEADS[1:])})?"
    rf"an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<first>{_NAME})"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)}) an? (?P<second>{_NAME}))?"
    rf"(?: (?P<place>{'|'.join(PLACES)}))?"
    rf"(?: on an? (?P<background>{'|'.join(COLOURS)}) background)?"
)


def parse_caption(text: str) -> Caption:
    """Read the text of a caption back.

    Raises:
        WadiError: the text is not in the grammar.
    """
    match = _PATTERN.fullmatch(text.strip().lower())
    # only single objects have a size and a place
    if match is None or (match["relation"] and (match["size"] or match["place"])):
        raise WadiError(
            f"prompt {text!r}: not a caption of the emoji world, so the judge cannot score it; "
            'write for instance "a big panda on the left on a red background"'
        )

    def index(values: Sequence[str], group: str) -> int | None:
        return None if match[group] is None else values.index(match[group])

    emoji = [NAMES.index(match[group]) for group in ("first", "second") if match[group] is not None]
    return Caption(
        emoji=tuple(emoji),
        size=index(SIZES, "size"),
        place=index(PLACES, "place"),
        relation=index(RELATIONS, "relation"),
        background=index(COLOURS, "background"),
        lead=0 if match["lead"] is None else LEADS.index(match["lead"]),
    )


def stated(captions: Sequence[Caption], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """What captions state, as integer tensors on the device; -1 where nothing is stated.

    Returns:
        ``emoji`` (N, 2) int64 and ``size``, ``place``, ``relation``, ``background`` (N,) int64.
    """

    def column(name: str) -> torch.Tensor:
        values = [getattr(caption, name) for caption in captions]
        return torch.tensor([-1 if value is None else value for value in values], device=device)

    emoji = torch.tensor([(*caption.emoji, -1)[:2] for caption in captions], device=device)
    return {"emoji": emoji, **{name: column(name) for name in ("size", "place", "relation", "background")}}
