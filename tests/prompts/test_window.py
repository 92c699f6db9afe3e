"""Conditions of the next steps: those of the whole set, whatever is asked for and in whatever order."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import PROMPTS, tiny_pipeline, tiny_sd3, tiny_sdxl
from wadi.backbones import load_prompt_encoder
from wadi.distill.draws import Draws
from wadi.errors import WadiError, WadiWarning
from wadi.prompts import EmbeddingCache, Window, window

SET = [f"{prompt} {number}" for number in range(9) for prompt in PROMPTS]
BUILD = {"sd": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3}


def drawn(step, n=2):
    return Draws(3, step, torch.device("cpu")).prompts(n, len(SET))


def make(encoder, n=2, **options):
    options = {"limit": 2**30, "size": 1000} | options
    return Window(encoder, SET, lambda step: drawn(step, n), n, **options)


def take_steps(source, steps):
    for step in range(steps):
        source.take(drawn(step), step=step)


@pytest.fixture(scope="module", params=BUILD)
def encoded(request, tmp_path_factory):
    """A way to load encoders, and the whole set as one of them encodes it."""
    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param]().save_pretrained(folder / "pipeline")
    encoder = load_prompt_encoder(folder / "pipeline")
    return lambda: load_prompt_encoder(folder / "pipeline"), EmbeddingCache(encoder, folder / "e").encode(
        SET
    )[0]


@pytest.mark.parametrize("n", [1, 3, 9])
def test_conditions_are_those_of_the_whole_set_to_rounding(encoded, monkeypatch, n):
    """Groups of several steps, and a step of more prompts than a group."""
    monkeypatch.setattr(window, "GROUP", 6)
    load, whole = encoded
    source = make(load(), n)
    try:
        for step in range(8):
            found = source.take(drawn(step, n), step=step)
            expected = whole.take(drawn(step, n))
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
                assert tensor.dtype == expected[name].dtype
    finally:
        source.close()
    assert len(source) == len(SET)
    assert source.encoder.pipeline.text_encoder is None


@pytest.fixture(scope="module")
def straight(teacher_folder):
    """The encoder's folder, and the conditions of 30 steps in order, in memory for all groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "GROUP", 6)
        source = make(load_prompt_encoder(teacher_folder))
        found = [source.take(drawn(step), step=step)["encoder_hidden_states"] for step in range(30)]
        source.close()
    return teacher_folder, found


@settings(max_examples=10)
@given(steps=st.lists(st.integers(0, 29), min_size=1, max_size=12), groups=st.integers(2, 5))
def test_bits_depend_on_the_step_alone(straight, steps, groups):
    """Wherever it begins, goes back or jumps ahead, and however many groups it holds."""
    folder, expected = straight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "GROUP", 6)
        source = make(load_prompt_encoder(folder), limit=groups * 6 * 1000 + 999)
        for step in steps:
            found = source.take(drawn(step), step=step)["encoder_hidden_states"]
            assert found.equal(expected[step])
            assert len(source._coming) == source.groups == groups
        source.close()


def test_the_numbers_are_those_that_are_encoded(teacher_folder, monkeypatch):
    monkeypatch.setattr(window, "GROUP", 6)
    source = make(load_prompt_encoder(teacher_folder))
    for steps, whole in ((1, 3), (3, 3), (4, 6)):  # whole groups
        expected = {number for step in range(whole) for number in drawn(step).tolist()}
        assert source.numbers(steps) == sorted(expected)
    source.close()


def test_it_waits_at_its_first_step_and_where_a_group_begins(teacher_folder, monkeypatch):
    monkeypatch.setattr(window, "GROUP", 6)
    source = make(load_prompt_encoder(teacher_folder))
    assert source.waits(4)
    source.take(drawn(4), step=4)
    assert [step for step in range(10) if source.waits(step)] == [0, 3, 6, 9]
    source.close()
    source.close()


@pytest.mark.parametrize(("size", "least"), [(2**20, "0.125"), (1000, "0.001"), (118272, "0.015")])
def test_the_limit_that_the_message_names_is_enough(teacher_folder, size, least):
    encoder = load_prompt_encoder(teacher_folder)
    with pytest.raises(WadiError, match=f"--embeddings-limit .* 64 prompts .* give at least {least}$"):
        make(encoder, limit=2 * 64 * size - 1, size=size)
    assert make(encoder, limit=float(least) * 2**30, size=size).groups >= 2


@pytest.mark.parametrize(
    ("place", "small", "expected"),
    [("auto", 2**31, "meta"), ("auto", 10, "cpu"), ("gpu", 10, "meta")],
)
def test_where_the_text_encoder_stays(teacher_folder, monkeypatch, place, small, expected):
    """On the training's device, for which the device without memory stands here, or on the CPU."""
    monkeypatch.setattr(window, "SMALL", small)
    source = make(load_prompt_encoder(teacher_folder, device="meta"), place=place)
    source._load()
    assert source.encoder.device.type == expected
    assert source.encoder.pipeline.text_encoder.device.type == "cpu"  # moved when it is used
    source.close()
    assert source.encoder.pipeline.text_encoder is None


def test_a_training_that_waits_is_told_once(teacher_folder, monkeypatch):
    monkeypatch.setattr(window, "GROUP", 2)
    monkeypatch.setattr(window, "WAITED", 0.01)
    encoder = load_prompt_encoder(teacher_folder)
    encode = encoder.encode

    def slow(prompts):
        time.sleep(0.03)
        return encode(prompts)

    monkeypatch.setattr(encoder, "encode", slow)
    source = make(encoder)
    with pytest.warns(
        WadiWarning, match="waited .* too slowly; a new run with --text-encoder-device"
    ) as told:
        take_steps(source, 12)
    source.close()
    assert len(told) == 1
    assert source.waited > 0.01
    assert source.encoded >= 12
    assert "encoding prompts" not in "".join(thread.name for thread in threading.enumerate())
