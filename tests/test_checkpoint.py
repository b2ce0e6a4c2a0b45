"""Checkpoints: bit for bit, whole or not at all, and the right ones kept."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlip_jax.core import schema
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.storage import seal, trees, writes
from mlip_jax.storage.checkpoint import Checkpoints
from mlip_jax.storage.saved import restore_fields, restore_state
from mlip_jax.storage.workdir import open_workdir
from mlip_jax.training import optimizer as optimizers


@flax.struct.dataclass
class State:
    """The kinds of thing that a training state holds."""

    step: jax.Array
    params: dict
    optimizer: tuple
    ema: dict


def make_state(width=256, devices=8):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    values = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    params = {"tower": {"kernel": jnp.asarray(values)}, "logit_scale": jnp.float32(2.5)}
    params["tower"]["bias"] = jnp.asarray([np.nan, -0.0, np.inf], jnp.bfloat16)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    state = State(step=jnp.int32(7), params=params, optimizer=optimizer, ema={})
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P("data") if x.ndim == 2 else P())), state
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def snapshot(state):
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def steps_of(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2, to be copied by those who break it."""
    folder, state = tmp_path_factory.mktemp("saved"), make_state()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, {"config": {"seed": 1}})
        checkpoints.save(2, state.replace(step=state.step + 1), {"config": {"seed": 2}})
    return folder, state


@pytest.fixture
def workdir(saved, tmp_path):
    subprocess.run(["cp", "-r", saved[0] / "checkpoints", tmp_path], check=True)
    return tmp_path


def test_restores_bits_shardings_and_extras(saved):
    folder, state = saved
    with Checkpoints(folder) as checkpoints:
        restored, extras = checkpoints.restore(abstract(state))
    assert_same_bits(restored, state.replace(step=state.step + 1))
    for leaf, original in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert leaf.sharding == original.sharding
    assert extras["config"] == {"seed": 2} and extras["step"] == 2
    assert {"mlip_jax", "python", "jax", "flax", "optax"} <= extras["versions"].keys()
    assert "commit" in extras


def test_restores_onto_another_mesh(saved):
    folder, state = saved
    with Checkpoints(folder) as checkpoints:
        restored, _ = checkpoints.restore(abstract(make_state(devices=2)))
    assert_same_bits(restored.params, state.params)
    assert len(restored.params["tower"]["kernel"].sharding.device_set) == 2


def test_nothing_saved_is_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None


@pytest.mark.parametrize("devices", [1, 8])
def test_holds_the_state_as_it_was_though_it_is_donated_at_once(tmp_path, devices):
    state = make_state(width=40_000, devices=devices)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(
        lambda tree: jax.tree.map(lambda x: (x * 1.5 + 1).astype(x.dtype), tree),
        donate_argnums=0,
        out_shardings=shardings,
    )
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step in range(3):
            before = snapshot(state)
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = update(state)
            restored, _ = checkpoints.restore(abstract(state))
            assert_same_bits(restored, before)


def test_a_saved_step_is_left_as_it_is(workdir, saved):
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(2, saved[1], {"config": "another"})
        assert checkpoints.restore(abstract(saved[1]))[1]["config"] == {"seed": 2}


def test_keeps_the_last_and_the_best_where_only_some_were_evaluated(tmp_path):
    state = make_state(width=8)
    scores = {1: 0.1, 3: 0.9, 5: 0.3, 7: float("nan")}
    options = {"keep_last": 2, "keep_best": 1, "best": "recall"}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step in range(1, 9):
            metrics = {"recall": scores[step], "other": 1.0} if step in scores else None
            checkpoints.save(step, state, {}, metrics)
        checkpoints.wait()
        assert steps_of(tmp_path) == [3, 7, 8]
    with Checkpoints(tmp_path, **options) as checkpoints:  # and after a restart
        checkpoints.save(9, state, {}, {"recall": 0.95})
        checkpoints.wait()
        assert steps_of(tmp_path) == [8, 9]


def test_keep_last_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)


