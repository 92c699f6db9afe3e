"""Trackers of Accelerate. They are checked before anything is loaded, and start when the run begins."""

from __future__ import annotations

from difflib import get_close_matches

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from wadi.distill.config import DistillConfig
from wadi.errors import WadiError


def check_tracker(name: str | None) -> None:
    """Raise unless the tracker can be used here. Accelerate itself skips a missing tracker silently.

    Args:
        name: the value of `--report-to`. ``None`` is no tracker, ``"all"`` is every installed tracker.

    Raises:
        WadiError: there is no tracker of this name, or its package is not installed.
    """
    if name is None:
        return
    known, installed = sorted(LOGGER_TYPE_TO_CLASS), [str(tracker) for tracker in get_available_trackers()]
    if name == "all":
        if not installed:
            raise WadiError(f"--report-to all: none is installed; pip install one of {', '.join(known)}")
    elif name not in known:
        near = get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise WadiError(f"--report-to {name}: no such tracker; {hint}")
    elif name not in installed:
        raise WadiError(f"--report-to {name}: is not installed; pip install {name}, or omit the option")


def start_trackers(accelerator: Accelerator, config: DistillConfig) -> None:
    """Start the tracker of a config, if it names one, with all options as the run's parameters.

    Raises:
        WadiError: the tracker cannot start, for example because it needs a login.
    """
    if config.run.report_to is None:
        return
    values = {k: v if isinstance(v, (int, float)) else str(v) for k, v in config.values().items()}
    try:
        accelerator.init_trackers("wadi", values)
    except Exception as error:  # each tracker has its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WadiError(f"--report-to {config.run.report_to}: could not start: {reason}") from error
