"""The order of datasets in shards: a window of shards at a time, divided among hosts."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from mlip_jax.data.batches.order import order
from mlip_jax.data.batches.windows import WindowedOrder
from mlip_jax.data.sets.mixtures import Mixture, stand_ins

SIZES = (5, 7, 3, 9, 4, 6)
CASES = (
    (SIZES, 8, 2),
    (SIZES, 7, 4),  # lanes of unequal rows
    ((10,) * 8, 20, 4),
    ((0, 3, 0, 4), 4, 16),  # shards without samples, fewer than the window
    ((100,), 8, 3),
    (SIZES, 2, 6),  # several shards in a lane at a time
    ((3,), 8, 3),  # several epochs in a batch
)


class InMemory:
    """A dataset in shards without images."""

    split, parts, class_names, attribution, notes = "train", ("train",), (), "", ()
    is_remote = by_content = False

    def __init__(self, name, sizes, window):
        self.name, self.window = name, window
        self._ends = np.cumsum(sizes)

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, index):
        raise OSError

    def name_of(self, index):
        return f"{self.name}{index}"

    def captions(self):
        return iter(())

    def shard_ends(self):
        return self._ends

    def bring(self, shard, *, ahead=False):
        pass

    def release(self, shard):
        pass


def windowed(sizes, batch_size, window, seed=0):
    return WindowedOrder(np.cumsum(sizes), seed, batch_size, window)


def shard_of(sizes, index):
    return int(np.searchsorted(np.cumsum(sizes), index, "right"))


@pytest.mark.parametrize(("sizes", "batch_size", "window"), CASES)
def test_every_sample_is_seen_once_in_each_epoch_and_in_another_order(sizes, batch_size, window):
    positions, total = windowed(sizes, batch_size, window), sum(sizes)
    epochs = [[positions[e * total + i] for i in range(total)] for e in range(4)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert total < 5 or len(set(map(tuple, epochs))) == 4
    other = windowed(sizes, batch_size, window, seed=1)
    assert total < 5 or [other[i] for i in range(total)] != epochs[0]


def test_the_order_is_a_function_of_the_position_alone():
    one, other = windowed(SIZES, 8, 4), windowed(SIZES, 8, 4)
    forwards = [one[i] for i in range(200)]
    assert [other[i] for i in reversed(range(200))] == forwards[::-1]
    assert forwards[:12] == [0, 3, 20, 22, 33, 32, 11, 13, 1, 2, 23, 21], "runs go on elsewhere"


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_shards_of_their_own_and_at_most_one_is_cut_between_two(hosts):
    sizes, batch_size = [20 + number % 7 for number in range(24)], 16
    positions, total = windowed(sizes, batch_size, 4), sum(sizes)
    for epoch in range(3):
        read = [set() for _ in range(hosts)]
        for position in range(epoch * total, (epoch + 1) * total):
            host = position % batch_size * hosts // batch_size
            read[host].add(shard_of(sizes, positions[position]))
        shared = sum(len(one & other) for one, other in itertools.combinations(read, 2))
        assert shared <= hosts - 1 and set.union(*read) == set(range(24))


def test_a_row_reads_one_shard_after_the_other_and_it_is_known_which_is_next():
    sizes, batch_size = [40] * 12, 8
    positions = windowed(sizes, batch_size, 4)
    needed = [positions.shards_for(step, range(batch_size)) for step in range(120)]
    for step, (now, later) in enumerate(needed):
        read = {shard_of(sizes, positions[step * batch_size + row]) for row in range(batch_size)}
        assert set(now) == read and len(now) <= 4 + (step % 20 > 14) * 4 and len(later) <= 4
    for before, after in itertools.pairwise(needed):
        assert set(after[0]) <= {*before[0], *before[1]}, "a shard was needed without a word"
    assert positions.shards_for(3, [0])[0] == needed[3][0][:1]
    together, later = positions.shards_for(30, range(batch_size), steps=40)
    assert set(together) == {shard for now, _ in needed[30:70] for shard in now}
    assert set(later).isdisjoint(together) and together[:4] == needed[30][0]


@pytest.mark.parametrize(("sizes", "batch_size", "window"), CASES)
def test_batches_that_go_through_many_shards_name_them_all(sizes, batch_size, window):
    positions = windowed(sizes, batch_size, window)
    for step, steps in ((0, 1), (3, 5), (17, 40)):
        places = range(step * batch_size, (step + steps) * batch_size)
        read = {shard_of(sizes, positions[place]) for place in places}
        assert read <= set(positions.shards_for(step, range(batch_size), steps)[0])


def test_a_large_window_is_all_at_random_and_a_small_one_keeps_neighbours_near():
    sizes = [50] * 40

    def distance(window):
        positions = windowed(sizes, 100, window)
        place = np.empty(2000, int)
        for position in range(2000):
            place[positions[position]] = position
        together = np.arange(2000) % 50 < 49  # the next sample is of the same shard
        return np.abs(np.diff(place))[together[:-1]].mean() / (2000 / 3)

    near, middle, far = map(distance, (1, 8, 40))
    assert near < 0.04 and 0.15 < middle < 0.25 and far > 0.8


@pytest.mark.parametrize("weights", [(5, 3), ("0.77", "0.23")])
def test_datasets_of_a_mixture_are_seen_once_in_each_of_their_epochs(weights):
    parts = [InMemory("a", SIZES, 3), InMemory("b", (6, 2, 8), 2), InMemory("c", (9,), 0)]
    mixture = Mixture(parts, [*map(Fraction, weights), Fraction(1, 5)])
    for batch_size in (7, 8):
        stream = order(mixture, 0, batch_size)
        indices = [stream[position] for position in range(600)]
        for part, span in zip(parts, mixture.sets(), strict=True):
            seen = [index - span.start for index in indices if index in span]
            for epoch in range(len(seen) // len(part)):
                one = seen[epoch * len(part) :][: len(part)]
                assert sorted(one) == list(range(len(part)))


def test_samples_of_a_shard_that_is_lost_are_stood_for_by_those_of_others():
    source = InMemory("a", (50, 0, 30, 40), 2)
    places = list(stand_ins(source, 45, 100))
    assert places[:10] == [*range(45, 55)] and places[10:12] == [50 + 15, 80 + 5]
    assert len(set(places[12:])) == 88, "then neighbours, as without shards"
    assert list(stand_ins(InMemory("a", (5,), 0), 3, 100)) == [3, 4, 0, 1, 2]