def damage_bit(path):
    """Flips one bit in the middle of the tensors' largest file."""
    target = max((path / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)


def damage_length(path):
    target = max((path / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    os.truncate(target, target.stat().st_size // 2)


def damage_missing(path):
    next((path / "extras").glob("metadata")).unlink()


def damage_seal(path):
    (path / "files.json").unlink()


def written(name, content):
    def damage(path):
        (path / name).write_bytes(content)

    return damage


DAMAGES = [
    damage_bit,
    damage_length,
    damage_missing,
    damage_seal,
    written("metrics/metrics", b'{"scor'),  # Orbax reads it of all checkpoints at its start
    written("metrics/metrics", b"[]"),
    written("files.json", b"{}"),
    written("files.json", b"[]"),
    written("files.json", b"null"),
    written("files.json", b'{"state/_METADATA": 5}'),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_and_says_so(workdir, saved, capfd, damage):
    damage(workdir / "checkpoints" / "2")
    params = restore_fields(workdir)[0]["params"]
    assert_same_bits(params, snapshot(saved[1].params))
    with Checkpoints(workdir) as checkpoints:
        restored, extras = checkpoints.restore(abstract(saved[1]))
        assert extras["step"] == 1
        assert_same_bits(restored, saved[1])
        # The way is free for the step to be saved again.
        checkpoints.save(2, saved[1], {})
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: checkpoint") for line in lines)
    assert steps_of(workdir) == [1, 2]
    assert (workdir / "checkpoints" / "damaged-2").is_dir()


def odd_metadata(path):
    (path / "2" / "_CHECKPOINT_METADATA").write_bytes(b"[]")


ODD = [
    odd_metadata,
    lambda path: (path / "2" / "_CHECKPOINT_METADATA").write_bytes(b'{"init_timestamp_nsecs": {}}'),
    lambda path: (path / "\u00b2").mkdir(),
    lambda path: (path / "007").mkdir(),
    lambda path: (path / "-5").mkdir(),
    lambda path: (path / "11").touch(),
    lambda path: (path / "step_3").mkdir(),
]


@pytest.mark.parametrize("make_odd", ODD)
def test_what_is_no_checkpoint_is_passed_over(workdir, saved, capfd, make_odd):
    make_odd(workdir / "checkpoints")
    assert restore_fields(workdir)[1]["step"] == 2
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore(abstract(saved[1]))[1]["step"] == 2
    assert not capfd.readouterr().err


def test_an_older_one_with_a_damaged_file_does_not_keep_a_run_from_going_on(workdir, saved, capfd):
    (workdir / "checkpoints" / "1" / "metrics" / "metrics").write_bytes(b"\xff")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore(abstract(saved[1]))[1]["step"] == 2
    assert "checkpoints/1 is damaged (metrics/metrics has changed" in capfd.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path, capfd):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="cannot use .*checkpoints: File exists"):
        Checkpoints(tmp_path)
    assert not capfd.readouterr().err


def test_a_folder_that_is_removed_meanwhile_is_made_again(workdir, saved):
    with Checkpoints(workdir) as checkpoints:
        shutil.rmtree(workdir)
        checkpoints.save(3, saved[1], {})
    assert restore_fields(workdir)[1]["step"] == 3


def test_all_damaged_is_an_error_and_no_fresh_start(workdir, saved):
    for step in "12":
        damage_bit(workdir / "checkpoints" / step)
    with pytest.raises(RunError, match="all are damaged"):
        restore_fields(workdir)
    with Checkpoints(workdir) as checkpoints, pytest.raises(RunError, match="every checkpoint"):
        checkpoints.restore(abstract(saved[1]))
    with Checkpoints(workdir) as checkpoints, pytest.raises(RunError, match="every checkpoint"):
        checkpoints.restore(abstract(saved[1]))


def test_the_state_of_an_older_version_is_named_as_such(saved):
    folder, state = saved
    newer = {**vars(abstract(state)), "slow": {}}
    message = "keeps no slow: an older mlip_jax wrote it"
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(newer)


def test_another_model_names_the_tensor_and_both_shapes(saved):
    folder, state = saved
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(
            UserError, match=r"kernel is float32\[64, 256\] there and float32\[64, 128\]"
        ):
            checkpoints.restore(abstract(make_state(width=128)))
        with pytest.raises(UserError, match="checkpoint has no tensor ema/extra"):
            checkpoints.restore(abstract(state.replace(ema={"extra": state.step})))
        fewer = {key: value for key, value in state.params.items() if key != "tower"}
        with pytest.raises(UserError, match="this config's model has no tensor params/tower/bias"):
            checkpoints.restore(abstract(state.replace(params=fewer)))


def test_what_the_optimizer_keeps_of_a_tower_may_be_on_one_side_alone(tmp_path):
    place = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), P())

    def state(rate):
        settings = schema.default()
        settings.optimizer.name, settings.optimizer.rates.text = "muon", rate
        params = {name: {"kernel": jnp.ones((2, 3))} for name in ("image_encoder", "text_encoder")}
        optimizer = optimizers.make(settings)
        _, kept = optimizer.update(params, optimizer.init(params), params)
        whole = State(step=jnp.int32(1), params=params, optimizer=kept, ema={})
        return jax.device_put(whole, place)

    tuned, frozen = state(1.0), state(0.0)
    kept = "1/inner_states/muon/inner_state/0/mu/text_encoder/kernel"
    assert kept in trees.named(tuned.optimizer)
    assert not any("text" in name for name in trees.named(frozen.optimizer))
    for name, saved, wanted in (("tuned", tuned, frozen), ("frozen", frozen, tuned)):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, saved, {})
            restored, _ = checkpoints.restore(abstract(wanted))
        others, _ = restore_state(tmp_path / name, abstract(wanted))
        assert_same_bits(restored, others)
        assert jax.tree.structure(restored) == jax.tree.structure(wanted)
        assert_same_bits(restored.params, saved.params)
        moments = trees.named(restored.optimizer)
        expected = trees.named(saved.optimizer)
        for tensor in moments.keys() & expected.keys():
            assert_same_bits(moments[tensor], expected[tensor])
        if wanted is tuned:
            assert not np.any(moments[kept])


