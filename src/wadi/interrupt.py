"""Handle Ctrl-C in long work: finish and save the current step first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from tqdm import tqdm


@contextlib.contextmanager
def catch_interrupt(alone: bool = True, tells: bool = True) -> Iterator[threading.Event]:
    """Set an event on the first Ctrl-C. A second one interrupts at once. Only the main thread can do this.

    Args:
        alone: whether this is the only process. With several processes a second signal does not interrupt,
            because terminal and launcher both send one. The launcher ends those that do not stop in time.
        tells: whether this process prints the message.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(signum: int, frame: object) -> None:
        if tells and not interrupted.is_set():
            again = "; press again to stop at once" if alone else ""
            tqdm.write(f"Ctrl-C: finishing this step, then saving{again}")
        interrupted.set()
        if alone:
            signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
