"""Starting points for `wadi distill`, by name, and the teachers that each is for.

Only the emoji presets were trained: no published weights were available.
"""

from __future__ import annotations

from dataclasses import dataclass

from wadi.distill.config import DistillConfig


@dataclass(frozen=True)
class Fit:
    """The teachers that a preset is for.

    Attributes:
        pipeline: their class of pipeline.
        prediction: what they predict.
        resolution: side of their images in pixels.
    """

    pipeline: str
    prediction: str
    resolution: int


def with_paper_fake(config: DistillConfig, fake_rank: int = 32) -> DistillConfig:
    """The options with the paper's fake model: small, in the attention layers alone, guided, updated once."""
    return config.replace(
        fake_rank=fake_rank,
        fake_layers="attention",
        fake_updates=1,
        fake_guidance_scale=1.5,
        null_prompt_probability=0.1,
    )


def with_equal_fake(config: DistillConfig) -> DistillConfig:
    """The options with a fake model in the student's layers, of the student's rank, updated twice.

    With it the emoji student stays diverse; with the paper's it collapses, at the paper's learning rate too
    (docs/evidence.md, "The fake model").
    """
    return config.replace(fake_rank=config.student.rank, fake_layers="student", fake_updates=2)


_SD, _SDXL, _PIXART = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline"
_SD3, _FLUX, _SANA = "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline"
_KLEIN, _Z_IMAGE, _QWEN = "Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline"
_SMALL = Fit(_SD, "epsilon", 64)


def _emoji(**options: object) -> DistillConfig:
    """For the built-in teacher on a GPU."""
    config = DistillConfig.of(
        output_dir="runs/emoji",
        train_batch_size=128,
        max_train_steps=3200,
        student_rank=24,
        # The teacher alone is guided. The student settles on the guided teacher, and the fake model, which
        # then never gets the empty prompt, cannot be guided.
        guidance_scale=1.5,
        student_learning_rate=3e-3,
        fake_learning_rate=3e-3,
        lr_decay_fraction=0.4,
        ema_decay=0.998,
    )
    return with_equal_fake(config).replace(**options)


def _emoji_presets() -> dict[str, tuple[Fit, DistillConfig]]:
    return {
        # how the training of the shipped student began
        "emoji": (
            _SMALL,
            # A fake model that keeps up: half the distance and more variety (docs/evidence.md, "Objectives").
            _emoji(fake_rank=48, fake_learning_rate=1e-2, max_train_steps=6600),
        ),
        # minutes on two cores
        "emoji-cpu": (
            _SMALL,
            _emoji(
                output_dir="runs/emoji-cpu",
                # With few updates, more guidance reaches sooner what the prompt asks for.
                guidance_scale=2.0,
                train_batch_size=8,
                max_train_steps=210,
                ema_decay=0.98,
                checkpointing_steps=105,
                validation_steps=70,
            ),
        ),
        "emoji-paper": (_SMALL, with_paper_fake(_emoji(output_dir="runs/emoji-paper"), fake_rank=4)),
        # a tenth of the parameters, as the U-Net's adapter has; train the transformer's teacher first
        "emoji-dit": (
            Fit(_PIXART, "epsilon", 64),
            _emoji(output_dir="runs/emoji-dit", student_rank=22, fake_rank=22),
        ),
        # the same of the flow's transformer, with the weight and the fake loss that public code for flows has
        "emoji-flow": (
            Fit(_SD3, "flow_prediction", 64),
            _emoji(
                output_dir="runs/emoji-flow",
                student_rank=18,
                fake_rank=18,
                weighting="normalized",
                fake_weighting="none",
            ),
        ),
    }


def _published(name: str, model: str, **options: object) -> DistillConfig:
    """For a model of the hub: the paper's defaults in bfloat16."""
    start = DistillConfig.of(mixed_precision="bf16", output_dir=f"runs/{name}")
    return start.replace(pretrained_model_name_or_path=model, **options)


