"""PixArt-alpha: conditions with masks, learned sigma, and the cache that cuts them."""

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

from tests.tiny import tiny_pixart
from wadi.backbones import PixArtBackbone, load_backbone, load_prompt_encoder
from wadi.backbones.condition import concatenate
from wadi.distill.presets import PRESETS
from wadi.files import load_tensors, save_tensors
from wadi.prompts import EmbeddingCache


@pytest.fixture(scope="module")
def pixart_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "pixart"
    tiny_pixart().save_pretrained(folder)
    return folder


def test_prediction_is_the_first_half_of_the_stock_call(pixart_folder):
    backbone, pipeline = load_backbone(pixart_folder), PixArtAlphaPipeline.from_pretrained(pixart_folder)
    assert backbone.pipeline.text_encoder is None
    condition = backbone.text.encode(["a red cat", ""])
    assert backbone.pipeline.text_encoder is None
    states, mask, *_ = pipeline.encode_prompt(["a red cat", ""], do_classifier_free_guidance=False)
    assert torch.equal(condition["encoder_attention_mask"], mask.bool())
    torch.testing.assert_close(condition["encoder_hidden_states"], states)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 999])
    with torch.no_grad():
        ours = backbone.predict(backbone.network, x, t, condition)
        stock = pipeline.transformer(
            x, states, t, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask
        ).sample
    torch.testing.assert_close(ours, stock.chunk(2, dim=1)[0])


def test_prediction_with_micro_conditions():
    """Of a 1024 px model the size and shape of its pictures are part of the condition."""
    pipeline = tiny_pixart()
    torch.manual_seed(1)
    pipeline.transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        norm_type="ada_norm_single",
        use_additional_conditions=True,
    )
    backbone = PixArtBackbone(pipeline)
    condition = backbone.text.encode(["a red cat", "a dog"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 999])
    # 8 latents of 8 pixels
    micro = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        ours = backbone.predict(backbone.network, x, t, condition)
        stock = pipeline.transformer(x, timestep=t, added_cond_kwargs=micro, **condition).sample
        other = pipeline.transformer(
            x, timestep=t, added_cond_kwargs=micro | {"resolution": torch.full((2, 2), 32.0)}, **condition
        ).sample
    torch.testing.assert_close(ours, stock[:, :4])
    assert not torch.allclose(ours, other[:, :4])


def test_complete_cache_loads_no_encoder_and_damage_is_mended(pixart_folder, tmp_path, monkeypatch):
    prompts = [f"cat {'a' * i}" for i in range(5)]
    monkeypatch.setattr("wadi.prompts.cache.SHARD_SIZE", 2)
    encoder = load_prompt_encoder(pixart_folder)
    cache = EmbeddingCache(encoder, tmp_path)
    (embeddings,) = cache.encode(prompts)
    expected = encoder.encode(prompts)
    taken = embeddings.take(torch.tensor([4, 0, 3]))
    mask = taken["encoder_attention_mask"]
    assert torch.equal(mask, expected["encoder_attention_mask"][[4, 0, 3]])
    states = taken["encoder_hidden_states"]
    torch.testing.assert_close(states[mask], expected["encoder_hidden_states"][[4, 0, 3]][mask])
    shard = cache.entry(prompts) / "shard-000001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-7])
    assert cache.missing(prompts) == [1]
    cache.encode(prompts)
    assert shard.read_bytes() == good
    monkeypatch.setattr(encoder, "loaded", lambda: pytest.fail("the encoder was loaded"))
    cache.encode(prompts)
    assert cache.entry(prompts) != cache.entry(prompts[1:])


def test_cut_embeddings_predict_the_same_bits(pixart_folder, tmp_path, monkeypatch):
    """A shard ends with its longest prompt, and the network sees what it saw, forwards and backwards."""
    prompts = ["a dog", "a cat", "x", "moon and sun and stars"]
    monkeypatch.setattr("wadi.prompts.cache.SHARD_SIZE", 2)
    backbone = load_backbone(pixart_folder)
    cache = EmbeddingCache(backbone.text, tmp_path)
    (embeddings,) = cache.encode(prompts)
    # each shard is encoded by itself: other batches are other sums
    whole = concatenate([backbone.text.encode(prompts[:2]), backbone.text.encode(prompts[2:])])
    tokens = whole["encoder_attention_mask"].sum(1)
    longest = tokens.view(2, 2).amax(1).tolist()
    assert [shard["encoder_hidden_states"].shape[1] for shard in embeddings.shards] == longest
    cut = embeddings.take(torch.arange(4))
    assert cut["encoder_hidden_states"].shape == whole["encoder_hidden_states"].shape
    for states, n in zip(cut["encoder_hidden_states"].split(2), longest, strict=True):
        assert not states[:, n:].any()
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([7, 999, 500, 3])
    parameters = list(backbone.network.requires_grad_(True).parameters())
    found = []
    for condition in (cut, whole):
        prediction = backbone.predict(backbone.network, x, t, condition)
        gradients = torch.autograd.grad(prediction.square().sum(), parameters, allow_unused=True)
        found.append([prediction, *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) > len(parameters) // 2
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: {"encoder_hidden_states": tensors["encoder_hidden_states"]},
        lambda tensors: tensors | {"encoder_attention_mask": tensors["encoder_attention_mask"][0]},
        lambda tensors: tensors | {"encoder_attention_mask": torch.ones(2, 0, dtype=torch.bool)},
        lambda tensors: tensors | {"encoder_hidden_states": tensors["encoder_hidden_states"][:, :-1]},
    ],
    ids=["no mask", "mask of one prompt", "empty mask", "cut too short"],
)
def test_a_damaged_shard_alone_is_told_and_encoded_again(pixart_folder, tmp_path, capsys, damage):
    cache = EmbeddingCache(load_prompt_encoder(pixart_folder), tmp_path)
    cache.encode(["a dog", "x"])
    shard = cache.entry(["a dog", "x"]) / "shard-000000.safetensors"
    good = shard.read_bytes()
    save_tensors(shard, damage(load_tensors(shard)))
    capsys.readouterr()
    cache.encode(["a dog", "x"])
    assert shard.read_bytes() == good
    assert capsys.readouterr().err.count(f"{shard}: damaged; encoding its prompts again") == 1


def test_shards_of_another_format_are_another_entry(pixart_folder, tmp_path, monkeypatch):
    cache = EmbeddingCache(load_prompt_encoder(pixart_folder), tmp_path)
    entry = cache.entry(["x"])
    monkeypatch.setattr("wadi.prompts.cache.FORMAT", 1)
    assert cache.entry(["x"]) != entry


@pytest.mark.parametrize("name", ["pixart-256-paper", "pixart-512-paper", "pixart-1024-paper"])
def test_presets_hold_the_papers_values(name):
    preset = PRESETS[name]
    assert (preset.student.rank, preset.fake.rank, preset.student.alpha_T_squared) == (128, 32, 0.0047)
