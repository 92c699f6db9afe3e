"""A word from pictures: the losses against closed forms, and the training on tiny real pipelines."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.tiny import tiny_pipeline
from wadi import WadiError
from wadi.emoji.tokenizer import MAX_LENGTH, build_tokenizer
from wadi.onestep import StudentPipeline, load_embedding, load_pipeline
from wadi.tasks import inversion as module
from wadi.tasks import inversion_word as words
from wadi.tasks.exemplars import Exemplars
from wadi.tasks.inversion import EMBEDDING_FILE, invert, learn_word, learn_words
from wadi.tasks.inversion_config import InvertConfig
from wadi.tasks.inversion_word import focal_density, steering_loss

CONFIG = InvertConfig(examples=Path("pictures"), max_train_steps=2, train_batch_size=3, learning_rate=0.01)


def words_pipeline(prediction_type="epsilon"):
    """A tiny Stable Diffusion whose tokenizer knows words."""
    pipeline = tiny_pipeline(prediction_type, model_max_length=MAX_LENGTH)
    pipeline.tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
        pipeline.text_encoder.get_input_embeddings().weight.data.normal_()
    return pipeline


@pytest.fixture(params=["epsilon", "v_prediction"])
def pipeline(request):
    return words_pipeline(request.param)


def exemplars(*captions, count=2):
    rng = np.random.default_rng(0)
    images = tuple(Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)) for _ in range(count))
    return Exemplars(tuple(Path(f"{i}.png") for i in range(count)), images, captions or None)


PAIRS = exemplars("a panda <R> a rocket", "an owl <R> an egg on a red background")


def test_steering_loss_is_infonce_with_several_positives():
    torch.manual_seed(0)
    relation, positives, negatives = (torch.randn(n, 6, dtype=torch.float64) for n in (2, 3, 5))

    def similarity(a, b):
        return math.exp(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) / 0.07)

    expected = 0.0
    for r in relation:
        near, far = (sum(similarity(r, x) for x in xs) for xs in (positives, negatives))
        expected -= math.log(near / (near + far)) / 2
    assert steering_loss(relation, positives, negatives).item() == pytest.approx(expected, rel=1e-12)
    # lengths do not count, and nothing to be away from costs nothing
    same = steering_loss(3 * relation, 0.5 * positives, 7 * negatives).item()
    assert same == pytest.approx(expected, rel=1e-12)
    assert steering_loss(relation, positives, negatives[:0]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_focal_density_has_its_closed_form(alpha):
    steps = 1000
    density = focal_density(steps, alpha)
    end = torch.arange(1, steps + 1, dtype=torch.float64)
    closed = end / steps - alpha * torch.sin(math.pi * end / steps) / (
        2 * steps * math.sin(math.pi / (2 * steps))
    )
    torch.testing.assert_close(density.cumsum(0), closed, rtol=0, atol=1e-12)
    assert density.min() >= 0
    assert density.sum().item() == pytest.approx(1, abs=1e-12)
    # the last timestep is drawn (1 + alpha) / (1 - alpha) times as often as the first
    assert density[-1].item() * (1 - alpha) == pytest.approx(density[0].item() * (1 + alpha), abs=1e-8)


def test_timesteps_are_drawn_as_often_as_the_density_says():
    word = words.Word(
        words_pipeline(), PAIRS, replace(CONFIG, train_batch_size=20_000), torch.Generator().manual_seed(0)
    )
    counts = torch.histc(word.draw().timesteps.double(), bins=10, min=0, max=1000)
    expected = 20_000 * focal_density(1000, 0.5).view(10, 100).sum(1)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 27.9  # 0.999 quantile of 9 degrees of freedom


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_denoising_loss_is_that_of_the_stock_pipeline_with_the_word(pipeline, vectors):
    token = "<r>"
    shown = replace(PAIRS, captions=tuple(c.replace("<R>", token) for c in PAIRS.captions))
    config = replace(CONFIG, token=token, num_vectors=vectors)
    word = words.Word(pipeline, shown, config, torch.Generator().manual_seed(0))
    word.rows.data = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(1))
    batch = word.draw()
    schedule = module.Schedule.from_config(pipeline.scheduler)
    with words.known_words(pipeline, [word]), torch.no_grad():
        word.ids = words.tokenize_captions(pipeline, word.captions)
        found = module.denoising_losses(pipeline, schedule, [word], [batch])
    pipeline.load_textual_inversion({token: word.rows.detach()})
    prompts = [shown.captions[i] for i in batch.chosen]
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        alpha_squared = pipeline.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noisy = alpha * batch.latents + sigma * batch.noise
        prediction = pipeline.unet(noisy, batch.timesteps, states).sample
    v = pipeline.scheduler.config.prediction_type == "v_prediction"
    target = alpha * batch.noise - sigma * batch.latents if v else batch.noise
    torch.testing.assert_close(found, (prediction - target).square().mean()[None])


def test_latents_are_the_autoencoders_of_the_cut_picture(pipeline):
    means, deviations = words.encode_exemplars(pipeline, PAIRS)
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(PAIRS.images[1].crop((0, 2, 16, 18)))
        latents = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(means[1:], latents.mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(deviations[1:], latents.std * pipeline.vae.config.scaling_factor)


def test_a_word_lowers_the_loss_and_nothing_else_changes(pipeline):
    before = {name: module.state_dict() for name, module in components(pipeline).items()}
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in before.items()}
    config = replace(CONFIG, max_train_steps=40, train_batch_size=6, learning_rate=0.1, steering_weight=0.0)
    learned = learn_word(pipeline, PAIRS, config)
    assert learned.token == "<R>"
    assert learned.kind == "relation"
    assert not learned.interrupted
    assert learned.embedding.shape == (1, 16)
    assert len(learned.losses) == 40
    assert len(pipeline.tokenizer) == len(build_tokenizer())
    for name, module_ in components(pipeline).items():
        assert all(torch.equal(before[name][key], value) for key, value in module_.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in module_.parameters())
    word = words.Word(
        pipeline, PAIRS, replace(config, train_batch_size=200, seed=9), torch.Generator().manual_seed(9)
    )
    batch, losses = word.draw(), []
    schedule = module.Schedule.from_config(pipeline.scheduler)
    for rows in (word.rows.data.clone(), learned.embedding):
        word.rows.data = rows
        with words.known_words(pipeline, [word]), torch.no_grad():
            word.ids = words.tokenize_captions(pipeline, word.captions)
            losses.append(module.denoising_losses(pipeline, schedule, [word], [batch]).item())
    assert losses[1] < losses[0]


def components(pipeline):
    return {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}


def test_the_first_update_is_the_rate_times_the_size_of_the_word_it_begins_as():
    pipeline = words_pipeline()
    initial = words.word_embedding(pipeline, "and", "")
    learned = learn_word(pipeline, PAIRS, replace(CONFIG, max_train_steps=1, learning_rate=0.1))
    # AdamW's first update is the rate in every number, whatever the gradient
    size = 0.1 * initial.square().mean().sqrt()
    torch.testing.assert_close((learned.embedding[0] - initial).abs(), size.expand(16), rtol=0.02, atol=0)


def test_words_learned_together_are_those_learned_alone():
    pipeline = words_pipeline()
    jobs = []
    for index in range(3):
        token = f"<r{index}>"
        shown = replace(PAIRS, captions=tuple(c.replace("<R>", token) for c in PAIRS.captions))
        config = replace(
            CONFIG, token=token, seed=index, num_vectors=1 + index % 2, learning_rate=0.01 * index + 0.01
        )
        jobs.append((shown, config))
    together = learn_words(pipeline, jobs)
    for job, found in zip(jobs, together, strict=True):
        alone = learn_word(pipeline, *job)
        torch.testing.assert_close(found.embedding, alone.embedding)
        assert found.losses == pytest.approx(alone.losses)
    with pytest.raises(WadiError, match="a token of its own"):
        learn_words(pipeline, jobs[:1] * 2)


def test_a_strong_steering_loss_brings_the_word_to_the_prepositions():
    pipeline = words_pipeline()
    options = {"max_train_steps": 60, "train_batch_size": 1, "learning_rate": 0.05, "steering_weight": 10.0}
    config = replace(CONFIG, **options, prepositions=("above",), initializer_token="panda")
    learned = learn_word(pipeline, PAIRS, config)
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    ids = pipeline.tokenizer("panda above", add_special_tokens=False).input_ids
    panda, above = torch.nn.functional.cosine_similarity(learned.embedding, table[ids])
    assert above > panda  # as which it began


def test_checkpointing_and_bfloat16_learn_nearly_the_same():
    options = replace(CONFIG, max_train_steps=3)
    plain, twice = (
        learn_word(words_pipeline(), PAIRS, o)
        for o in (options, replace(options, gradient_checkpointing=True))
    )
    torch.testing.assert_close(plain.embedding, twice.embedding)
    half = learn_word(words_pipeline().to(torch.bfloat16), PAIRS, options)
    assert half.embedding.dtype == torch.float32
    assert half.losses == pytest.approx(plain.losses, rel=0.05)


def test_negatives_are_the_objects_of_the_captions():
    pipeline = words_pipeline()
    steer = words.Steering(pipeline, PAIRS.captions, "<R>", CONFIG)
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    for negatives, text in zip(steer.negatives, ("panda rocket", "owl egg red background"), strict=True):
        ids = pipeline.tokenizer(text, add_special_tokens=False).input_ids
        assert torch.equal(negatives, table[sorted(ids)])
    known = [word for word in words.PREPOSITIONS if words.one_token(pipeline, word) is not None]
    assert known == ["above", "and", "at", "in", "left", "of", "on", "right"]
    assert len(steer.positives) == len(known)


def test_a_subject_without_captions_is_learned_from_templates():
    pipeline = words_pipeline()
    learned = learn_word(pipeline, exemplars(count=3), replace(CONFIG, num_vectors=2, token="<s>"))
    assert learned.kind == "subject"
    assert learned.embedding.shape == (2, 16)
    # templates with words that the emoji world does not have are left out
    assert learned.captions == ("a <s>", "a picture of a <s>", "an image of a <s>", "a drawing of a <s>")
    density = words.Word(pipeline, exemplars(), CONFIG, torch.Generator()).density
    torch.testing.assert_close(density, torch.full((1000,), 1e-3, dtype=torch.float64))


@pytest.mark.parametrize("vectors", [1, 2])
def test_diffusers_and_the_one_step_pipeline_read_the_file(tmp_path, vectors):
    pipeline = words_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    config = replace(CONFIG, token="<r>", num_vectors=vectors)
    shown = replace(PAIRS, captions=tuple(c.replace("<R>", "<r>") for c in PAIRS.captions))
    learned = learn_word(pipeline, shown, config)
    assert learned.save(tmp_path / "word") == tmp_path / "word" / EMBEDDING_FILE
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    stock.load_textual_inversion(str(tmp_path / "word"))
    student = StudentPipeline.from_pretrained(tmp_path / "model")
    assert student.load_embedding(tmp_path / "word" / EMBEDDING_FILE) == "<r>"
    prompt, seen = "a cat <r> a dog", []
    for pipe in (stock, student.pipeline):
        hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(
            lambda *call: seen.append(call[2])
        )
        pipe.encode_prompt([prompt], "cpu", 1, False)
        hook.remove()
    for embeddings in seen:  # start, a, cat, then the word
        torch.testing.assert_close(embeddings[0, 3 : 3 + vectors], learned.embedding)
    assert student(prompt, seed=0)[0].size == (16, 16)
    with pytest.raises(WadiError, match="already"):
        student.load_embedding(tmp_path / "word")
    with pytest.raises(WadiError, match="25 tokens and the model takes 24"):
        student("a cat <r> " + "a " * (21 - vectors))


def test_files_that_are_no_word_of_the_model_are_refused(tmp_path):
    pipeline = words_pipeline()
    cases = [
        ({"<r>": torch.zeros(1, 8)}, "has 8 numbers and the model's words have 16"),
        ({"<r>": torch.zeros(1, 16), "other": torch.zeros(1)}, "not one learned word"),
        ({"panda</w>": torch.zeros(16)}, "already, as a token of its own"),
    ]
    for tensors, message in cases:
        module.save_tensors(tmp_path / "word.safetensors", tensors)
        with pytest.raises(WadiError, match=message):
            load_embedding(pipeline, tmp_path / "word.safetensors")
    with pytest.raises(WadiError, match="could not read"):
        load_embedding(pipeline, tmp_path / "nothing.safetensors")


def test_ctrl_c_keeps_what_was_learned(monkeypatch):
    losses, pipeline = module.denoising_losses, words_pipeline()
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(module, "denoising_losses", interrupted)
    learned = learn_word(pipeline, PAIRS, replace(CONFIG, max_train_steps=50))
    assert learned.interrupted
    assert len(learned.losses) == 2
    assert len(pipeline.tokenizer) == len(build_tokenizer())
    assert all(p.requires_grad for p in pipeline.unet.parameters())


def test_a_loss_that_is_not_finite_is_told(monkeypatch):
    pipeline = words_pipeline()
    pipeline.unet.conv_out.weight.data.fill_(math.nan)
    with pytest.raises(WadiError, match="lower --learning-rate"):
        learn_word(pipeline, PAIRS, CONFIG)
    assert len(pipeline.tokenizer) == len(build_tokenizer())


@pytest.mark.parametrize(
    ("caption", "token", "kind"),
    [
        ("a panda <R> a rocket", None, "relation"),
        ("panda <R> rocket", None, "relation"),
        ("a panda <x> a rocket", "<x>", "relation"),
        ("a picture of a <S> on a red background", None, "subject"),
        ("a picture of <x> on a red background", "<x>", "subject"),
        ("a small <S>", None, "subject"),
    ],
)
def test_kind_is_told_from_where_the_word_stands(caption, token, kind):
    found = words.kind_and_token(replace(CONFIG, token=token), exemplars(caption, count=1))
    assert found == (kind, token or {"relation": "<R>", "subject": "<S>"}[kind])


@pytest.mark.parametrize(
    ("options", "shown", "message"),
    [
        ({"num_vectors": 2}, PAIRS, "must be in lower case, as <r>"),
        ({"token": "two words"}, PAIRS, "must be one word"),
        ({"token": "<X>"}, PAIRS, "0.png: <X> is not in its caption"),
        ({"token": "panda</w>"}, exemplars(), "has this word already"),
        ({"kind": "relation"}, exemplars(), "a relation needs captions"),
        ({"initializer_token": "xylophone"}, PAIRS, "--initializer-token xylophone: is not one token"),
        ({"prepositions": ("above", "xylo")}, PAIRS, "--prepositions xylo: is not one token"),
        ({}, exemplars("a panda <R> " + "a cat " * 12, count=1), "29 tokens, but the model takes 24"),
    ],
)
def test_what_cannot_be_learned_is_told(options, shown, message):
    pipeline = words_pipeline()
    with pytest.raises(WadiError, match=message):
        learn_word(pipeline, shown, replace(CONFIG, **options))
    assert len(pipeline.text_encoder.get_input_embeddings().weight) == len(build_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_steps": 0}, "--max-train-steps 0"),
        ({"focal_alpha": 1.5}, "--focal-alpha 1.5"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"steering_weight": -1.0}, "--steering-weight -1.0"),
        ({}, "--model: name the folder"),
    ],
)
def test_options_out_of_range_are_told(options, message):
    with pytest.raises(WadiError, match=message):
        invert(replace(CONFIG, **options))


def test_other_pipelines_are_refused():
    with pytest.raises(WadiError, match="on a StableDiffusionPipeline"):
        learn_words(object(), [])
    with pytest.raises(WadiError, match="predicts 'sample'"):
        learn_words(tiny_pipeline("sample"), [])


def test_a_model_without_prepositions_is_told():
    with pytest.raises(WadiError, match="no English preposition as one token"):
        learn_word(tiny_pipeline(), exemplars("o <R> x", "x <R> o"), CONFIG)


def test_images_that_are_not_square_are_refused(teacher_folder):
    pipeline = load_pipeline(teacher_folder)
    pipeline.unet.register_to_config(sample_size=[8, 16])
    with pytest.raises(WadiError, match="not square"):
        learn_words(pipeline, [])
