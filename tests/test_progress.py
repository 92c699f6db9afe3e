"""Progress: whole lines where nobody watches, a bar on a terminal."""

import io
import os
import re

import pytest
from tqdm import tqdm

import wadi.progress
from wadi.progress import progress

LINE = re.compile(r"work: \d+/50 \(\d+%\), \d\d:\d\d so far, (\d\d:\d\d|\?) left, .*step")


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No line is due between the first and the last, however slow the machine is."""
    monkeypatch.setattr(wadi.progress, "SHORTEST", 1e6)
    monkeypatch.setattr(wadi.progress, "LONGEST", 1e6)


def lines(**options):
    stream = io.StringIO()
    for _ in progress(range(50), desc="work", unit="step", file=stream, **options):
        pass
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_log_gets_whole_lines_with_start_and_end():
    first, last = lines()
    assert "0/50 (0%)" in first
    assert "50/50 (100%)" in last
    assert all(LINE.match(line) for line in (first, last))


def test_a_bar_that_does_not_stay_says_nothing_where_it_is_quick():
    assert lines(leave=False) == []


@pytest.mark.parametrize("leave", [True, False])
def test_lines_come_now_and_then_and_none_twice(monkeypatch, leave):
    for name in ("SHORTEST", "LONGEST"):
        monkeypatch.setattr(wadi.progress, name, 0.0)
    said = lines(leave=leave, mininterval=0, miniters=1)
    assert said[-1].startswith("work: 50/50")
    assert len(said) == 51
    assert all(LINE.match(line) for line in said)
    done = [int(line.split("/")[0].split()[-1]) for line in said]
    assert done == sorted(set(done))


def test_postfixes_and_messages_do_not_add_lines():
    stream = io.StringIO()
    with progress(total=50, desc="work", unit="step", file=stream) as bar:
        for i in range(50):
            bar.update()
            bar.set_postfix(loss=i)
        tqdm.write("a message", file=stream)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["work:", "a", "work:"]
    assert "loss=49" in stream.getvalue()


def test_a_share_has_no_counts():
    stream = io.StringIO()
    with progress(total=1.0, desc="work", bar_format="{l_bar}{bar}", file=stream) as bar:
        bar.n = 0.5
    assert re.fullmatch(r"work: 0%, .*\nwork: 50%, .* left.*\n", stream.getvalue())


def test_a_failure_before_the_first_step_is_not_told_twice():
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), progress(total=2, desc="work", file=stream):
        raise ZeroDivisionError
    assert len(stream.getvalue().splitlines()) == 1


def test_a_terminal_gets_the_bar():
    ours, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        for _ in progress(range(3), desc="work", file=stream):
            pass
        shown = ""
        while "100%" not in shown:
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert "\r" in shown
    assert "work: 100%|" in shown
