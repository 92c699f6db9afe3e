"""Named random numbers: the same for a name, whatever else is drawn and however many processes share them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wadi.diffusion import RectifiedFlow
from wadi.distill.draws import Draws

CPU = torch.device("cpu")
KINDS = {
    "normal": lambda draws, name, n: draws.normal(name, n, (2, 3)),
    "times": lambda draws, name, n: draws.times(name, n, RectifiedFlow(3.0), 0.1, 0.9),
    "indices": lambda draws, name, n: draws.indices(name, n, 1_000_000),
}
names = st.text("abc/", min_size=1, max_size=6)
seeds, steps = st.integers(0, 2**63), st.integers(0, 10**6)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, step=steps, name=names, other=names)
def test_numbers_are_of_seed_step_and_name(kind, seed, step, name, other):
    draws, draw = Draws(seed, step, CPU), KINDS[kind]
    first = draw(draws, name, 4)
    KINDS["normal"](draws, other, 7)  # another part draws too
    assert torch.equal(draw(Draws(seed, step, CPU), name, 4), first)
    different = [Draws(seed + 1, step, CPU), Draws(seed, step + 1, CPU), draws.of("part")]
    assert not any(torch.equal(draw(each, name, 4), first) for each in different)
    assert torch.equal(draw(draws, other, 4), first) == (other == name)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, processes=st.integers(1, 5), n=st.integers(1, 4))
def test_processes_share_what_one_would_draw(kind, seed, processes, n):
    whole = KINDS[kind](Draws(seed, 3, CPU), "name", n * processes)
    shares = [KINDS[kind](Draws(seed, 3, CPU, i, processes), "name", n) for i in range(processes)]
    assert torch.equal(torch.cat(shares), whole)


@given(seed=seeds)
def test_a_chance_is_the_same_in_all_processes(seed):
    flags = [[bool(Draws(seed, s, CPU, i, 3).chance("null", 0.5)) for s in range(8)] for i in range(3)]
    assert flags[0] == flags[1] == flags[2]
