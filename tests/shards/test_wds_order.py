"""The order of samples with shards: each once, near each other, and the same rest from any position, however shared."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp.runners.data_order import Sampling, TrainOrder


def ends_of(sizes) -> list[int]:
    return list(itertools.accumulate(sizes))


def order(lengths, sampling, *, rank=0, world=1, batch=2, accumulate=1, ratios=None, seed=5) -> TrainOrder:
    options = {"batch_size": batch, "accumulate": accumulate, "seed": seed, "ratios": ratios, "sampling": sampling}
    return TrainOrder(lengths, rank=rank, world_size=world, **options)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_windows_of_shards_come_one_after_the_other(sizes, window, epoch):
    blocks = ends_of(sizes)
    found = order([blocks[-1]], [Sampling(blocks, window)]).permutation(epoch).tolist()
    assert sorted(found) == list(range(blocks[-1]))
    shard_of = [n for n, size in enumerate(sizes) for _ in range(size)]
    runs = []
    while found:
        shards = []
        for index in found:  # shards in the order of their first sample, up to the window's
            if shard_of[index] not in shards:
                if len(shards) == window:
                    break
                shards.append(shard_of[index])
        size = sum(sizes[shard] for shard in shards)
        assert {shard_of[index] for index in found[:size]} == set(shards)
        runs.append(shards)
        found = found[size:]
    assert sorted(sum(runs, [])) == list(range(len(sizes)))


def test_epochs_differ_and_without_a_window_nothing_changes():
    blocks = ends_of([5] * 8)
    near = order([40], [Sampling(blocks, 2)])
    assert near.permutation(0).tolist() == near.permutation(0).tolist() != near.permutation(1).tolist()
    assert near.permutation(0).tolist() != order([40], [Sampling(blocks, 2)], seed=6).permutation(0).tolist()
    plain = order([40], None).permutation(3).tolist()
    assert plain == order([40], [Sampling(blocks, 0)]).permutation(3).tolist()


def test_data_sets_are_mixed_and_keep_their_order():
    blocks = ends_of([10] * 6)
    near = order([60, 20], [Sampling(blocks, 1), None], ratios=[1, 1])
    found = near.permutation(0)
    first, second = found[found < 60], found[found >= 60]
    assert len(first) == len(second) == 40 and len(set(first.tolist())) == 40
    assert all(len({i // 10 for i in part.tolist()}) == 1 for part in first.split(10))  # shard by shard
    assert sorted(second.tolist()) == sorted([*range(60, 80)] * 2)
    half = (found[:40] < 60).float().mean()
    assert 0.25 < half < 0.75  # neither before the other


def test_resampled_draws_with_replacement():
    found = order([1000], [Sampling(resampled=True)]).permutation(0)
    assert len(found) == 1000 and 550 < len(set(found.tolist())) < 720  # 1 - 1/e = 632 expected


WORLDS = [(ranks, workers) for ranks in (1, 2, 3) for workers in (0, 1, 2, 4)]


def consumed(sizes, ranks: int, epoch: int, position: int, steps: int | None = None) -> tuple[list[int], int]:
    """Samples of the next steps in the global order, as `ranks` ranks take them together, and the position after."""
    plans = [
        order([sum(sizes)], [Sampling(ends_of(sizes), 2)], rank=rank, world=ranks).steps(epoch, position)
        for rank in range(ranks)
    ]
    seen = []
    for step in itertools.islice(zip(*plans, strict=True), steps):
        assert len({len(plan.batches) for plan in step}) == 1  # every rank the same number of batches
        for micro in range(len(step[0].batches)):
            shares = [plan.batches[micro][: plan.counts[micro]] for plan in step]
            longest = max(map(len, shares))
            seen += [share[n] for n in range(longest) for share in shares if n < len(share)]
    return seen, position + len(seen)


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_after_a_kill_at_any_step_the_rest_is_the_same_under_any_number_of_ranks(before, after):
    sizes = [3, 1, 4, 1, 5, 2]
    whole = order([16], [Sampling(ends_of(sizes), 2)]).permutation(1).tolist()
    for steps in range(20):
        seen, position = consumed(sizes, before, 1, 0, steps)
        rest, end = consumed(sizes, after, 1, position)
        assert seen + rest == whole and end == 16


def test_going_to_a_position_among_a_million_takes_less_than_a_second():
    blocks = ends_of([1000] * 1000)
    far = order([1_000_000], [Sampling(blocks, 8)])
    begin = time.perf_counter()
    plan = next(far.steps(3, 999_000))
    assert time.perf_counter() - begin < 1.0
    assert plan.batches[0] == tuple(far.permutation(3)[999_000:999_002].tolist())
    assert torch.equal(far.permutation(3).sort().values, torch.arange(1_000_000))
