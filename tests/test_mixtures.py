"""Several datasets by weights: whose turn it is, at every step and after every resume."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlip_jax import main as door
from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.batches.order import order
from mlip_jax.data.batches.training import train_batches
from mlip_jax.data.sets import mixtures
from mlip_jax.data.sets.mixtures import samples_by_set
from mlip_jax.data.sets.opening import open_evaluation, open_source, open_validation, own_set
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.training.metrics import describe


def make_set(folder: Path, name: str, number: int, bad=(), **row) -> str:
    rng = np.random.default_rng(len(name))
    rows = []
    for index in range(number):
        file = folder / f"{name}{index}.png"
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file)
        if index in bad:
            file.write_bytes(b"no image")
        rows.append({"file": file.name, "caption": f"{name} {index}", **row})
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{folder / name}.jsonl"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [make_set(folder, "a", 7), make_set(folder, "bb", 3, bad=(2,)), make_set(folder, "c", 7)]


def mix(*parts):
    return mixtures.PREFIX + "+".join(f"{spec}*{weight}" for spec, weight in parts)


def drawn(spec, number, seed=0, start=0):
    source = open_source(spec, "train")
    positions = order(source, seed)
    return [source.name_of(positions[start + i]).rpartition("/")[2] for i in range(number)]


def set_of(name):
    return name.rstrip("0123456789.png")


def test_each_set_has_its_share_of_every_stretch(sets):
    names = drawn(mix((sets[0], 5), (sets[1], 3), (sets[2], 2)), 400)
    for start in range(0, 400, 10):
        assert Counter(map(set_of, names[start : start + 10])) == {"a": 5, "bb": 3, "c": 2}
    assert Counter(map(set_of, names)) == {"a": 200, "bb": 120, "c": 80}


def test_each_set_is_seen_once_in_each_of_its_epochs_and_shuffled_anew(sets):
    names = drawn(mix((sets[0], 0.5), (sets[2], 0.5)), 28)
    names_of_a = [name for name in names if set_of(name) == "a"]
    epochs = [names_of_a[:7], names_of_a[7:]]
    assert all(len(set(epoch)) == 7 for epoch in epochs) and epochs[0] != epochs[1]
    others = [name.replace("c", "a") for name in names if set_of(name) == "c"]
    assert names_of_a != others  # though both have 7 images


def test_the_order_is_a_function_of_seed_and_position(sets):
    spec = mix((sets[0], 3), (sets[1], 1))
    all_names = drawn(spec, 60)
    assert drawn(spec, 20, start=40) == all_names[40:]
    assert drawn(spec, 60, seed=1) != all_names


def test_one_set_is_that_set(sets):
    assert drawn(mix((sets[0], 3)), 30) == drawn(sets[0], 30)


def test_counts_are_those_of_the_stream(sets):
    source = open_source(mix((sets[0], "0.7"), (sets[1], "0.2"), (sets[0], "0.1")), "train")
    positions = order(source, 0)
    counts = Counter()
    for position in range(57):
        expected = {f"samples/{name}": counts[i] for i, name in enumerate(("a", "bb", "a#2"))}
        assert samples_by_set(source, position) == expected
        index = positions[position]
        counts[next(i for i, indices in enumerate(source.sets()) if index in indices)] += 1
    assert samples_by_set(open_source(sets[0], "train"), 10) == {}
    assert samples_by_set(source, 10**15)["samples/bb"] == 2 * 10**14


def test_weights_without_a_common_measure_are_rounded(sets):
    source = open_source(
        mix((sets[0], 1), (sets[1], "0.00000001"), (sets[2], "0.3333333")), "train"
    )
    counts = source.samples(10_000_000).values()
    assert [round(count / 10_000_000, 3) for count in counts] == [0.75, 0.0, 0.25]
    assert all(counts)


def batches(config, source, count, **options):
    stream = train_batches(config, source, load_tokenizer("clip"), **options)
    copies = [{k: np.array(v) for k, v in b.items()} for b in itertools.islice(stream, count)]
    stream.close()
    return copies


def test_batches_resume_at_a_step_and_split_by_rows(sets):
    config = config_lib.default()
    config.batch_size, config.data.workers = 6, 0
    config.model.image.image_size, config.model.text.context_length = 16, 12
    source = open_source(mix((sets[0], 2), (sets[1], 1)), "train")
    all_batches = batches(config, source, 4, start_step=0)
    half = batches(config, source, 4, start_step=0, rows=[1, 3, 5])
    config.data.workers = 2
    later = batches(config, source, 2, start_step=2)
    for key in all_batches[0]:
        for one, other in zip(all_batches[2:], later, strict=True):
            np.testing.assert_array_equal(one[key], other[key])
        for one, other in zip(all_batches, half, strict=True):
            np.testing.assert_array_equal(one[key][[1, 3, 5]], other[key])
    skipped = {int(i) for batch in all_batches for i in batch["skipped"] if i >= 0}
    assert skipped == {9}  # bb2.png, by its index in both sets


def test_another_image_of_the_same_set_stands_for_one_that_cannot_be_read(sets):
    config = config_lib.default()
    config.batch_size, config.data.workers = 12, 0
    source = open_source(mix((sets[1], 1), (sets[0], 1)), "train")
    batch = batches(config, source, 1, start_step=0)[0]
    tokenizer = load_tokenizer("clip")
    encoded_captions = {tuple(row) for row in tokenizer.encode([f"bb {i}" for i in range(3)], 77)}
    rows = batch["token_ids"][batch["skipped"] >= 0]
    assert len(rows) and all(tuple(row) in encoded_captions for row in rows)


def test_what_a_mixture_says_of_itself(sets, tmp_path):
    source = open_source(mix((sets[0], 1), (sets[1], 3)), "train")
    assert (source.name, len(source), source.class_names) == ("a+bb", 10, ())
    assert source.notes == (
        "a: 7 images, 25.00% of the samples",
        "bb: 3 images, 75.00% of the samples",
    )
    assert len(list(source.captions())) == 10 and source[9].captions == ("bb 2",)
    labelled = make_set(tmp_path, "x", 2, label="cat"), make_set(tmp_path, "y", 2, label="dog")
    other = open_source(mix((labelled[0], 1), (labelled[1], 1)), "train")
    assert [other[i].label for i in range(4)] == [-1] * 4
    same = open_source(mix((labelled[0], 1), (labelled[0], 1)), "train")
    assert same.class_names == ("cat",) and same[3].label == 0 and same.name == "x+x#2"


def test_validation_is_that_of_the_first_set_that_has_one(sets, pairs):
    data = config_lib.default().data
    data.train = mix((sets[0], 1), (f"jsonl:{pairs}", 1))
    assert open_validation(data).name == "pairs" and own_set(data) == f"jsonl:{pairs}"
    data.train = mix((sets[0], 1), (f"jsonl:{pairs}#validation", 1))
    assert open_validation(data) is None
    with pytest.raises(UserError, match="is for training: name one dataset"):
        open_evaluation(data.train)


@pytest.mark.parametrize(
    "text",
    ["mix:", "mix:emoji", "mix:emoji*0", "mix:emoji*a", "mix:emoji*1.2.3", "mix:emoji*1+coco"],
)
def test_malformed_mixtures(text):
    with pytest.raises(UserError, match=r"expected mix:SET\*WEIGHT\+SET\*WEIGHT"):
        open_source(f"mix:{text}", "train")


def test_a_mistake_in_a_part_names_it():
    with pytest.raises(UserError, match="unknown dataset 'emojy'.*did you mean 'emoji'"):
        open_source("mix:emoji*1+emojy*1", "train")


def test_the_log_line_has_the_counts():
    line = describe({"loss": 1.0, "samples/a": 1234.0, "samples/b": 5.0})
    assert line == "loss 1.000  of a 1,234, b 5"


def test_a_run_on_a_mixture_writes_the_counts(tmp_path, tiny, pairs, monkeypatch, on_one_device):
    on_one_device(monkeypatch)
    spec = mix((f"jsonl:{pairs}", 3), (f"jsonl:{pairs}#validation", 1))
    workdir = tmp_path / "run"
    command = [f"--config={tiny}", f"--workdir={workdir}", f"--config.data.train={spec}"]
    assert door.main(["mlip", *command]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    counts = [(x["samples/pairs"], x["samples/pairs#2"]) for x in lines if "loss" in x]
    assert counts == [(12, 4), (24, 8), (36, 12), (48, 16)]


@pytest.mark.parametrize("position", [2**31 - 1, 2**31, 2**33, 34_000_000_000])
def test_turns_go_on_past_32_bits(sets, position):
    mixture = open_source(f"mix:{sets[0]}*0.75+{sets[2]}*0.25", "train")
    counts = mixture.samples(position)
    assert sum(counts.values()) == position
    assert abs(list(counts.values())[0] - 0.75 * position) < 1
    number, before = mixture.turn(position)
    assert before == list(counts.values())[number]
    assert 0 <= order(mixture, seed=0)[position] < len(mixture)