def _papers_models() -> dict[str, tuple[Fit, DistillConfig]]:
    """The models that the paper distils."""
    # PixArt's own schedule ends at 4.04e-5 and would magnify errors of epsilon 157 times instead of 15.
    pixart = {"student_rank": 128, "alpha_T_squared": 0.0047}
    rows = (
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", Fit(_SD, "epsilon", 512), {}),
        ("sd21-base", "stabilityai/stable-diffusion-2-1-base", Fit(_SD, "epsilon", 512), {}),
        ("sd21", "stabilityai/stable-diffusion-2-1", Fit(_SD, "v_prediction", 768), {}),
        ("pixart-256", "PixArt-alpha/PixArt-XL-2-256x256", Fit(_PIXART, "epsilon", 256), pixart),
        ("pixart-512", "PixArt-alpha/PixArt-XL-2-512x512", Fit(_PIXART, "epsilon", 512), pixart),
        (
            "pixart-1024",
            "PixArt-alpha/PixArt-XL-2-1024-MS",
            Fit(_PIXART, "epsilon", 1024),
            {**pixart, "gradient_checkpointing": True},
        ),
    )
    found = {}
    for name, model, fit, options in rows:
        found[name] = (fit, with_equal_fake(_published(name, model, **options)))
        authors = f"{name}-paper"
        found[authors] = (fit, with_paper_fake(_published(authors, model, **options)))
    return found


def _other_models() -> dict[str, tuple[Fit, DistillConfig]]:
    """Models that the paper does not distil. Nothing was trained at their size."""
    # the fake model's rate is a guess: so large a fake model needs less than the paper's rate
    common = {
        "gradient_checkpointing": True,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "student_rank": 64,
        "fake_learning_rate": 1e-3,
    }
    # public code for flows has DMD's weight, and a fake model that learns v itself; the guidance is that of
    # the stock pipelines
    flow = {**common, "weighting": "normalized", "fake_weighting": "none"}
    rows = (
        ("sd3-medium", "stabilityai/stable-diffusion-3-medium-diffusers", _SD3, 7.0),
        ("sd35-medium", "stabilityai/stable-diffusion-3.5-medium", _SD3, 4.5),
        ("sd35-large", "stabilityai/stable-diffusion-3.5-large", _SD3, 4.5),
        ("flux-dev", "black-forest-labs/FLUX.1-dev", _FLUX, 3.5),
        ("flux-schnell", "black-forest-labs/FLUX.1-schnell", _FLUX, 1.0),
        ("sana-1.6b", "Efficient-Large-Model/Sana_1600M_1024px_diffusers", _SANA, 4.5),
        ("sana-0.6b", "Efficient-Large-Model/Sana_600M_1024px_diffusers", _SANA, 4.5),
        ("klein-4b", "black-forest-labs/FLUX.2-klein-base-4B", _KLEIN, 4.0),
        ("klein-9b", "black-forest-labs/FLUX.2-klein-base-9B", _KLEIN, 4.0),
        ("z-image", "Tongyi-MAI/Z-Image", _Z_IMAGE, 6.0),
        ("qwen-image", "Qwen/Qwen-Image", _QWEN, 4.0),
    )
    sdxl = _published("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", **common)
    found = {"sdxl": (Fit(_SDXL, "epsilon", 1024), with_equal_fake(sdxl))}
    for name, model, pipeline, guidance_scale in rows:
        config = _published(name, model, guidance_scale=guidance_scale, **flow)
        found[name] = (Fit(pipeline, "flow_prediction", 1024), with_equal_fake(config))
    return found


_ALL = _emoji_presets() | _papers_models() | _other_models()
PRESETS = {name: config.replace(preset=name) for name, (_, config) in _ALL.items()}
"""The options of each preset. A name that ends in -paper has the fake model of the paper's authors. The
others have one that kept the emoji student diverse."""
FITS = {name: fit for name, (fit, _) in _ALL.items()}
"""The teachers of each preset."""
