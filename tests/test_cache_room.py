"""Room in the cache of shards: who gives way to whom. Nothing here depends on the clock."""

import contextlib

import pytest

from mlip_jax.core.errors import UserError
from mlip_jax.data.batches.ahead import ReadAhead
from mlip_jax.data.batches.windows import WindowedOrder
from mlip_jax.data.sets import cache_room

URL = "gs://bucket/set"
SIZE = 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with room for two and a half shards; gives the path of a shard by its name."""
    monkeypatch.setenv("MLIP_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv(cache_room.LIMIT, str(2.5 * SIZE / 2**30))
    monkeypatch.setattr(cache_room, "_told", set())
    folder = cache_room.dataset_folder(URL, "") / cache_room.SHARDS
    cache_room.hold(folder)
    yield folder
    cache_room.let_go()


def bring(path, *, ahead=False):
    with cache_room.claimed(path) as claim:
        cache_room.claim_room(path.parents[2], SIZE, claim, URL, ahead=ahead)
        path.write_bytes(bytes(SIZE))


def present(cache):
    return "".join(sorted(path.name for path in cache.iterdir()))


def test_a_shard_that_is_needed_takes_the_room_of_one_used_a_moment_ago(cache, capfd):
    bring(cache / "a")
    bring(cache / "b")
    cache_room.use(cache / "a")
    with pytest.raises(UserError, match="or config.data.window to fewer shards"):
        bring(cache / "c", ahead=True)
    assert present(cache) == "ab" and not capfd.readouterr().err
    bring(cache / "c")
    assert present(cache) == "ac", "the longest unused goes"
    assert f"{URL}: the cache is too small for the shards" in capfd.readouterr().err
    bring(cache / "d")
    assert not capfd.readouterr().err, "it is said once"
    cache_room.release(cache / "d")
    bring(cache / "e", ahead=True)
    assert present(cache) == "ce", "what was released makes room for what is ahead"


def test_a_shard_that_the_cache_can_never_hold_is_an_error_at_once(cache, monkeypatch):
    bring(cache / "a")
    monkeypatch.setenv(cache_room.LIMIT, str(0.9 * SIZE / 2**30))
    monkeypatch.setattr(cache_room.time, "sleep", lambda _: pytest.fail("it waits"))
    waiting = contextlib.ExitStack()  # others that find no room either are not waited for
    waiting.enter_context(cache_room.claimed(cache / "other"))
    with waiting, pytest.raises(UserError, match=r"needs 0\.00 GiB more .* set MLIP_JAX_CACHE_GIB"):
        bring(cache / "b")


@pytest.mark.parametrize("opened", [False, True])
def test_what_others_bring_or_open_is_waited_for(cache, monkeypatch, opened):
    monkeypatch.setenv(cache_room.LIMIT, str(1.5 * SIZE / 2**30))
    others = contextlib.ExitStack()
    claim = others.enter_context(cache_room.claimed(cache / "a"))
    if opened:
        (cache / "a").write_bytes(bytes(SIZE))
    else:
        cache_room.claim_room(cache.parents[1], SIZE, claim, URL, ahead=False)
    looks = []

    def sleep(seconds):
        looks.append(present(cache))
        if len(looks) == 2:
            (cache / "a").write_bytes(bytes(SIZE))
            others.close()

    monkeypatch.setattr(cache_room.time, "sleep", sleep)
    bring(cache / "b")
    assert present(cache) == "b"
    assert looks == ["aa.claimb.claim" if opened else "a.claimb.claim"] * 2


def test_what_is_ahead_leaves_half_of_the_cache_to_what_is_needed(cache):
    with cache_room.claimed(cache / "a") as claim:
        cache_room.claim_room(cache.parents[1], SIZE, claim, URL, ahead=True)
        with pytest.raises(UserError):
            bring(cache / "b", ahead=True)
        bring(cache / "b")


def test_the_bytes_that_a_dataset_will_have_count_as_used(cache):
    other = cache_room.dataset_folder("gs://bucket/other", "")
    cache_room.hold(other / "files")
    cache_room.reserve(other, 2 * SIZE)
    with pytest.raises(UserError, match="in use"):
        bring(cache / "a")
    cache_room.reserve(other, 0)
    bring(cache / "a")


class Recorded:
    """A dataset of a server that notes what is brought and released."""

    def __init__(self):
        self.released = []

    def bring(self, shard, *, ahead=False):
        assert ahead

    def release(self, shard):
        self.released.append(shard)


def test_what_is_not_needed_any_more_is_released_whoever_brought_it():
    dataset, order = Recorded(), WindowedOrder([10, 20, 30, 40], 0, 4, 2)
    shards = ReadAhead([(dataset, order)], range(4), 0, 1)
    shards._want(*shards._needed(0))  # and before any is brought, batches are taken by far
    shards._want(*shards._needed(8))
    needed = {number for _, number in shards._wanted}
    assert needed and set(dataset.released) == {*range(4)} - needed
