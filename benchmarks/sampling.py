"""How long an image takes: stock diffusers in 25 guided steps and in one, and the fast path.

    python benchmarks/sampling.py --out sampling.json           # Stable Diffusion 1.5 at 512 px, on a GPU
    python benchmarks/sampling.py --model tiny --device cpu      # does it run?

The exact configuration of Stable Diffusion 1.5 with random weights: speed does not depend on what they say.
All rows are timed from the prompt to PIL images on the host. "New prompt": one that was not seen before;
else its embedding is kept by the fast path. Noise is drawn on the device.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wadi._version import __version__
from wadi.files import write_json
from wadi.onestep import StudentPipeline, student_scheduler

STEPS, GUIDANCE_SCALE = 25, 7.5
PROMPT = "a photograph of an astronaut riding a horse"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

SD15 = {
    "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 512,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "tiny_vae": {},
    "text": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
}
"""Where diffusers' and transformers' defaults are not already those of Stable Diffusion 1.5."""

TINY = {
    "unet": {
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {
        "block_out_channels": (8, 8),
        "norm_num_groups": 8,
        "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "tiny_vae": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "text": {
        "vocab_size": 514,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


def tokenizer() -> CLIPTokenizer:
    """One token a byte, padded to 77 like CLIP's; every byte also ends a word."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def build(model: str, device: str, dtype: torch.dtype) -> tuple[StableDiffusionPipeline, AutoencoderTiny]:
    """A pipeline with random weights, made on the device; and an `AutoencoderTiny` for its latents."""
    options, words = (SD15 if model == "sd15" else TINY), tokenizer()
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**options["unet"])
        vae = AutoencoderKL(latent_channels=4, **options["vae"])
        tiny_vae = AutoencoderTiny(**options["tiny_vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_act="quick_gelu", **options["text"], **ids))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="dpmsolver++"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, dtype)
    for module in (unet, vae, tiny_vae):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, tiny_vae.to(device, dtype)


class Stock:
    """The plain pipeline in `steps` steps."""

    def __init__(self, pipeline: StableDiffusionPipeline, steps: int, device: str) -> None:
        self.pipeline, self.steps, self.generator = pipeline, steps, torch.Generator(device)
        self.guidance_scale = GUIDANCE_SCALE if steps > 1 else 1.0
        self.warm_up_seconds = 0.0

    def __call__(self, prompt: str, count: int) -> list:
        return self.pipeline(
            prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            num_images_per_prompt=count,
            generator=self.generator,
        ).images


class Fast:
    """wadi's fast path."""

    def __init__(self, pipeline: StableDiffusionPipeline, mode: str | None, device: str) -> None:
        self.pipeline, self.generator = StudentPipeline(pipeline).compile(mode), torch.Generator(device)

    @property
    def warm_up_seconds(self) -> float:
        return sum(self.pipeline.fast.warmup_seconds.values())

    def __call__(self, prompt: str, count: int) -> list:
        return self.pipeline(prompt, generator=self.generator, num_images_per_prompt=count)


def seconds(
    call: Callable[[], list], repeats: int, limit: float, synchronize: Callable[[], None]
) -> list[float]:
    """Times of up to `repeats` calls, at least three, no new one after `limit` seconds."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < repeats and sum(times) < limit):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def measure(name: str, method: Stock | Fast, arguments: argparse.Namespace) -> dict:
    """One row: medians after a first call of every shape, which compiles and captures."""
    synchronize = torch.cuda.synchronize if arguments.device.startswith("cuda") else (lambda: None)
    row: dict = {"name": name}
    fresh = (f"{PROMPT}, number {i}" for i in range(10_000))
    shapes = (
        ("batch_1", PROMPT, 1),
        ("new_prompt", None, 1),
        (f"batch_{arguments.batch}", PROMPT, arguments.batch),
    )
    for label, prompt, count in shapes:
        start = time.perf_counter()
        for _ in range(1 if isinstance(method, Stock) and method.steps > 1 else 3):
            method(prompt or next(fresh), count)
        synchronize()
        print(f"  {name}, {label}: warm after {time.perf_counter() - start:.1f} s", flush=True)
        times = seconds(
            lambda p=prompt, n=count: method(p or next(fresh), n),
            arguments.repeats,
            arguments.limit,
            synchronize,
        )
        row[label] = {
            "milliseconds": 1000 * statistics.median(times),
            "images_a_second": count / statistics.median(times),
            "calls": len(times),
        }
        print(f"  {name}, {label}: {row[label]['milliseconds']:.2f} ms, {len(times)} calls", flush=True)
    row["warm_up_seconds"] = method.warm_up_seconds
    return row


def table(report: dict) -> str:
    """Markdown: the machine in a line, then a row for each method."""
    batch = report["batch"]
    machine = (
        f"{report['device']}, {report['model']}, {report['pixels']} px, {report['dtype']}, "
        f"compile mode {report['mode']}, torch {report['torch']}, diffusers {report['diffusers']}, "
        f"wadi {report['wadi']}, {report['date']}"
    )
    lines = [
        machine,
        "",
        f"| | ms an image | ms, new prompt | times faster | images/s, batch {batch} | warm-up, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    slowest = report["rows"][0]["batch_1"]["milliseconds"]
    for row in report["rows"]:
        single, new = (row[label]["milliseconds"] for label in ("batch_1", "new_prompt"))
        lines.append(
            f"| {row['name']} | {single:.2f} | {new:.2f} | {slowest / single:.1f} "
            f"| {row[f'batch_{batch}']['images_a_second']:.1f} | {row['warm_up_seconds']:.1f} |"
        )
    return "\n".join(lines)


def machine(arguments: argparse.Namespace, pipeline: StableDiffusionPipeline) -> dict:
    """What the figures hold for."""
    on_gpu = arguments.device.startswith("cuda")
    return {
        "model": "SD 1.5, random weights" if arguments.model == "sd15" else "tiny model, random weights",
        "pixels": pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "mode": arguments.mode or ("default" if on_gpu else "eager"),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "wadi": __version__,
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: argparse.Namespace) -> dict:
    """Run every method, print the table, write the JSON after each row."""
    start = time.perf_counter()
    stock, tiny_vae = build(arguments.model, arguments.device, getattr(torch, arguments.dtype))
    report = {**machine(arguments, stock), "rows": []}
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    one_step = StableDiffusionPipeline(
        **{**stock.components, "scheduler": student_scheduler(stock.scheduler)}
    )
    one_step.set_progress_bar_config(disable=True)
    small = StableDiffusionPipeline(**{**one_step.components, "vae": tiny_vae})
    # the stock pipelines first: compile() changes the U-Net that all share
    methods: list[tuple[str, Callable[[], Stock | Fast]]] = [
        (f"diffusers, {STEPS} guided steps", lambda: Stock(stock, STEPS, arguments.device)),
        ("diffusers, 1 step", lambda: Stock(one_step, 1, arguments.device)),
        ("wadi --fast, not compiled", lambda: Fast(one_step, "eager", arguments.device)),
        ("wadi --fast, not compiled, AutoencoderTiny", lambda: Fast(small, "eager", arguments.device)),
        ("wadi --fast", lambda: Fast(one_step, arguments.mode, arguments.device)),
        ("wadi --fast, AutoencoderTiny", lambda: Fast(small, arguments.mode, arguments.device)),
    ]
    for name, make in methods:
        if arguments.only and name not in arguments.only:
            continue
        report["rows"].append(measure(name, make(), arguments))
        if arguments.out:
            write_json(arguments.out, report)
    report["seconds"] = time.perf_counter() - start
    print(f"\n{table(report)}", flush=True)
    if arguments.out:
        write_json(arguments.out, report)
    return report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--mode", choices=("eager", "default", "max-autotune-no-cudagraphs"))
    parser.add_argument("--batch", type=int, default=16, help="number of images in the larger batch")
    parser.add_argument("--repeats", type=int, default=50, help="calls of each median, at most")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds of each median, about")
    parser.add_argument("--only", nargs="+", help="rows to measure; all if not given")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
