"""Networks that turn images into features: Inception for published figures, and those that other rooms add.

Inception is from torch-fidelity, with the weights of the original FID, and is run by torchmetrics. CLIP is
from transformers. Both are downloaded when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from wadi.errors import WadiError
from wadi.onestep.components import first_line, load_module
from wadi.onestep.loading import part_folder

Extractor = Callable[[torch.Tensor], torch.Tensor]
"""Turns images (N, 3, H, W) uint8 into features (N, D) float32."""


@dataclass(frozen=True)
class FeatureSpace:
    """A space of features in which images are compared.

    Attributes:
        width: number of features of an image.
        load: loads the extractor onto a device; raises a WadiError if something that it needs is missing.
    """

    width: int
    load: Callable[[str | torch.device], Extractor]


def load_inception(device: str | torch.device = "cpu") -> Extractor:
    """Load the network of published Frechet distances onto the device.

    Raises:
        WadiError: torch-fidelity is missing, or the weights cannot be downloaded.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ImportError, RuntimeError) as error:  # RuntimeError if torchvision does not fit torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WadiError(
            f"--features inception: needs torch-fidelity, which is missing or does not work here ({reason}); "
            "pip install torch-fidelity, or --features emoji"
        ) from error
    except OSError as error:
        raise WadiError(
            f"--features inception: its weights could not be downloaded ({error}); run it once with a network"
        ) from error
    network = network.to(device).requires_grad_(False)
    return lambda images: network(images.to(device)).float().cpu()


SPACES: dict[str, FeatureSpace] = {"inception": FeatureSpace(2048, load_inception)}
"""Feature spaces by name. `wadi.emoji.judge` adds "emoji" when it is imported."""


class Clip:
    """Text alignment (the CLIP score) and image embeddings, by a CLIP model of transformers.

    Args:
        name: folder or hub id of a `CLIPModel`, safetensors only.
        device: device of the model.

    Raises:
        WadiError: the model cannot be loaded.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            folder = part_folder(name, "CLIP model", ("*.json", "*.txt", "model*.safetensors*"))
            self.model = load_module(CLIPModel, folder, torch.float32).to(device)
            self.processor = CLIPProcessor.from_pretrained(folder)
        except Exception as error:  # a damaged folder fails in many ways
            raise WadiError(f"--clip-model {name}: could not be loaded: {first_line(error)}") from error
        self.name, self.device = name, device

    @torch.no_grad()
    def score(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """100 times the cosine between image and caption, at least 0 (Hessel et al., arXiv 2104.08718).

        Args:
            images: (N, 3, H, W) uint8.
            captions: N captions; longer ones are cut to the number of tokens that the model takes.

        Returns:
            (N,) float32, on the CPU.
        """
        inputs = self.processor.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        text = _embedding(self.model.get_text_features(**inputs.to(self.device)))
        cosine = torch.cosine_similarity(self.embed(images), text.float().cpu())
        return (100 * cosine).clamp_min(0)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Compute embeddings (N, D) float32, on the CPU, of images (N, 3, H, W) uint8."""
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        return _embedding(self.model.get_image_features(pixel_values=pixels)).float().cpu()


def _embedding(output: object) -> torch.Tensor:
    """The embedding itself, which transformers 5 wraps."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.no_grad()
def extract(extractor: Extractor, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Compute features (N, D) of all images, which come in batches."""
    return torch.cat([extractor(batch) for batch in batches])
