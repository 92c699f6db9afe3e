import torch

from wadi.emoji.captions import is_held_out, parse_caption, sample_captions
from wadi.emoji.glyphs import NAMES
from wadi.emoji.recombine import Recombination
from wadi.emoji.tokenizer import build_tokenizer, tokenize
from wadi.emoji.unet import new_text_encoder, take_states


def drawn(count, share=1.0, seed=0):
    tokenizer = build_tokenizer()
    captions = sample_captions(count, seed)
    ids = tokenize(tokenizer, [caption.text for caption in captions])
    recombination = Recombination(tokenizer, "cpu")
    generator = torch.Generator().manual_seed(seed)
    variants, source = recombination.draw(ids, recombination.facts(captions), share, generator)
    return tokenizer, captions, ids, variants, source


def test_what_is_lent_differs_in_the_emoji_alone():
    tokenizer, captions, ids, variants, _ = drawn(600)
    assert torch.equal(variants[:, 0], ids)
    changed = 0
    for caption, row in zip(captions, variants, strict=True):
        texts = [text.strip() for text in tokenizer.batch_decode(row[1:], skip_special_tokens=True)]
        both, first = map(parse_caption, texts)
        for other, text in zip((both, first), texts, strict=True):
            assert other.text == text  # its article too
            assert not is_held_out(other)
            for name in ("size", "place", "relation", "background", "lead"):
                assert getattr(other, name) == getattr(caption, name)
        assert first.emoji[1:] == caption.emoji[1:]
        changed += both.emoji[0] != caption.emoji[0]
    assert changed > 0.8 * len(captions)


def test_every_token_of_a_name_is_the_captions_own():
    tokenizer, captions, ids, _, source = drawn(600)
    for caption, own, from_which in zip(captions, ids, source, strict=True):
        # one token each: the caption with its names struck out, by text alone
        words, expected = caption.text.split(), []
        names = [NAMES[emoji].split() for emoji in caption.emoji]
        after = 0
        for which, name in enumerate(names):
            start = next(i for i in range(after, 24) if words[i : i + len(name)] == name)
            expected += [(1 + i, 2 * which) for i in range(start, start + len(name))]
            after = start + len(name)
        assert [tokenizer.decode(token).strip() for token in own[1 : 1 + len(words)]] == words
        everywhere = torch.ones(24, dtype=torch.int64)
        for position, which in expected:
            everywhere[position] = which
        assert torch.equal(from_which, everywhere)


def test_share():
    source = drawn(2000, 0.3)[-1]
    taken_apart = (source > 0).any(1).float().mean().item()
    # 2000 draws: standard deviation 0.0102
    assert abs(taken_apart - 0.3) < 0.05


def test_states_are_taken_from_where_the_source_says():
    states = torch.randn(6, 5, 2)
    source = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 1, 0, 0]])
    taken = take_states(states, source)
    for n in range(2):
        for token in range(5):
            assert torch.equal(taken[n, token], states[3 * n + source[n, token], token])


def test_the_emoji_reaches_the_states_of_its_own_name_alone():
    """Every other state is the same whatever the caption itself says there."""
    torch.manual_seed(0)
    text_encoder = new_text_encoder(build_tokenizer())
    _, _, _, variants, source = drawn(50)
    blank = variants.clone()
    blank[:, 0] = 7
    with torch.no_grad():
        a, b = (take_states(text_encoder(v.flatten(0, 1))[0], source) for v in (variants, blank))
    assert torch.equal(a[source != 0], b[source != 0])
    assert not torch.equal(a[source == 0], b[source == 0])
