"""Places in a bucket: folders of this machine that mirror them, against servers on the loopback."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlip_jax import main as door
from mlip_jax.core import buckets as mirrors
from mlip_jax.core import object_store, places
from mlip_jax.core.errors import RunError, Unreachable, UserError
from mlip_jax.core.files import whole_folder, write_atomically


@pytest.fixture
def elsewhere(bucket, tmp_path, monkeypatch):
    """Opens the folder as another machine would: with nothing of it here."""

    def act():
        places.release()
        return places.local(bucket)

    return act


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_written_whole_is_there_from_another_machine(bucket, elsewhere):
    folder = places.local(bucket)
    write_atomically(folder / "config.json", "{}")
    with whole_folder(folder / "index") as draft:
        (draft / "a").write_bytes(b"one")
        (draft / "deep").mkdir()
        (draft / "deep" / "b").write_bytes(b"")
    folder = elsewhere()
    assert contents(folder) == {"config.json": b"{}"}
    assert places.names(folder) == ["config.json", "index"]
    places.fetch(folder / "index")
    assert contents(folder / "index") == {"a": b"one", "deep/b": b""}
    write_atomically(folder / "config.json", "[]")
    assert contents(elsewhere()) == {"config.json": b"[]"}


def test_what_is_removed_while_a_folder_is_brought_is_left_out(bucket, elsewhere, monkeypatch):
    folder = elsewhere() / "steps"
    mirror = places.mirror_of(folder)
    for name in ("steps/1/mark", "steps/1/y", "steps/2/mark"):
        mirror.write(name, b"content")
    find, listings = mirror._find, []

    def removing(path):
        listings.append(find(path))
        for name in ("steps/1/mark", "steps/1/y"):
            mirror.delete(name)
        return listings[-1]

    monkeypatch.setattr(mirror, "_find", removing)
    places.fetch(folder)
    assert [len(found) for found in listings] == [3, 1]
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert contents(folder) == {"2/mark": b"content"}


def test_a_folder_is_brought_without_parts_and_where_it_is_marked(bucket, elsewhere):
    folder = places.local(bucket) / "steps"
    for step, files in {"1": ["mark", "big/x", "y"], "2": ["y"]}.items():
        for file in files:
            (folder / step / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / step / file).write_text(f"{step} {file}")
    places.publish(folder)
    folder = elsewhere() / "steps"
    places.fetch(folder, without=("big",), marked_by="mark")
    assert sorted(contents(folder)) == ["1/mark", "1/y"]
    places.fetch(folder / "1")
    assert contents(folder)["1/big/x"] == b"1 big/x"
    assert places.names(folder) == ["1", "2"] and places.names(folder / "none") == []


def test_removed_and_renamed_here_is_so_there(bucket, elsewhere):
    folder = places.local(bucket)
    for name in ("one/mark", "one/deep/x", "two/y", "file"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    places.publish(folder)
    places.move(folder / "one", folder / "three")
    places.remove(folder / "two")
    places.remove(folder / "file")
    places.remove(folder / "none")
    assert sorted(contents(folder)) == ["three/deep/x", "three/mark"]
    folder = elsewhere()
    places.fetch(folder)
    assert contents(folder) == {"three/deep/x": b"one/deep/x", "three/mark": b"one/mark"}


def test_what_changes_there_is_new_here_and_what_is_gone_is_gone(bucket):
    folder = places.local(bucket)
    there = mirrors.Mirror(bucket, folder)  # stands for another process
    there.write("results.json", b"1")
    there.write("steps/1/x", b"1")
    there.write("steps/2/x", b"1")
    folder = places.local(bucket)
    places.fetch(folder / "steps")
    there.write("results.json", b"22")
    there.delete("steps/1/x")
    assert contents(places.local(bucket)) == {
        "results.json": b"22",
        "steps/1/x": b"1",
        "steps/2/x": b"1",
    }
    places.fetch(folder / "steps")
    assert [path.name for path in (folder / "steps").iterdir()] == ["2"]


def test_objects_that_mark_folders_or_point_outside_are_passed_over(bucket):
    there = mirrors.Mirror(bucket, Path("/none"))
    for name in ("sub/", "sub/x", "../outside", "sub/../../outside"):
        there._files.pipe_file(f"{bucket.partition('://')[2]}/{name}", b"1")
    folder = places.local(bucket)
    places.fetch(folder)
    assert contents(folder.parent).keys() - {".alive"} == {f"{folder.name}/sub/x"}
    assert places.names(folder / "sub") == ["x"] and places.sizes(folder / "sub") == {"x": 1}


def test_a_file_that_grows_is_copied_at_intervals_and_at_the_end(bucket, monkeypatch):
    monkeypatch.setattr(places, "INTERVAL", 0.05)
    folder = places.local(bucket)
    there = mirrors.Mirror(bucket, folder)
    with places.following(folder / "log"), (folder / "log").open("ab", buffering=0) as file:
        file.write(b"1\n")
        deadline = time.monotonic() + 20
        while there.read("log") != b"1\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        monkeypatch.setattr(places, "INTERVAL", 1000)
        file.write(b"2\n")
        places.flush(folder)
        assert there.read("log") == b"1\n2\n"
        file.write(b"3\n")
    assert there.read("log") == b"1\n2\n3\n"


def test_errors_name_the_place_as_the_user_wrote_it(bucket):
    path = places.local(bucket) / "config.json"
    assert places.shown(path) == f"{bucket}/config.json"
    with pytest.raises(UserError) as error, places.named_in_errors():
        raise UserError(f"cannot read {path}")
    assert str(error.value) == f"cannot read {bucket}/config.json"


def test_nothing_is_left_on_the_disk_not_even_of_a_killed_process(bucket, tmp_path):
    program = (
        "import os, signal; from mlip_jax.core import places;"
        f"places.local({bucket!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1])
    above = tmp_path / "cache" / "mirrors"
    assert len(list(above.glob("*/"))) == 1
    folder = places.local(bucket)
    assert list(above.glob("*/")) == [folder.parent]
    places.release()
    assert not list(above.glob("*/"))


def test_a_server_that_fails_every_tenth_request_costs_nothing_but_time(faults, bucket, elsewhere):
    folder = places.local(bucket) / "many"
    folder.mkdir()
    for number in range(25):
        (folder / f"{number}").write_bytes(bytes([number]) * 100)
    faults.answer = lambda request: 503 if request % 10 == 0 else 0
    places.publish(folder)
    folder = elsewhere() / "many"
    places.fetch(folder)
    assert contents(folder) == {f"{n}": bytes([n]) * 100 for n in range(25)}
    assert faults.requests > 50


def test_libraries_do_not_try_for_long_by_themselves(faults, bucket, tmp_path):
    there = object_store.Bucket(bucket)
    there.write("file", b"1")
    faults.answer = lambda _: 503
    for act in (there._files.cat_file, lambda place: there._files.get_file(place, tmp_path / "x")):
        before = faults.requests
        with pytest.raises(Exception):  # noqa: B017, each library has its own
            act(there._object("file"))
        assert faults.requests - before <= 12  # two tries, of which each may have some in it


def test_a_server_that_is_away_for_a_while_is_waited_for(faults, bucket):
    folder = places.local(bucket)
    back = time.monotonic() + 3
    faults.answer = lambda _: None if time.monotonic() < back else 0
    write_atomically(folder / "config.json", "{}")
    assert time.monotonic() > back
    assert mirrors.Mirror(bucket, folder).read("config.json") == b"{}"


def test_a_server_that_stays_away_is_one_line_and_asks_to_be_started_again(
    faults, bucket, monkeypatch, capfd
):
    folder = places.local(bucket)
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    monkeypatch.setattr(object_store, "AT_START", 0.5)
    faults.answer = lambda _: 503
    with pytest.raises(Unreachable, match=f"the server of {bucket} does not answer") as error:
        write_atomically(folder / "config.json", "{}")
    assert "\n" not in str(error.value)
    places.release()
    assert door.main(["mlip", "evaluate", f"--workdir={bucket}"]) == 75
    assert f"error: the server of {bucket} does not answer" in capfd.readouterr().err


REFUSED = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "AWS_ACCESS_KEY_ID",
}


def test_credentials_that_are_refused_name_the_variable(faults, bucket, object_server, capfd):
    faults.answer = lambda _: 403
    assert door.main(["mlip", "evaluate", f"--workdir={bucket}"]) == 2
    line = capfd.readouterr().err
    assert line.startswith(f"error: cannot use {bucket}: ") and line.count("\n") == 1
    assert REFUSED[object_server[0]] in line


def test_a_bucket_that_may_be_read_alone_is_one_line(faults, bucket, monkeypatch):
    folder = places.local(bucket)
    faults.answer = lambda _: 403
    with pytest.raises(RunError, match=f"{bucket} refuses .*read and write"):
        write_atomically(folder / "config.json", "{}")


def test_a_missing_bucket_is_named(bucket, object_server, capfd):
    url = f"{object_server[0]}://none/run"
    assert door.main(["mlip", "evaluate", f"--workdir={url}"]) == 2
    line = capfd.readouterr().err
    assert f"error: cannot use {url}: there is no bucket {object_server[0]}://none" in line


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/run", "ftp:// is no kind of place that is known here; gs:// and s3:// are"),
        ("gs:///run", "names no bucket: write gs://BUCKET/FOLDER"),
        ("gs://", "names no bucket"),
    ],
)
def test_a_url_that_cannot_be_is_one_line(url, message, capfd):
    assert door.main(["mlip", "evaluate", f"--workdir={url}"]) == 2
    output = capfd.readouterr().err
    assert output.startswith("error:") and message in output and output.count("\n") == 1


def test_a_url_that_pathlib_has_read_is_refused_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs:/bucket/run: a Path takes a slash from a URL"):
        places.local(Path("gs://bucket/run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "module", "extra"), [("gs://b/run", "gcsfs", "gcs"), ("s3://b/run", "s3fs", "s3")]
)
def test_a_library_that_is_missing_names_its_extra(url, module, extra, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert door.main(["mlip", "evaluate", f"--workdir={url}"]) == 2
    assert f"pip install 'mlip_jax[{extra}]'" in capfd.readouterr().err
