"""The files and lines that a run reports with."""

import errno
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mlip_jax.core.errors import RunError
from mlip_jax.training.metrics import Clock, MetricWriter, Paces, brief, cut_back, describe

SCALARS = {
    "loss": 3.25,
    "loss/spatial_global": 1.25,
    "loss/frequency_global": 2.0,
    "learning_rate": 1e-3,
    "images_per_second": 1234.5,
    "data_wait": 0.031,
}


def writer(folder, **options):
    options = {
        "seen": lambda step: 8 * step,
        "total_steps": 40,
        "console": Console(file=io.StringIO()),
    } | options
    return MetricWriter(folder, **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Reads TensorBoard's files: length, its checksum, an event, its checksum."""
    loaded = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int(np.frombuffer(data[:8], np.uint64)[0])
            loaded.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return loaded


def test_a_line_names_step_samples_time_and_scalars(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.on_metrics(10, SCALARS)
        metrics.on_evaluation(10, {"retrieval/emoji/text_to_image_recall@1": 0.5})
    train, evaluation = lines(tmp_path)
    assert list(train) == ["step", "samples", "time", *SCALARS]
    assert (train["step"], train["samples"], train["loss"]) == (10, 80, 3.25)
    assert evaluation["retrieval/emoji/text_to_image_recall@1"] == 0.5
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert "loss/spatial_global" in tags
    assert "retrieval/emoji/text_to_image_recall_1" in tags


def test_what_is_not_finite_is_null_so_that_the_line_is_json(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.on_metrics(1, {"loss": float("nan")})
    assert lines(tmp_path)[0]["loss"] is None


def test_resume_supersedes_later_lines_and_mends_a_cut_one(tmp_path):
    with writer(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.on_metrics(step, SCALARS | {"loss": step})
    uninterrupted = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 4')  # killed here
    with writer(tmp_path, start_step=20) as metrics:
        assert [line["step"] for line in lines(tmp_path)] == [10, 20]
        metrics.on_metrics(30, SCALARS | {"loss": 30})
    resumed = lines(tmp_path)
    for line in (*uninterrupted, *resumed):
        del line["time"]
    assert resumed == uninterrupted
    restarts = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in restarts] == [
        (21, SessionLog.START)
    ]


def test_cut_back_leaves_a_good_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat().st_ino
    cut_back(path, 2)
    assert path.stat().st_ino == before
    cut_back(path, 0)
    assert path.read_text() == ""


def test_a_full_disk_is_one_clear_error_and_whole_lines(tmp_path, monkeypatch):
    metrics = writer(tmp_path)
    metrics.on_metrics(10, SCALARS)
    good = (tmp_path / "metrics.jsonl").read_bytes()

    class Full:
        """Takes a few bytes, then none, as a disk does."""

        def __init__(self, file):
            self.file, self.room = file, 5

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(metrics, "_lines", Full(metrics._lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl: No space left on device"):
        metrics.on_metrics(20, SCALARS)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    metrics.close()


def test_only_the_active_process_writes(tmp_path):
    with writer(tmp_path, active=False) as metrics:
        metrics.on_step(1)
        metrics.on_metrics(1, SCALARS)
        metrics.on_evaluation(1, {})
        metrics.note("hello")
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_an_interval_is_a_line(tmp_path):
    console = Console(file=io.StringIO())
    with writer(tmp_path, console=console) as metrics:
        metrics.on_step(9)
        metrics.on_metrics(10, SCALARS)
        metrics.note("[saved]")
    first, second = console.file.getvalue().splitlines()
    assert first.startswith(
        "step 10/40  loss 3.250 (spatial_global 1.250, frequency_global 2.000)  "
        "1,234 images/s  data wait 3 %  lr 1.0e-03  left 00:00:0"
    )
    assert second == "[saved]"


def test_on_a_terminal_there_is_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    with writer(tmp_path, console=console, start_step=5) as metrics:
        metrics.on_step(10)
        metrics.on_metrics(10, SCALARS)
        metrics.note("between")
    drawn = console.file.getvalue()
    assert "10/40" in drawn and "loss 3.250" in drawn and "between" in drawn


def test_the_bar_leaves_lines_and_fits_into_80_columns(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with writer(tmp_path, console=console, total_steps=2343) as metrics:
        metrics.on_step(1)
        metrics.on_step(2)
        metrics.begin(1, SCALARS)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "step 1/2343  loss 3.250 (spatial_global" in drawn  # a line that stays
    bar = [line for line in re.split(r"[\r\n]", drawn) if "2/2343" in line][-1]
    assert "loss 3.250" in bar and "images/s" in bar and "lr 1.0e-03" in bar and "\u2026" not in bar
    assert not lines(tmp_path)


def test_steps_that_stand_out_are_counted():
    paces, moment = Paces(), 0.0
    for step in range(40):
        moment += 9.0 if step in (20, 30) else 1.0
        paces.add(moment)
    assert paces.take_slow() == (2, 9.0) and paces.take_slow() is None
    paces.rest()
    paces.add(moment + 1000)  # after an evaluation
    assert paces.take_slow() is None and paces.last == 1.0
    for _ in range(5):  # of few steps, none stands out
        few = Paces()
        for moment in (0.0, 1.0, 50.0):
            few.add(moment)
        assert few.take_slow() is None


def test_slow_steps_are_in_the_line(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    moments = iter([*range(12), 20.0])
    with writer(tmp_path, console=console) as metrics:
        monkeypatch.setattr(metrics._paces, "add", _feed(metrics._paces, moments))
        for step in range(13):
            metrics.on_step(step)
        metrics.on_metrics(13, SCALARS)
        metrics.on_metrics(14, SCALARS)
    first, second = console.file.getvalue().splitlines()
    assert "  1 slow step, up to 9.0 s  left" in first and "slow" not in second


def _feed(paces, moments):
    add = paces.add
    return lambda _: add(float(next(moments)))


def test_the_time_left_counts_what_the_steps_of_each_stage_cost(tmp_path):
    console = Console(file=io.StringIO())

    def work(step):
        return step + 3.0 * max(step - 20, 0)

    with writer(tmp_path, console=console, work=work) as metrics:
        metrics._started -= 100.0
        metrics.on_metrics(20, {"loss": 1.0})  # 20 of 100
    assert "left 00:06:4" in console.file.getvalue()


def test_one_perspective_is_told_once():
    assert describe({"loss": 1.0, "loss/spatial_global": 1.0}) == "loss 1.000"


def test_clock_measures_speed_and_the_share_of_waiting():
    now = 0.0
    clock = Clock(lambda step: 4 * step, done=10, now=lambda: now)
    with clock.waiting():
        now += 1.0
    now += 3.0
    assert clock.lap(done=12) == {"images_per_second": 2.0, "data_wait": 0.25}
    now += 2.0
    assert clock.lap(done=13) == {"images_per_second": 2.0, "data_wait": 0.0}
    now += 2.0
    measured = clock.lap(14, brought=3_000_000)
    assert measured["bucket_bytes_per_second"] == 1.5e6
    assert describe(measured) == "2 images/s  data wait 0 %  1.5 MB/s from buckets"
    now += 2.0
    assert clock.lap(15, brought=3_000_000)["bucket_bytes_per_second"] == 0.0
    assert brief({"images_per_second": 2.0, "data_wait": 0.5}) == "2 images/s data wait 50 %"


def test_a_step_under_way_counts_when_it_is_done():
    now = 0.0
    clock = Clock(lambda step: 4 * step, now=lambda: now)
    now += 2.0
    before = clock.lap(done=2)
    now += 5.0  # an evaluation
    clock.rest(done=3)
    now += 0.5
    assert clock.lap(done=3) == before == {"images_per_second": 4.0, "data_wait": 0.0}
    now += 1.5
    assert clock.lap(done=4) == {"images_per_second": 2.0, "data_wait": 0.0}
