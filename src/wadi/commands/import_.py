"""`wadi import`: convert weights that the paper's authors published to a one-step folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from wadi.commands.teacher_file import DEFAULT, TeacherFile


def import_(
    weights: tyro.conf.Positional[Path],
    model: str,
    out: Path,
    teacher_file: TeacherFile = DEFAULT,
    alpha_T_squared: Annotated[float | None, tyro.conf.arg(aliases=["--alpha-t-squared"])] = 0.0047,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Convert weights that the paper's authors published to a one-step folder that plain diffusers loads.

    The file holds a whole U-Net (SD 1.5 or SD 2.1-base), a whole PixArt transformer, or the angles that the
    authors' training script saves (theta_a, theta_b). Angles become an adapter folder. A file with a missing
    or an unknown key is refused.

    Args:
        weights: A .safetensors file, or a file of torch.save (.pt, .bin), which is read without running code.
        model: Folder or hub id of the base model that the student was distilled from, or its single file.
        out: Folder to write. It must be new or empty.
        alpha_T_squared: The image's share of the variance at the last timestep, with which the student was
            trained. It is 0.0047 for all published students. None keeps the base model's own.
        dtype: Precision of the written weights.
        overwrite: Replace the folder if wadi import wrote it and nothing else is in it.
    """
    import torch

    from wadi.files import read_json
    from wadi.onestep import Student, import_weights
    from wadi.onestep.scheduler import last_alpha_squared
    from wadi.outputs import Output

    Output(out, "import", (weights, model, *teacher_file.inputs), overwrite).check()
    base = teacher_file.folder(model)
    released = import_weights(weights, base, out, alpha_T_squared, getattr(torch, dtype), overwrite)
    print(f"{weights}: {released.kind}, {len(released.tensors)} tensors")
    if released.ignored:
        print(f"not used: {', '.join(released.ignored)}")
    if (out / "model_index.json").exists():
        own = last_alpha_squared(read_json(out / "scheduler" / "scheduler_config.json"))
        alpha = "" if own is None else f", alpha_T^2 = {own:.4g}"
        print(f"one step: the network predicts {Student.read(out).prediction}{alpha}")
        print(f"{out}: load it with diffusers, num_inference_steps=1, guidance_scale=1.0")
    else:
        print(f"{out}: an adapter; wadi generate --model {model} --adapter {out}")
