"""Damaged files of a run's folder: passed over, or one line that says what is wrong with them.

By `-m slow`, every reader meets 20,000 files.
"""

import json

import numpy as np
from fuzzing import EXAMPLES, gives, meet, said, watched

from mlip_jax.core import history, schema
from mlip_jax.core.trained import read_config
from mlip_jax.core.validation import validate
from mlip_jax.evaluations import results, sheets
from mlip_jax.reports import report
from mlip_jax.storage import seal
from mlip_jax.training.metrics import cut_back

folder = watched  # a fixture


@EXAMPLES
def test_configs(folder, examples):
    """config.json and environment.json, as evaluate, report and a resumed run read them."""
    config = json.loads(schema.to_json(schema.default()))
    environment = {"versions": {"jax": "0.10"}, "folder": "/home", "devices": ["cpu"]}
    words = ("jsonl:a.jsonl", "mix:a*1", "bert", "resnet", "muon", "../outside/victim", 0.0, -1)
    files = {"config.json": config, "environment.json": environment}

    def make(odd):
        changed = odd.choice(("config.json", "config.json", "environment.json"))
        texts = {name: json.dumps(values) for name, values in files.items()}
        return texts | {changed: odd.changed(files[changed], 2, words)}

    def check(texts):
        for name, text in texts.items():
            (folder / name).write_text(text)
        gives(report._environment, folder)
        read = gives(read_config, folder)
        if read is not None and gives(lambda: validate(read) or True):
            again = schema.from_json(schema.to_json(read))
            assert not schema.differences(read, again) and read.name
            assert np.isfinite(list(_numbers(read.to_dict()))).all()

    meet("configs", make, check, examples)


def _numbers(values):
    for value in values.values():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and abs(value) < 2**63:
            yield float(value)


@EXAMPLES
def test_results(folder, examples):
    file = folder / results.FILE_NAME
    found = results.Results(step=8)
    figure = "retrieval/emoji/text_to_image_recall@1"
    found.figures[figure], found.chance[figure] = 0.5, 0.1
    found.examples[figure], found.protocols[figure] = 10, "p"
    found.notes["retrieval/emoji"] = "a note"
    results.write_results(folder, found)
    whole = json.loads(file.read_text())
    words = ("chance/a/b/c", "note/a/b", "examples/a", "a/b/c", "step", "protocol/a/b/c")

    def check(text):
        file.write_text(text)
        read = gives(results.read_results, folder)
        if read is not None:
            sheet = sheets.sheet(read, "a run")
            sheets.markdown(sheet).encode("utf-8", "backslashreplace")
            sheets.html(sheet)

    meet("results", lambda odd: odd.changed(whole, 2, words), check, examples)


@EXAMPLES
def test_metrics(folder, examples):
    file = folder / "metrics.jsonl"

    def line(step, loss="loss"):
        values = {"step": step, "samples": 8 * step, "time": 1.0, loss: 1.0}
        return json.dumps({**values, "images_per_second": 2.0})

    def make(odd):
        lines = []
        for step in range(1, odd.randint(2, 6)):
            good = line(step, odd.choice(("loss", "retrieval/a/b")))
            lines.append(good if odd.once_in(2) else odd.changed(json.loads(good), 2, ("loss",)))
        data = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n" * odd.randrange(2)
        return (odd.damaged(data) if odd.once_in(4) else data), odd.randrange(5)

    def check(example):
        data, step = example
        file.write_bytes(data)
        read = history.read_history(file)
        for lines in (read.training, read.evaluation):
            steps = [each["step"] for each in lines]
            assert steps == sorted(steps) and len(set(steps)) == len(steps)
            for key in history.keys(lines, ""):
                samples, values = history.series(lines, key)
                assert len(samples) == len(values)
        history.training_seconds(read)
        cut_back(file, step)
        after = history.read_history(file)
        assert all(each["step"] <= step for each in (*after.training, *after.evaluation))
        whole = file.read_bytes()
        cut_back(file, step)
        assert file.read_bytes() == whole

    meet("metrics", make, check, examples)


@EXAMPLES
def test_seals(folder, examples):
    (folder / "state").mkdir()
    files = {"state/a": b"some", "state/b": b"bytes", "extras": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sealed = seal.files_of(folder)
    seal.write(folder, sealed)
    assert not seal.damage(folder)
    file = folder / seal.NAME
    paths = [folder / name for name in files]

    def make(odd):
        if odd.once_in(2):
            return file, odd.changed(sealed, 1, ("../outside/victim", "state")).encode()
        path = odd.choice(paths)
        return path, odd.damaged(files[path.relative_to(folder).as_posix()])

    def check(example):
        path, content = example
        whole = path.read_bytes()
        path.write_bytes(content)
        damage = seal.damage(folder)
        assert not damage or said(damage)
        try:
            same = json.loads(content) == sealed if path == file else content == whole
        except (ValueError, RecursionError):
            same = False
        covers = path == file and not damage
        assert same or damage or (covers and json.loads(content).items() <= sealed.items())
        path.write_bytes(whole)

    meet("seals", make, check, examples)


def test_a_name_in_a_seal_is_printable(folder):
    (folder / seal.NAME).write_text('{"a\\n\\ud83d": [1, 2]}')
    assert seal.damage(folder) == r"a\n\ud83d is missing"