def test_fields_come_back_as_numpy_without_touching_the_folder(saved):
    folder, state = saved
    before = sorted(folder.rglob("*"))
    fields, extras = restore_fields(folder, ("params", "ema"))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(fields))
    assert_same_bits(fields["params"], snapshot(state.params))
    assert fields["ema"] == {} and extras["step"] == 2
    assert restore_fields(folder, step=1)[1]["step"] == 1
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        restore_fields(folder, step=5)
    assert sorted(folder.rglob("*")) == before


def test_fields_of_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        restore_fields(tmp_path)


# A process that saves step 1, then as the arguments say. XLA_FLAGS and the platform are inherited.
PROGRAM = textwrap.dedent(
    """
    import resource, sys, time
    import jax.numpy as jnp
    from mlip_jax.core.errors import RunError
    from mlip_jax.storage.checkpoint import Checkpoints

    class Slow(Checkpoints):
        def _seal(self):  # everything is written, nothing committed
            if self._saving == 2:
                print("saving", flush=True)
                time.sleep(60)
            super()._seal()

    folder, what = sys.argv[1:]
    state = {"step": jnp.int32(1), "params": jnp.arange(2_000_000.0) ** 2}
    checkpoints = (Slow if what == "kill" else Checkpoints)(folder)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    if what == "kill":
        checkpoints.save(2, state, {})
        checkpoints.wait()
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            checkpoints.save(2, {**state, "params": state["params"] + 0.5}, {})
            checkpoints.wait()
        except RunError as error:
            print(error)
    """
)


def test_kill_in_the_middle_of_a_save_leaves_the_former_good(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path, "kill"], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "saving\n"
        drafts = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("2")]
        assert drafts and "2" not in drafts
        process.send_signal(signal.SIGKILL)
    assert steps_of(tmp_path) == [1]
    state = {"step": jnp.int32(1), "params": jnp.arange(2_000_000.0) ** 2}
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(abstract(state))
        assert_same_bits(restored, state)
        checkpoints.save(2, state, {})
    assert steps_of(tmp_path) == [1, 2]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_disk_that_takes_no_more_is_one_clear_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, "limit"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "cannot write the checkpoint of step 2" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert steps_of(tmp_path) == [1]
    assert restore_fields(tmp_path)[1]["step"] == 1


def test_a_workdir_keeps_config_environment_and_its_lock(tmp_path):
    config = schema.default()
    with open_workdir(tmp_path / "run", config) as folder:
        assert (folder / "config.json").read_text() == schema.to_json(config)
        environment = json.loads((folder / "environment.json").read_text())
        assert (
            environment["devices"] == ["cpu"] * 8
            and environment["versions"]["jax"] == jax.__version__
            and environment["folder"] == os.getcwd()
        )
        other = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from mlip_jax.core import errors, schema; "
                "from mlip_jax.storage.workdir import open_workdir\n"
                "try:\n    open_workdir(sys.argv[1], schema.default()).__enter__()\n"
                "except errors.UserError as error:\n    print(error)",
                folder,
            ],
            capture_output=True,
            text=True,
        )
        assert f"process {os.getpid()} trains in {folder} already" in other.stdout, other.stderr
    config.log_every = 3  # moves no parameter, so it may change
    with open_workdir(tmp_path / "run", config):
        assert json.loads((folder / "config.json").read_text())["log_every"] == 3
    config.seed = 5
    with (
        pytest.raises(UserError, match=r"another config \(seed: 0 -> 5\): give another --workdir"),
        open_workdir(tmp_path / "run", config),
    ):
        pass


