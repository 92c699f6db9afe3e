"""Training against a clock that the test holds in its hand."""

import pytest
import torch

from wadi.emoji import clock
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.errors import WadiError


def test_stops_after_the_last_step():
    steps = TimedSteps(1e9, 4, "test")
    assert list(steps) == [(k, pytest.approx(k / 4, abs=1e-6)) for k in range(4)]
    assert steps.done == 4


def test_stops_when_the_time_is_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    steps, seen = TimedSteps(10.0, 1000, "test"), []
    for step, used in steps:
        seen.append((step, used))
        now[0] += 4
    assert seen == [(0, 0.0), (1, pytest.approx(0.4)), (2, pytest.approx(0.8))]
    assert (steps.done, steps.elapsed) == (3, 12.0)


@pytest.mark.parametrize(("seconds", "max_train_steps"), [(100.0, 10**6), (1e9, 50)])
def test_the_time_left_is_right_from_the_first_step_on(seconds, max_train_steps, monkeypatch):
    """100 seconds in steps of two, by the clock or by their number; the bar is made long before."""
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    steps, left = TimedSteps(seconds, max_train_steps, "test"), []
    steps.bar._time = lambda: now[0]
    now[0] += 500
    for step, _ in steps:
        now[0] += 2
        if step == 0:
            steps.show(torch.tensor(1.0))
            shown = steps.bar.format_dict
            left.append((1 - shown["n"]) * shown["elapsed"] / shown["n"])
    assert left == [pytest.approx(98.0)]


def test_goes_on_where_it_was(monkeypatch):
    """Six seconds of ten and two steps are over."""
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    steps, seen = TimedSteps(10.0, 1000, "test", done=2, elapsed=6.0), []
    for step, used in steps:
        seen.append((step, used))
        now[0] += 3
    assert seen == [(2, pytest.approx(0.6)), (3, pytest.approx(0.9))]
    assert (steps.done, steps.elapsed) == (4, 12.0)


def test_stops_when_the_loss_stays_not_finite():
    """Once may be a batch that was skipped; twice in a row it is the weights."""
    losses = {0: 1.0, 50: float("nan"), 100: 0.5, 150: float("inf"), 200: float("nan")}
    steps = TimedSteps(1e9, 1000, "test")

    def run():
        for step, _ in steps:
            steps.show(torch.tensor(losses.get(step, 1.0)))

    with pytest.raises(WadiError, match="step 200: the loss is nan; lower --learning-rate"):
        run()


@pytest.mark.parametrize(
    ("step", "used", "factor"),
    [(0, 0.0, 0.01), (49, 0.0, 0.5), (99, 0.0, 1.0), (500, 0.5, 0.5), (500, 1 / 3, 0.75), (500, 1.0, 0.0)],
)
def test_learning_rate(step, used, factor):
    assert warmup_cosine(step, used, 100) == pytest.approx(factor, abs=1e-12)
