"""`wadi convert`: write weights as safetensors, without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def convert(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Path,
    overwrite: bool = False,
) -> None:
    """Write a model whose weights are .bin, .ckpt, .pt or .pth files as safetensors, without running code.

    Such files are pickles, which can run code when they are loaded. Here they are read as data: names and
    numbers are taken from them, and nothing is run. A file that wants more than that is refused.

    Args:
        source: A folder, whose other files are copied; or one file.
        out: Folder to write, which must be new or empty; or for one file, a .safetensors file.
        overwrite: Replace the folder if wadi convert wrote it and nothing else is in it, or replace the file.
    """
    from wadi.teachers.convert import convert_weights

    made = convert_weights(source, out, overwrite)
    plural = "s" * (len(made.files) != 1)
    print(f"{out}: {made.tensors} tensors in {len(made.files)} safetensors file{plural}")
