"""The fast path: U-Net, x0, VAE and 8-bit image are compiled, and on CUDA replayed as one graph.

Outside the graph, an image takes only: its noise (with a seed it is drawn on the CPU, to be the same on every
device and in the plain pipeline), two small copies to the device, one copy of the bytes back, and one wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from wadi.diffusion import VariancePreserving
from wadi.errors import WadiError
from wadi.graph import record
from wadi.onestep.arguments import generators_of, image_size, output_kind
from wadi.onestep.output import tell_odd_images

MODES = ("eager", "default", "max-autotune-no-cudagraphs")
"""How U-Net and VAE are compiled: not at all ("eager"), or by a mode of `torch.compile`."""

MAX_PROMPTS = 256
"""Number of embeddings that are kept. One takes 118 kB for Stable Diffusion 1.5 in half precision."""

MAX_SHAPES = 8
"""Number of graphs that are kept: one for each number of images, height and width."""


class FastPath:
    """Makes the images of a one-step pipeline with as little work on the host as possible.

    - U-Net and VAE decoder are compiled, with fused projections of attention, and channels last on CUDA.
    - On CUDA one graph for each shape holds all work from the noise to the bytes. Elsewhere it runs as usual.
    - The embedding of a prompt is computed once and kept.
    - x0 is computed in float32, as in `Float32Step`.

    Args:
        pipeline: a `StableDiffusionPipeline` with a one-step scheduler and no adapter left to merge. Its
            U-Net and VAE are changed in place: layout and fused projections, not what they compute.
        mode: one of `MODES`. ``None`` means "default" on CUDA and "eager" elsewhere, where compiling needs a
            C++ compiler and takes longer than a few images.
        batch_size: number of images in one graph. More images are made in several batches, and the last
            batch is padded. ``None`` takes the number that a call asks for, with a graph for each number.

    Attributes:
        warmup_seconds: (batch, height, width) -> seconds for compiling and capturing.

    Raises:
        WadiError: the pipeline is of another kind or has an unmerged adapter, or mode or batch size is wrong.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, mode: str | None = None, batch_size: int | None = None
    ) -> None:
        _check_pipeline(pipeline)
        self.pipeline = pipeline
        # once: diffusers looks at every parameter to answer, 1 ms for Stable Diffusion's U-Net
        self.device, self.dtype = pipeline.unet.device, pipeline.unet.dtype
        self.vae_dtype = pipeline.vae.dtype
        self.mode = mode or ("default" if self.device.type == "cuda" else "eager")
        if self.mode not in MODES:
            raise WadiError(f"mode: {mode!r} is unknown; use one of {', '.join(MODES)}")
        if batch_size is not None and batch_size < 1:
            raise WadiError(f"batch_size: {batch_size} is less than 1; use 1 or more")
        self.batch_size = batch_size
        self.warmup_seconds: dict[tuple[int, int, int], float] = {}
        self._prepare_modules()
        self._one_step = _OneStep(pipeline, self.mode)
        self._embeds: dict[str, torch.Tensor] = {}
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Make one image of every entry of `prompts`, N in all.

        Args:
            prompts: one for each image; they may repeat.
            generator: as in diffusers, one, or one for each image. The noise is drawn on the device of the
                generators, or on the pipeline's if there are none. CUDA generators avoid a copy.
            height: pixels; the model's own when ``None``.
            width: pixels; the model's own when ``None``.
            output_type: "pil"; "np", float32 (N, height, width, 3) in [0, 1]; "pt", the same values as
                (N, 3, height, width) on the device; or "latent", x0 in the VAE's dtype. The call does not
                wait for "pt", so it then warns only about images that the safety checker flagged.

        Raises:
            WadiError: a size or an output type is not possible, or the number of generators is wrong.
        """
        output_type = output_kind(output_type)
        height, width = image_size(self.pipeline, height, width)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            embeds = self._encode(prompts)
            noise = self._noise(len(prompts), generator, height, width)
            kept = list(self._batches(noise, embeds, height, width, output_type))
            if output_type in ("pil", "np") and self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # before the host reads what it was sent
            result = torch.cat(kept) if len(kept) > 1 else kept[0]
            return self._finish(result, output_type)

    def warm_up(self, num_images: int = 1, height: int | None = None, width: int | None = None) -> float:
        """Compile and capture the graph for images of this shape.

        Returns:
            The seconds that it took, or 0.0 if the graph was there already.
        """
        height, width = image_size(self.pipeline, height, width)
        shape = (self.batch_size or num_images, height, width)
        if shape in self._graphs:
            return 0.0
        self(["an image"] * num_images, torch.Generator().manual_seed(0), height, width, "latent")
        return self.warmup_seconds[shape]

    def new_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose embeddings are not kept yet, without repetitions."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeds]

    def _prepare_modules(self) -> None:
        unet, vae = self.pipeline.unet, self.pipeline.vae
        if self.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)
        processors = {type(processor).__name__ for processor in unet.attn_processors.values()}
        if processors == {"AttnProcessor2_0"}:  # not a user's own processor, and not fused yet
            with torch.no_grad():
                unet.fuse_qkv_projections()

    def _encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Embeddings (1, tokens, width) of all images. The text encoder runs only for new prompts."""
        if new := self.new_prompts(prompts):
            embeds, _ = self.pipeline.encode_prompt(new, self.device, 1, False)
            self._embeds.update(zip(new, embeds.split(1), strict=True))
        result = [self._embeds[prompt] for prompt in prompts]
        while len(self._embeds) > MAX_PROMPTS:
            del self._embeds[next(iter(self._embeds))]
        return result

    def _noise(self, count: int, generator: Any, height: int, width: int) -> torch.Tensor:
        """The same noise as in the plain pipeline, in pinned memory if it is drawn on the CPU."""
        generator = generators_of(None, generator, count)
        first = generator[0] if isinstance(generator, list) else generator
        where = self.device if first is None else first.device
        factor, channels = self.pipeline.vae_scale_factor, self.pipeline.unet.config.in_channels
        shape = (count, channels, height // factor, width // factor)
        noise = randn_tensor(shape, generator, where, self.dtype)
        return noise.pin_memory() if noise.device.type == "cpu" and self.device.type == "cuda" else noise

    def _batches(
        self, noise: torch.Tensor, embeds: list[torch.Tensor], height: int, width: int, output_type: str
    ) -> Iterator[torch.Tensor]:
        """x0 or images of each batch, copied out of the graph, because the next replay overwrites them."""
        batch_size = self.batch_size or len(embeds)
        to_host = output_type in ("pil", "np") and self.device.type == "cuda"
        for first in range(0, len(embeds), batch_size):
            some = slice(first, min(first + batch_size, len(embeds)))
            count = some.stop - some.start
            size = count if self.mode == "eager" and self._pool is None else batch_size
            graph = self._graph((size, height, width), noise, embeds[0])
            graph.z[:count].copy_(noise[some], non_blocking=True)
            # padding repeats the last prompt with the old noise
            torch.cat(embeds[some] + [embeds[some.stop - 1]] * (size - count), out=graph.embeds)
            x0, images = graph.run()
            made = (x0 if output_type == "latent" else images)[:count]
            if to_host:
                host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
                yield host.copy_(made, non_blocking=True)
            else:
                yield made.clone()

    def _graph(self, shape: tuple[int, int, int], noise: torch.Tensor, embed: torch.Tensor) -> _Graph:
        if shape not in self._graphs:
            while len(self._graphs) >= MAX_SHAPES:
                del self._graphs[next(iter(self._graphs))]
            start = time.perf_counter()
            z = torch.zeros(shape[0], *noise.shape[1:], dtype=noise.dtype, device=self.device)
            if self._pool is not None:
                z = z.to(memory_format=torch.channels_last)
            graph = _Graph(z, embed.repeat(shape[0], 1, 1), self._one_step)
            with _explain_compiler():
                graph.prepare(self._pool, compiled=self.mode != "eager")
            self._graphs[shape] = graph
            self.warmup_seconds[shape] = time.perf_counter() - start
        return self._graphs[shape]

    def _finish(self, result: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return result.to(self.vae_dtype)
        flagged = None
        if self.pipeline.safety_checker is not None:
            result, flagged = self._censor(result)
        if output_type != "pt" or flagged is not None:  # "pt" must not wait for the device
            tell_odd_images(result.cpu().numpy(), flagged)
        if output_type == "pt":
            return result.permute(0, 3, 1, 2).float() / 255
        array = result.cpu().numpy()
        if output_type == "np":
            return array.astype(np.float32) / 255
        return [Image.fromarray(image) for image in array]

    def _censor(self, made: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        """Blacken images that the safety checker flags, as the plain pipeline does, and return the flags."""
        array = made.cpu().numpy()
        images = [Image.fromarray(image) for image in array]
        features = self.pipeline.feature_extractor(images, return_tensors="pt").pixel_values
        features = features.to(self.device, self.dtype)
        array, flagged = self.pipeline.safety_checker(images=array, clip_input=features)
        return torch.from_numpy(array).to(made.device), list(flagged)


class _OneStep:
    """Noise (N, C, h, w), embeddings (N, tokens, width) -> x0 in float32, bytes (N, height, width, 3)."""

    def __init__(self, pipeline: DiffusionPipeline, mode: str) -> None:
        scheduler, device = pipeline.scheduler, pipeline.unet.device
        schedule = VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        self.schedule = schedule.to(device)
        self.timestep = self.schedule.last.view(1)
        self.vae = pipeline.vae
        # separate, so that a U-Net is compiled only once for several autoencoders
        self.predict, self.show = pipeline.unet, self._show
        if mode != "eager":
            self.predict = torch.compile(pipeline.unet, mode=mode, dynamic=False)
            self.show = torch.compile(self._show, mode=mode, dynamic=False)

    def __call__(self, z: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.show(self.predict(z, self.timestep, embeds, return_dict=False)[0], z)

    def _show(self, prediction: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = self.schedule.x0(prediction, z, self.timestep)
        latents = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
        image = self.vae.decode(latents, return_dict=False)[0]
        return x0, to_bytes(image)


def to_bytes(image: torch.Tensor) -> torch.Tensor:
    """Convert images (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3), as `VaeImageProcessor` does."""
    image = (image.float() * 0.5 + 0.5).clamp(0, 1)
    return (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@dataclass
class _Graph:
    """Static inputs of one shape and, once captured, the graph that reads them."""

    z: torch.Tensor
    embeds: torch.Tensor
    one_step: _OneStep
    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 and images; valid until the next run."""
        if self.graph is None:
            return self.one_step(self.z, self.embeds)
        self.graph.replay()
        return self.outputs

    def prepare(self, pool: Any, compiled: bool) -> None:
        """Compile, and capture into the memory pool if there is one (CUDA)."""
        if pool is None:
            if compiled:
                with _many_shapes():
                    self.run()
            return
        with _many_shapes(), _choose_convolutions():
            self.graph, self.outputs = record(self.run, pool=pool)


@contextlib.contextmanager
def _choose_convolutions() -> Iterator[None]:
    """Let cuDNN time its algorithms in the warm-up, so that the capture has the fastest ones."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _many_shapes() -> contextlib.AbstractContextManager:
    """Let torch compile every shape separately. Its limit is 8 shapes for all pipelines together."""
    import torch._dynamo.config as config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch < 2.7
    return config.patch({name: 64})


@contextlib.contextmanager
def _explain_compiler() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WadiError(
            f"compile: torch.compile fails on this machine ({reason}); use mode='eager'"
        ) from error


def _check_pipeline(pipeline: DiffusionPipeline) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise WadiError(f"fast: takes a StableDiffusionPipeline, not a {type(pipeline).__name__}; omit it")
    if any(isinstance(module, BaseTunerLayer) for module in pipeline.unet.modules()):
        raise WadiError("fast: the U-Net has an adapter that is not merged; merge it first (wadi export)")
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise WadiError(
            "fast: a U-Net with the guidance scale as input (time_cond_proj_dim) is not supported; omit it"
        )
