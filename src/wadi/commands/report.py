"""`wadi report`: write the report of a run again."""

from __future__ import annotations

from pathlib import Path

import tyro


def report(run: tyro.conf.Positional[Path], steps: int = 25, guidance_scale: float | None = None) -> None:
    """Write the report of a finished run again.

    Args:
        run: Run folder of wadi distill.
        steps: Of the teacher's pictures.
        guidance_scale: Of the teacher's pictures, throughout; that of the distillation's end if not given.
    """
    from wadi.distill.report import report as write

    print(f"report: {write(run, steps, guidance_scale)}")
