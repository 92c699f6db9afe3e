"""Where the networks work, and in which precision."""

from __future__ import annotations

from typing import Literal

import torch

from wadi.errors import WadiError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The dtype of the networks by the value of --mixed-precision."""

Precision = Literal["bf16", "int8", "nf4"]
"""How the base's weights that adapters turn may be stored, the values of --base-precision."""


def chosen_device(name: str | torch.device | None = None) -> str:
    """The device of an option such as --device, by default a GPU if there is one.

    Raises:
        WadiError: there is no such device on this machine.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()  # a device without memory, such as meta, has no value either
    except (AssertionError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise WadiError(
            f"--device {name}: is not on this machine; name one of {', '.join(_here())}"
        ) from error
    return str(name)


def _here() -> list[str]:
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
