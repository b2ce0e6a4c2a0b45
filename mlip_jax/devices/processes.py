"""Several processes of one run: how they agree, and end together."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mlip_jax.core import places
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.versions import TESTED_JAX
from mlip_jax.devices import parallel

_PATIENCE = 0.5  # seconds in JAX's C++ at a time, so that Python hears signals between them

# What the runtimes say when the other end of a connection is gone.
_GONE = re.compile(
    r"Gloo|NCCL|Connection (closed|reset)|Socket closed|UNAVAILABLE|heartbeat|Failed to connect"
)
LOST = (
    "another process of this run has ended or cannot be reached, or JAX has failed here (see "
    "above): start all of them again, and they go on from the last checkpoint"
)
_last_words = LOST  # what this process says when JAX aborts it
_WORDS, _FAILED = "mlip_jax/word/", "failed"
_ON_SIGNAL = ctypes.CFUNCTYPE(None, ctypes.c_int)
_T = TypeVar("_T")


def _write_last_words(_: int) -> None:
    os.write(2, f"error: {_last_words}\n".encode())
    os._exit(1)


_on_abort = _ON_SIGNAL(_write_last_words)  # kept: C holds no reference to it


def end_aborts_with(line: str) -> None:
    """Gives JAX's end of a process a line and the exit code 1.

    When a process dies, JAX's coordination service ends the others by abort(), after pages of its
    own. It takes no handler of ours: its callback cannot be called from Python (jaxlib 0.10 throws
    std::bad_cast). Python's own handlers of SIGABRT would run too late, after abort() returns.
    """
    global _last_words
    _last_words = line
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around the work of several processes: an error that ends one ends all, with its exit code.

    The others print the error as of the process that it came from. Where a process is gone without
    a word, they end when its connection breaks or its heartbeat stops.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    with hearing(_FAILED, _follow):
        try:
            yield
        except BaseException as error:
            if _is_lost(error):
                _on_abort(signal.SIGABRT)
            code = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
            code = error.code if isinstance(error, RunError) else code
            line = places.named(str(error))
            announce(_FAILED, json.dumps([_state().process_id, code, line]))
            atexit.register(leave, code)
            raise


def _follow(message: str) -> None:
    """Ends this process as another one said that it ends."""
    process, code, line = json.loads(message)
    if process != _state().process_id:
        line = " ".join(f"error: process {process}: {line}".split())
        os.write(2, f"{line}\n".encode())
        os._exit(code)


def leave(code: int) -> None:
    """Ends this process at once, without JAX's farewell, to which others may not come any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and not _state().process_id:
        time.sleep(2 * _PATIENCE)  # the others still have to hear why, and from this process
    os._exit(code)


def _is_lost(error: BaseException | None) -> bool:
    while error is not None:
        # While a program is compiled, Gloo's errors come as ValueErrors.
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


_calls, _gathers = itertools.count(), itertools.count()


def by_first(function: Callable[[], _T]) -> _T:
    """What `function` gives in process 0, which alone calls it; every process has to ask.

    The others wait without a device, however long it takes, and still hear signals.

    Args:
      function: its value can be pickled.

    Raises:
      UserError, RunError: in every process, if the function raises it.
    """
    if jax.process_count() == 1:
        return function()
    key, store = f"mlip_jax/by_first/{next(_calls)}", _state().client
    if jax.process_index() == 0:
        try:
            value = function()
        except (UserError, RunError) as error:
            store.key_value_set_bytes(key, pickle.dumps((None, error)))
            raise
        store.key_value_set_bytes(key, pickle.dumps((value, None)))
        return value
    while (answer := _look_up(key)) is None:
        pass
    value, raised = pickle.loads(answer)
    if raised is not None:
        raise raised
    return value


def to_zero(value: _T) -> list[_T]:
    """What each process gives, in process 0; nothing in the others. All call it.

    Any thread may, but no two at a time.

    Args:
      value: can be pickled.
    """
    if jax.process_count() == 1:
        return [value]
    key, store = f"mlip_jax/to_zero/{next(_gathers)}", _state().client
    if jax.process_index():
        store.key_value_set_bytes(f"{key}/{jax.process_index()}", pickle.dumps(value))
        return []
    values = [value]
    for process in range(1, jax.process_count()):
        while (answer := _look_up(f"{key}/{process}")) is None:
            pass
        values.append(pickle.loads(answer))
    return values


def _state() -> Any:
    """This process's number and its client of the key-value store that all processes share.

    The one private part of JAX in use: the store has no public name yet (Orbax reaches for it in
    the same place), and the public `jax.process_index` waits for every process's devices.

    Raises:
      RunError: when this version of JAX keeps them elsewhere.
    """
    try:
        from jax._src import distributed

        state = distributed.global_state
        if not hasattr(state, "client") or not hasattr(state, "process_id"):
            raise ImportError("no client or process_id in jax._src.distributed.global_state")
    except (ImportError, AttributeError) as error:
        raise RunError(
            f"several processes cannot run with JAX {jax.__version__}, which keeps their state in "
            f"another place ({error}): install JAX {' to '.join(TESTED_JAX)}"
        ) from error
    return state


def _look_up(key: str) -> bytes | None:
    """What is stored by a key; None if nothing is, after some patience."""
    try:
        value: bytes = _state().client.blocking_key_value_get_bytes(key, int(1000 * _PATIENCE))
        return value
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def announce(word: str, text: str = "") -> None:
    """Says a word, and a text with it, to all processes that listen for it, this one included."""
    if jax.distributed.is_initialized():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state().client.key_value_set(_WORDS + word, text, allow_overwrite=True)


@contextlib.contextmanager
def hearing(word: str, act: Callable[[str], None]) -> Iterator[None]:
    """While inside, gives `act` what any process says with a word; in a thread, and once."""
    left = threading.Event()

    def listen() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not left.is_set():
                text = _look_up(_WORDS + word)
                if text is not None:
                    act(text.decode())
                    return

    thread = threading.Thread(target=listen, daemon=True)
    if jax.distributed.is_initialized():
        thread.start()
    try:
        yield
    finally:
        left.set()
        if thread.ident:
            thread.join()


def to_first(tree: Any, home: Mesh) -> Any:
    """Arrays on the devices of all processes, brought to those of process 0; all call it.

    Args:
      tree: of arrays that all processes hold parts of.
      home: `parallel.home_mesh`.

    Returns:
      In process 0 the tree on `home`, in the others one of None. With one process the tree itself.
    """
    return _brought(tree, home, here=not jax.process_index())


def at_home(tree: Any, home: Mesh) -> Any:
    """As `to_first`, but brought to the devices of every process."""
    return _brought(tree, home, here=True)


def _brought(tree: Any, home: Mesh, here: bool) -> Any:
    if jax.process_count() == 1:
        return tree

    def bring(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array | None:
        # One by one: whole copies of all would need the memory of a whole model on each device.
        if not leaf.is_fully_replicated:
            sharding = leaf.sharding
            assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
            leaf = jax.jit(_same, out_shardings=parallel.replicated(sharding.mesh))(leaf)
            # Two programs at a time might send their messages in another order elsewhere.
            leaf.block_until_ready()
        if not here:
            return None
        sharding_here = parallel.sharding_of(parallel.path_name(path), leaf.shape, home)
        return jax.device_put(np.asarray(leaf.addressable_data(0)), sharding_here)

    return jax.tree_util.tree_map_with_path(bring, tree)


def _same(tree: Any) -> Any:
    return tree
