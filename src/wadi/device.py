"""The device that the networks run on."""

from __future__ import annotations

import torch

from wadi.errors import WadiError


def chosen_device(name: str | torch.device | None = None) -> str:
    """Check the device of an option such as --device. ``None`` means a GPU if there is one.

    Raises:
        WadiError: this machine has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()  # a device without memory, such as meta, has no value either
    except (AssertionError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        here = ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
        raise WadiError(f"--device {name}: is not on this machine; name one of {', '.join(here)}") from error
    return str(name)
