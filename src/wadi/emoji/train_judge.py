"""`wadi emoji train-judge`: train the judge on endless scenes, and write the statistics of real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from wadi.emoji.captions import Split, sample_captions, stated
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import GRID, Judge, attributes_right
from wadi.emoji.scenes import Scenes, draw, random_scenes, render, sample_scenes
from wadi.emoji.training import TrainOptions, prepare_torch
from wadi.files import save_tensors
from wadi.metrics.frechet import feature_statistics, frechet_distance
from wadi.outputs import Output

REFERENCE_SAMPLES = 10_000
REAL_DISTANCE = 0.19
"""Frechet distance between two sets of 10 000 real images. The features are scaled so that it is this, which
is the unit of every distance of the emoji world."""


@dataclass
class TrainJudgeConfig(TrainOptions):
    """Train the judge of the emoji world and write its reference statistics."""

    out: Path
    """Folder to write: judge.safetensors and reference.safetensors."""
    init: Path | None = None
    """judge.safetensors whose weights the training starts from; random weights if not given."""
    seconds: float = 120.0
    """Training time."""
    train_batch_size: int = 512
    """Images in each step."""
    learning_rate: float = 2e-3
    """Highest learning rate of AdamW; it falls to zero along a cosine of the time used."""


def blemish(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add blur and noise of random strength, so that the judge looks at shapes and not at single pixels.

    Args:
        images: (N, 3, H, W) in [0, 1].
        generator: source of the strengths, on the same device.
    """
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator, device=images.device)
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = torch.outer(binomial, binomial).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    grain = torch.randn(images.shape, generator=generator, device=images.device)
    return images.lerp(blurred, blur) + 0.06 * noise * grain


def judge_loss(out: dict[str, torch.Tensor], scenes: Scenes) -> torch.Tensor:
    """Cross-entropies of cells, presence and background, L1 of boxes and layout."""
    exists = scenes.emoji >= 0
    cell = (scenes.center * GRID).long().clamp(0, GRID - 1)
    index = cell[..., 1] * GRID + cell[..., 0]
    batch = torch.arange(len(scenes), device=index.device)
    target = torch.full((len(scenes), GRID * GRID), len(NAMES), device=index.device)
    box, loss_box = out["box"].flatten(2), 0.0
    for slot in range(2):
        here = index[:, slot]
        target[batch, here] = torch.where(exists[:, slot], scenes.emoji[:, slot], target[batch, here])
        goal = torch.cat([scenes.center[:, slot] * GRID - cell[:, slot], scenes.size[:, slot, None]], 1)
        error = (box[batch, :, here] - goal).abs() * torch.tensor([1.0, 1.0, 4.0], device=goal.device)
        loss_box = loss_box + (error.sum(1) * exists[:, slot]).mean()
    weight = torch.ones(len(NAMES) + 1, device=index.device)
    weight[-1] = 0.2  # 62 of 64 cells are empty
    loss_cells = F.cross_entropy(out["cells"].flatten(2).float(), target, weight=weight)
    present = (
        F.one_hot(scenes.emoji.clamp(min=0), len(NAMES)).mul(exists[..., None]).sum(1).clamp(max=1).float()
    )
    loss_present = F.binary_cross_entropy_with_logits(out["present"].float(), present) * 10
    loss_background = F.cross_entropy(out["background"].float(), scenes.background)
    weights = exists.float() / exists.sum(1, keepdim=True)
    layout = torch.cat(
        [(scenes.center * weights[..., None]).sum(1), (scenes.size * weights).sum(1, keepdim=True)], 1
    )
    loss_layout = (out["layout"].float() - layout).abs().mean() * 4
    return 4 * loss_cells + loss_box + loss_present + loss_background + loss_layout


def train_judge(config: TrainJudgeConfig) -> dict[str, float]:
    """Train, calibrate the unit of the features, write the files; returns the figures on fresh images."""
    output = Output(config.out, "emoji train-judge", (config.init, config.atlas), config.overwrite)
    output.check()
    device = prepare_torch(config)
    judge = Judge() if config.init is None else Judge.load(config.init).requires_grad_(True).train()
    judge.feature_scale.fill_(1.0)
    judge, atlas = judge.to(device), load_atlas(config.atlas).to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    # the judge must also read what training never shows to a generator
    captions = sample_captions(160_000, "judge") + sample_captions(40_000, "judge", "held-out")
    columns = stated(captions, device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=1e-3)
    steps = TimedSteps(config.seconds, config.max_train_steps, "judge")
    for step, used in steps:
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup_cosine(step, used, 100)
        scenes, _ = random_scenes(columns, config.train_batch_size, generator)
        images = blemish(render(scenes, atlas), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = judge(images)
        loss = judge_loss(out, scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps.show(loss)
    return _finish(config, output, judge.eval().requires_grad_(False), atlas)


def real_images(
    captions_seed: str, count: int, atlas: torch.Tensor, seed: int, split: Split = "train"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw real images of `count` captions.

    Returns:
        uint8 (N, 3, 64, 64) on the atlas' device, and what the captions state.
    """
    columns = stated(sample_captions(count, captions_seed, split), atlas.device)
    scenes = sample_scenes(columns, torch.Generator(atlas.device).manual_seed(seed))
    return draw(scenes, atlas), columns


def _finish(config: TrainJudgeConfig, output: Output, judge: Judge, atlas: torch.Tensor) -> dict[str, float]:
    half = Judge().to(atlas.device).eval()
    half.load_state_dict({name: tensor.half().float() for name, tensor in judge.state_dict().items()})
    images, _ = real_images("reference", REFERENCE_SAMPLES, atlas, config.seed + 1)
    others, columns = real_images("real against real", REFERENCE_SAMPLES, atlas, config.seed + 2)
    reference, other = half.read(images), half.read(others)
    raw = frechet_distance(feature_statistics(reference.features), feature_statistics(other.features))
    half.feature_scale.fill_((REAL_DISTANCE / raw) ** 0.5)
    half.feature_scale.copy_(half.feature_scale.half().float())
    features = reference.features * half.feature_scale
    statistics = {**feature_statistics(features), "features": features[: REFERENCE_SAMPLES * 2 // 5].half()}
    with output.writing() as folder:
        half.save(folder / "judge.safetensors")
        save_tensors(folder / "reference.safetensors", statistics)
    right = attributes_right(other, columns)
    unseen, unseen_columns = real_images("unseen", REFERENCE_SAMPLES, atlas, config.seed + 3, "held-out")
    unseen_right = attributes_right(half.read(unseen), unseen_columns)["all"].float().mean().item()
    distance = frechet_distance(
        feature_statistics(features), feature_statistics(other.features * half.feature_scale)
    )
    figures = {f"real_{name}": value.float().mean().item() for name, value in right.items()}
    return {
        "real_frechet_distance": distance,
        "raw_real_frechet_distance": raw,
        **figures,
        "real_held_out_all": unseen_right,
    }
