"""The order of the data: every example once an epoch, the same whenever it is asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.runs.data_order import DataOrder, epoch_order, steps_per_epoch, total_steps

sizes = st.integers(1, 60)
batch_sizes = st.integers(1, 70)
seeds = st.integers(0, 2**63 - 1)
GOLDEN = [6, 3, 1, 0, 2, 4, 7, 5]


@given(
    size=sizes, batch_size=batch_sizes, seed=seeds, shuffle=st.booleans(), epoch=st.integers(0, 5)
)
def test_an_epoch_visits_every_example_once(size, batch_size, seed, shuffle, epoch):
    order = DataOrder(size=size, batch_size=batch_size, seed=seed, shuffle=shuffle)
    per_epoch = order.steps_per_epoch
    batches = [order.batch_indices(epoch * per_epoch + i) for i in range(per_epoch)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    # Only the last may be smaller, and none is empty.
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert order.epoch(epoch * per_epoch) == order.epoch((epoch + 1) * per_epoch - 1) == epoch


@given(size=sizes, batch_size=batch_sizes, seed=seeds, steps=st.lists(st.integers(0, 50)))
def test_a_batch_depends_on_nothing_that_was_asked_before(size, batch_size, seed, steps):
    order = DataOrder(size=size, batch_size=batch_size, seed=seed)
    in_any_order = {step: order.batch_indices(step).tolist() for step in steps}
    again = DataOrder(size=size, batch_size=batch_size, seed=seed)
    for step in sorted(in_any_order):
        assert again.batch_indices(step).tolist() == in_any_order[step]


@given(size=sizes, batch_size=batch_sizes, epochs=st.integers(1, 9))
def test_total_steps_end_with_the_last_epoch(size, batch_size, epochs):
    order = DataOrder(size=size, batch_size=batch_size)
    steps = total_steps(size, batch_size, epochs=epochs)
    assert order.epoch(steps - 1) == epochs - 1
    assert order.epoch(steps) == epochs


def test_epochs_and_seeds_differ_and_the_file_order_does_not():
    def first(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        return epoch_order(seed=seed, epoch=epoch, size=50, shuffle=shuffle).tolist()

    assert len({tuple(first(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert first(1, 2, shuffle=False) == list(range(50))


def test_the_order_stays_what_it_was():
    """A resumed run relies on it, whatever version of numpy it meets."""
    assert epoch_order(seed=7, epoch=1, size=8, shuffle=True).tolist() == GOLDEN


def test_steps():
    assert [steps_per_epoch(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert total_steps(5, 4, epochs=3) == 6
    assert total_steps(5, 4, max_steps=100) == 100


@pytest.mark.parametrize("lengths", [{}, {"epochs": 1, "max_steps": 1}])
def test_a_run_has_one_length(lengths):
    with pytest.raises(ValueError, match="exactly one"):
        total_steps(5, 4, **lengths)


def test_nobody_can_change_the_order_of_others():
    with pytest.raises(ValueError, match="read-only"):
        DataOrder(size=5, batch_size=2).batch_indices(0)[0] = 3


@pytest.mark.parametrize(("size", "batch_size"), [(0, 1), (1, 0)])
def test_empty_is_refused(size, batch_size):
    with pytest.raises(ValueError, match="≥ 1"):
        DataOrder(size=size, batch_size=batch_size)
