"""What is told of a prompt: each tensor is kept in its own layout, in memory and on the disk."""

import contextlib

import pytest
import torch

from wadi.backbones.condition import MASK, STATES, concatenate, pick, without_padding
from wadi.prompts.cache import EmbeddingCache, Embeddings

TOKENS, WIDTH = 7, 4


class TwoEncoders:
    """Encodes as pipelines with two text encoders do: states, a mask, a pooled embedding, and time ids."""

    def __init__(self):
        self.dimensions = {STATES: 3, MASK: 2, "pooled_projections": 2, "time_ids": 2}

    def identity(self):
        return "two encoders"

    def loaded(self):
        return contextlib.nullcontext()

    def encode(self, prompts):
        lengths = torch.tensor([len(prompt.split()) for prompt in prompts])
        mask = torch.arange(TOKENS) < lengths[:, None]
        states = lengths[:, None, None] + torch.arange(TOKENS * WIDTH).view(1, TOKENS, WIDTH) / 100
        return {
            STATES: states * mask[..., None],
            MASK: mask,
            "pooled_projections": torch.randn(len(prompts), 5, generator=torch.Generator().manual_seed(0)),
            "time_ids": torch.arange(6).expand(len(prompts), 6).clone(),
        }


PROMPTS = ["a", "a b c", "a b", "a b c d e", "a b c d e f g", "b", "b c"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("wadi.prompts.cache.SHARD_SIZE", 3)
    return EmbeddingCache(TwoEncoders(), tmp_path)


def test_every_tensor_comes_back_as_it_was_encoded(cache):
    (embeddings,) = cache.encode(PROMPTS)
    assert [shard[STATES].shape[1] for shard in embeddings.shards] == [3, 7, 2]  # cut on the disk
    assert all(shard["pooled_projections"].shape[1] == 5 for shard in embeddings.shards)
    shards = [TwoEncoders().encode(PROMPTS[i : i + 3]) for i in range(0, len(PROMPTS), 3)]
    whole = concatenate(shards)
    order = torch.tensor([6, 0, 4, 4, 2])
    taken = embeddings.take(order)
    assert taken.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(taken[name], whole[name][order], rtol=0, atol=0)


def test_what_is_on_the_disk_is_found_again(cache):
    cache.encode(PROMPTS)
    assert cache.missing(PROMPTS) == []


@pytest.mark.parametrize("name", ["pooled_projections", "time_ids", MASK])
def test_a_shard_of_another_layout_is_encoded_again(cache, name):
    from safetensors.torch import save_file

    (embeddings,) = cache.encode(PROMPTS)
    shard = {key: value.clone() for key, value in embeddings.shards[1].items()}
    save_file(
        shard | {name: shard[name][:, :-1].contiguous()}, cache.entry(PROMPTS) / "shard-000001.safetensors"
    )
    assert cache.missing(PROMPTS) == [1]


def test_without_a_mask_nothing_is_cut_or_filled_up():
    condition = {STATES: torch.randn(4, 3, 2), "text_embeds": torch.randn(4, 9), "scale": torch.randn(4)}
    assert without_padding(condition) is condition
    taken = Embeddings([pick(condition, slice(0, 2)), pick(condition, slice(2, 4))]).take(
        torch.tensor([3, 1])
    )
    for name, tensor in condition.items():
        assert torch.equal(taken[name], tensor[[3, 1]])
