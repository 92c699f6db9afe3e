"""The emoji transformer: what it is told, what it minimises, and the whole way to a one-step picture."""

import copy

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline

from wadi.backbones import student_config
from wadi.distill import distill
from wadi.distill.presets import PRESETS
from wadi.emoji import teacher_folder, train_teacher
from wadi.emoji.dit import DiT, new_t5_encoder, new_transformer, predict_noise
from wadi.emoji.evaluate import EvaluateConfig, evaluated_pipeline, pipeline_generator
from wadi.emoji.tokenizer import build_t5_tokenizer, tokenize
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline

CAPTIONS = ["a cat", "a big dog on the left", "", "a cat and a dog"]
NO_SIZE = {"resolution": None, "aspect_ratio": None}
TINY = {"max_train_steps": 2, "train_batch_size": 4, "seconds": 1e9, "pictures": 8, "captions": 60}


def networks(seed=0):
    """Random weights throughout: the last layer of a new transformer is zero."""
    torch.manual_seed(seed)
    transformer, text_encoder = new_transformer(), new_t5_encoder(build_t5_tokenizer())
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return transformer, text_encoder


@pytest.fixture(scope="module")
def train(atlas, tmp_path_factory):
    """A function that trains two steps on latents of the shipped VAE, and returns the folder and figures."""
    folder = tmp_path_factory.mktemp("dit")

    def run(name, **options):
        config = train_teacher.TrainTeacherConfig(
            teacher_folder() / "vae",
            folder / name,
            atlas=atlas,
            architecture="dit",
            device="cpu",
            **TINY,
            **options,
        )
        return config.out, train_teacher.train_teacher(config)

    return run


@pytest.fixture(scope="module")
def dit_folder(train):
    folder, figures = train("teacher", learning_rate=0.5, pair_focus=0.4)  # warm-up makes 1e-3 of it
    assert figures["steps"] == 2
    assert 0.5 < figures["loss"] < 2
    return folder


def test_padding_changes_nothing_and_the_stock_pipeline_tells_the_same():
    transformer, text_encoder = networks()
    tokenizer = build_t5_tokenizer()
    ids = tokenize(tokenizer, CAPTIONS)
    assert ids.shape == (4, 24)
    x, t = torch.randn(4, 4, 16, 16), torch.tensor([3, 400, 700, 999])
    pipeline = PixArtAlphaPipeline(
        tokenizer, text_encoder, vae=None, transformer=transformer, scheduler=DiT().scheduler()
    )
    states, mask, *_ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert states.shape == (4, 120, 128)
    assert mask.sum(1).tolist() == [len(text.split()) + 1 for text in CAPTIONS]
    with torch.no_grad():
        ours = predict_noise(transformer, text_encoder, x, t, ids)
        stock = transformer(x, states, t, NO_SIZE, encoder_attention_mask=mask).sample
    torch.testing.assert_close(ours, stock[:, :4], rtol=1e-4, atol=1e-5)
    assert (ours[0] - ours[3]).abs().max() > 0.1


def test_the_caption_and_the_order_of_its_words_are_seen():
    transformer, text_encoder = networks()
    texts = ["a cat left of a dog", "a dog left of a cat", "a cat"]
    ids = tokenize(build_t5_tokenizer(), texts)
    x = torch.randn(1, 4, 16, 16).expand(3, -1, -1, -1)
    with torch.no_grad():
        first, other, short = predict_noise(transformer, text_encoder, x, torch.tensor([500] * 3), ids)
    assert (first - other).abs().max() > 1e-4
    assert (first - short).abs().max() > 1e-4


def test_autocast_and_compilation_change_only_the_rounding():
    transformer, text_encoder = networks()
    transformer.transformer_blocks = transformer.transformer_blocks[:2]  # all are alike
    ids = tokenize(build_t5_tokenizer(), CAPTIONS)
    x, t = torch.randn(4, 4, 16, 16), torch.tensor([3, 400, 700, 999])
    whole = torch.compile(transformer, fullgraph=True, backend="eager")  # raises at a graph break
    with torch.no_grad():
        expected = predict_noise(transformer, text_encoder, x, t, ids)
        torch.testing.assert_close(predict_noise(whole, text_encoder, x, t, ids), expected)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            rounded = predict_noise(transformer, text_encoder, x, t, ids)
    # bfloat16 holds 8 bits
    assert (rounded.float() - expected).std() < 2e-2 * expected.std()


def one_step(transformer, text_encoder):
    config = train_teacher.TrainTeacherConfig(
        "", "", architecture="dit", train_batch_size=4, max_train_steps=2, device="cpu"
    )
    architecture, networks = DiT(), {"transformer": transformer, "text_encoder": text_encoder}
    training = train_teacher.TeacherTraining(config, architecture, networks)
    ids, latents = architecture.tokens(CAPTIONS), torch.randn(4, 4, 16, 16)
    training.step(latents, ids[:, None], 0, 1e-4, torch.Generator().manual_seed(0))
    return training, latents


def test_rows_that_nobody_reads_are_not_zero():
    """Adapters such as DoRA divide by the norms of rows: a row of zeros would make them NaN at once."""
    norms = new_transformer().proj_out.weight.detach().unflatten(0, (4, 8)).norm(dim=-1)
    assert (norms[:, :4] == 0).all()
    assert (norms[:, 4:] > 0).all()