def test_a_workdir_with_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with (
        pytest.raises(UserError, match="config.json: not JSON: .* line 1, column 2; mend it"),
        open_workdir(tmp_path, schema.default()),
    ):
        pass


LARGE = json.dumps({"optimizer": {"eps": 10**400}})
ODD = ["[]", "5", "null", '{"model": 5}', '{"seed": null}', LARGE]


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_a_config_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with (
        pytest.raises(UserError, match="config.json.*mend it or remove it"),
        open_workdir(tmp_path, schema.default()),
    ):
        pass


def impossible_names(folder):
    (folder / "a_file").touch()
    (folder / "lock" / ".lock").mkdir(parents=True)
    (folder / "config" / "config.json").mkdir(parents=True)
    (folder / "victim").write_text("precious")
    (folder / "link").mkdir()
    (folder / "link" / ".lock").symlink_to(folder / "victim")
    (folder / "looped").symlink_to(folder / "looped")
    return (
        Path("/proc/x"),
        *(folder / name for name in ("x" * 300, "a_file", "a_file/run", "a\0b", "looped/run")),
        *(folder / name for name in ("lock", "config", "link")),
    )


def test_an_impossible_workdir_is_one_line(tmp_path):
    for name in impossible_names(tmp_path):
        with (
            pytest.raises(UserError, match=r"cannot (use|read) (?s:.*)"),
            open_workdir(name, schema.default()),
        ):
            pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_workdir_that_cannot_be_written_in_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with (
        pytest.raises(UserError, match="cannot write in .*: give another --workdir"),
        open_workdir(tmp_path, schema.default()),
    ):
        pass


def test_what_a_killed_process_left_is_cleared_at_the_next_start(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    number = int(ended.stdout)
    left = [f".results.md.{number}", f".report.html.{number}", f"report/.curves.png.{number}"]
    kept = [f".results.json.{os.getpid()}", ".results.json.partial", "notes.7"]
    (tmp_path / "report").mkdir()
    for name in (*left, *kept):
        (tmp_path / name).touch()
    with open_workdir(tmp_path, schema.default()):
        pass
    assert [(tmp_path / name).exists() for name in (*left, *kept)] == [False] * 3 + [True] * 3


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot use .*file as --workdir"),
        open_workdir(tmp_path / "file", schema.default()),
    ):
        pass


def test_a_seal_s_names_are_shown_in_short(tmp_path):
    (tmp_path / seal.NAME).write_text(json.dumps({"x" * 5000: [1, 1]}))
    assert seal.damage(tmp_path) == f"{'x' * 200} is missing"


def test_what_stands_in_the_lock_s_place_is_named(tmp_path):
    (tmp_path / "run/.lock").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=r"run as --workdir: .*run/\.lock: Is a directory"),
        open_workdir(tmp_path / "run", schema.default()),
    ):
        pass


def test_saving_does_not_wait_for_the_disk(tmp_path):
    """The write goes on after save() has returned."""

    class Slow(Checkpoints):
        def _seal(self):
            time.sleep(0.5)
            super()._seal()

    with Slow(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(width=8), {})
        assert steps_of(tmp_path) == []
        checkpoints.wait()
        assert steps_of(tmp_path) == [1]


def test_the_tasks_of_a_failed_save_say_nothing(tmp_path, caplog):
    with Checkpoints(tmp_path):
        pass
    full, other = OSError(errno.ENOSPC, "No space left on device"), ValueError("another")
    for name in ("asyncio", "absl"):
        logging.getLogger(name).error("never retrieved", exc_info=full)
        logging.getLogger(name).error("never retrieved", exc_info=other)
    assert [record.exc_info[1] for record in caplog.records] == [other] * 2


def test_a_write_that_outlasts_its_failed_save_says_nothing(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    writes.leave_late_writes_alone()
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("anything else"))
    for unraisable in (late, other):
        sys.unraisablehook(unraisable)
    assert reported == [other]
    hook = sys.unraisablehook
    writes.leave_late_writes_alone()
    assert sys.unraisablehook is hook  # once a process