def test_one_training_step():
    transformer, text_encoder = networks()
    before = copy.deepcopy((transformer, text_encoder))
    training, latents = one_step(transformer, text_encoder)
    # Stable Diffusion's schedule and the loss ||eps(alpha x + sigma n, t, c) - n||^2, written out.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[training.times][:, None, None, None]
    noisy = (kept.sqrt() * latents + (1 - kept).sqrt() * training.noise).float()
    mask = (training.ids[:, 0] != 0).long()
    with torch.no_grad():
        states = before[1](training.ids[:, 0], attention_mask=mask)[0]
        output = before[0](noisy, states, training.times, NO_SIZE, encoder_attention_mask=mask)
    expected = (output.sample[:, :4] - training.noise).square().mean()
    torch.testing.assert_close(training.loss, expected, rtol=1e-4, atol=1e-5)
    # Rows of the last layer are (2 x 2 pixels, 8 channels): those of the learned sigma get no gradient.
    gradient = transformer.proj_out.weight.grad.view(4, 8, -1)
    assert not gradient[:, 4:].any()
    assert gradient[:, :4].abs().amax(-1).min() > 0
    for part in (transformer.caption_projection.linear_1, text_encoder.shared):
        assert part.weight.grad.abs().max() > 0


def test_init_goes_on_exactly(dit_folder, train):
    folder, _ = train("again", init=dit_folder, learning_rate=0.0)
    first, second = (
        PixArtAlphaPipeline.from_pretrained(f, use_safetensors=True) for f in (dit_folder, folder)
    )
    assert not list(folder.rglob("*.bin"))
    for name in ("transformer", "text_encoder", "vae"):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (first, second))
        # Without a learning rate, going on changes nothing but the last bit of the average.
        assert all(torch.allclose(theirs[key], value, rtol=2e-3) for key, value in ours.items())
    kept, _ = train("kept", init=dit_folder, init_share=1.0)
    third = PixArtAlphaPipeline.from_pretrained(kept, use_safetensors=True).transformer.state_dict()
    assert all(torch.equal(third[key], value) for key, value in first.transformer.state_dict().items())


def test_the_stock_pipeline_samples_it(dit_folder):
    """Five guided steps of DDIM, written out."""
    pipeline = PixArtAlphaPipeline.from_pretrained(dit_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.0, "use_resolution_binning": False}
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    prompt = "a big cat on a red background"
    stock = pipeline(prompt, latents=z, output_type="latent", **arguments).images
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    ids, x = tokenize(pipeline.tokenizer, ["", prompt]), z.double()
    for t in range(999, 0, -200):
        with torch.no_grad():
            null, cond = predict_noise(
                pipeline.transformer,
                pipeline.text_encoder,
                x.float().expand(2, -1, -1, -1),
                torch.tensor(2 * [t]),
                ids,
            ).double()
        noise = null + 2.0 * (cond - null)
        clean = (x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()
        before = kept[max(t - 200, 0)]
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    torch.testing.assert_close(stock.double(), x, rtol=1e-3, atol=1e-3 * x.std().item())


def test_from_training_to_a_picture_in_one_step(dit_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(text for text in CAPTIONS if text))
    run = distill(
        PRESETS["emoji-dit"].replace(
            pretrained_model_name_or_path=str(dit_folder),
            prompts=str(tmp_path / "prompts.txt"),
            output_dir=str(tmp_path / "run"),
            train_batch_size=2,
            max_train_steps=2,
            validation_seeds=(3,),
        )
    )
    stock = PixArtAlphaPipeline.from_pretrained(run / "pipeline", torch_dtype=torch.float32)
    picture = stock(
        "a cat",
        num_inference_steps=1,
        guidance_scale=1.0,
        use_resolution_binning=False,
        generator=[torch.Generator().manual_seed(3)],
        output_type="np",
    ).images
    assert picture.shape == (1, 64, 64, 3)
    ours = StudentPipeline.from_pretrained(run / "pipeline")
    assert np.array_equal(picture, ours("a cat", seed=3, output_type="np"))
    student, teacher = (
        pipeline_generator(evaluated_pipeline(EvaluateConfig(dit_folder, adapter, device="cpu")), 1, 1.0)
        for adapter in (run / "adapter", None)
    )
    judged = student(["a cat"], [3])
    # the merged weights of the folder are rounded to the teacher's half precision
    assert np.abs(judged[0].permute(1, 2, 0).numpy() - 255 * picture[0]).max() < 2
    assert not torch.equal(judged, teacher(["a cat"], [3]))
    config = EvaluateConfig(dit_folder, num_inference_steps=2, device="cpu")
    assert pipeline_generator(evaluated_pipeline(config), 2, 2.0)(["a cat"] * 2, [3, 4]).shape == (
        2,
        3,
        64,
        64,
    )


def test_preset_trains_a_tenth_of_the_transformer():
    preset, transformer = PRESETS["emoji-dit"], new_transformer()
    layers = dict(transformer.named_modules())
    count = sum(
        preset.student.rank * (layers[name].out_features + layers[name].in_features // 2)
        for name in student_config(transformer, preset.student.rank).target_modules
    )
    total = sum(parameter.numel() for parameter in transformer.parameters())
    assert count / total == pytest.approx(0.1, abs=0.005)


def test_refusals(train, dit_folder, tmp_path):
    with pytest.raises(WadiError, match=r"--recombine 0\.5: only for"):
        train("recombined", recombine=0.5)
    with pytest.raises(WadiError, match=r"--init .*: holds a StableDiffusionPipeline; --architecture dit"):
        train("other", init=teacher_folder())
    with pytest.raises(WadiError, match=r"model_index.json"):
        train("nothing", init=tmp_path)
    unet = train_teacher.TrainTeacherConfig(tmp_path, tmp_path / "out", init=dit_folder)
    with pytest.raises(WadiError, match=r"holds a PixArtAlphaPipeline; --architecture unet"):
        train_teacher.train_teacher(unet)
