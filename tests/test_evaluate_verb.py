"""The subcommand evaluate: suites, what is kept, runs side by side."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.registry import EVALUATIONS
from mlip_jax.evaluations import Results, compare, read_results, sets, suites, write_results
from mlip_jax.evaluations import verb as verb
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.prompts import find_class_names, find_templates
from mlip_jax.evaluations.sheets import html, markdown, sheet
from mlip_jax.evaluations.verb import _read_draft, file_results, results_name


def outcome(name, **figures):
    keys = dict.fromkeys
    return Outcome(name, figures, keys(figures, 0.1), keys(figures, 7), keys(figures, "p"), "Note.")


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def evaluate(workdir, *flags):
    return door.main(["mlip", "evaluate", f"--workdir={workdir}", *flags])


@pytest.fixture
def families(monkeypatch):
    """Every family scores any dataset with one metric; records the calls."""
    calls = []

    def make(name):
        def score(sets, spec):
            calls.append((name, spec))
            return outcome(spec.rpartition("/")[2], top1=0.5)

        return SimpleNamespace(
            score=score,
            check=lambda sets, spec: None,
            default_set=f"own-{name}",
            fits=lambda config: True,
        )

    for name in list(EVALUATIONS):
        monkeypatch.setitem(EVALUATIONS._registered, name, make(name))
    return calls


def test_a_suite_names_families_and_the_config_their_sets(workdir, families):
    assert evaluate(workdir, "--suite=all", "--config.evaluation.svm=voc:a,voc:b") == 0
    assert [name for name, _ in families] == [
        "retrieval",
        "zero_shot",
        "linear_probe",
        "few_shot",
        "svm",
        "svm",
        "grounding",
        "concepts",
        "guidance",
        "calibration",
        "corruptions",
        "compositional",
        "multilingual",
        "captioning",
    ]
    assert [spec for name, spec in families if name == "svm"] == ["voc:a", "voc:b"]
    assert ("grounding", "own-grounding") in families
    families.clear()
    assert evaluate(workdir, "--suite=zero_shot,concepts") == 0
    assert families == [("zero_shot", "validation"), ("concepts", "own-concepts")]


def test_a_relative_path_is_found_from_elsewhere(workdir, pairs, tmp_path, monkeypatch, capfd):
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["train"] = f"jsonl:{pairs.name}"
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "results.json").unlink()
    environment = json.loads((workdir / "environment.json").read_text())
    environment["folder"] = str(pairs.parent)
    (workdir / "environment.json").write_text(json.dumps(environment))
    monkeypatch.chdir(tmp_path)
    assert evaluate(workdir) == 0
    assert "retrieval/pairs/text_to_image_recall@1" in json.loads(
        (workdir / "results.json").read_text()
    )
    # What is nowhere is named by where it was.
    environment["folder"] = "/no/such"
    (workdir / "environment.json").write_text(json.dumps(environment))
    assert evaluate(workdir) != 0
    assert f"cannot read /no/such/{pairs.name}" in capfd.readouterr().err
    # A run that does not say it was trained elsewhere: where it is looked for.
    (workdir / "environment.json").unlink()
    assert evaluate(workdir) != 0
    assert f"the path is relative to {tmp_path}" in capfd.readouterr().err


def test_figures_of_other_families_join_those_of_the_run(workdir, families, capsys):
    before = json.loads((workdir / "results.json").read_text())
    assert evaluate(workdir, "--suite=linear_probe") == 0
    after = json.loads((workdir / "results.json").read_text())
    assert after["linear_probe/own-linear_probe/top1"] == 0.5
    assert after["protocol/linear_probe/own-linear_probe/top1"] == "p"
    assert {key: after[key] for key in before} == before and before["step"] == 8
    assert "linear-probe · own-linear_probe" in capsys.readouterr().out
    for suffix in (".md", ".html"):
        text = (workdir / "results.json").with_suffix(suffix).read_text()
        assert "linear-probe · own-linear_probe" in text and "50.00 %" in text and "R@1" in text


def test_results_of_another_checkpoint_are_not_mixed(tmp_path):
    old, new = Results(step=3), Results(step=4)
    old.add("retrieval", outcome("a", top1=0.1))
    new.add("svm", outcome("b", top1=0.2))
    file_results(tmp_path, old)
    file_results(tmp_path, new)
    assert set(read_results(tmp_path).figures) == {"svm/b/top1"}


DAMAGED_RESULTS = [
    ("[]", "expected a JSON object, found a list"),
    ("5", "expected a JSON object, found a number"),
    ("null", "expected a JSON object, found null"),
    ('{"step": "8"}', "step is a text, not a whole number"),
    ('{"figure": 0.5}', "'figure' is no FAMILY/DATASET/FIGURE"),
    ('{"a/b/c": "0.5"}', "'a/b/c' of figures is a text"),
    ('{"a/b/c": null}', "'a/b/c' of figures is null"),
    ('{"a/b/c": true}', "'a/b/c' of figures is a truth value"),
    ('{"examples/a/b/c": [5]}', "'a/b/c' of examples is a list"),
    ('{"note/a/b": 5}', "'a/b' of notes is a number"),
    (f'{{"a/b/c": {10**400}}}', "'a/b/c' of figures is more than a float can hold"),
    (f'{{"step": {10**400}}}', "step is more than a float can hold"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGED_RESULTS)
def test_damaged_results_are_one_line(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=f"results.json: {message}; mend it or remove it"):
        read_results(tmp_path)


def test_damaged_results_do_not_cost_those_that_were_just_found(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"a/b/c": [')
    found = Results(step=4)
    found.add("svm", outcome("b", top1=0.2))
    file_results(tmp_path, found)
    assert set(read_results(tmp_path).figures) == {"svm/b/top1"}
    assert (tmp_path / "damaged-results.json").read_text() == '{"a/b/c": ['
    assert capsys.readouterr().err.rstrip().endswith("set aside as damaged-results.json")


@pytest.mark.parametrize("text", ["[]", '{"figures": 5}', '{"step": 4, "done": [[]]}', '{"x": 1}'])
def test_a_damaged_draft_of_results_is_passed_over(tmp_path, text):
    (tmp_path / "draft").write_text(text)
    assert _read_draft(tmp_path / "draft", 4) == Results(step=4)


def test_an_evaluation_cut_short_goes_on_where_it_was(workdir, families, capsys):
    def killed(sets, spec):
        raise KeyboardInterrupt

    svm = EVALUATIONS["svm"]
    original_score, svm.score = svm.score, killed
    assert evaluate(workdir, "--suite=all") == 130
    assert "linear_probe/own-linear_probe/top1" not in read_results(workdir).figures
    svm.score = original_score
    families.clear()
    capsys.readouterr()
    assert evaluate(workdir, "--suite=all") == 0
    assert [name for name, _ in families] == [
        "svm",
        "grounding",
        "concepts",
        "guidance",
        "calibration",
        "corruptions",
        "compositional",
        "multilingual",
        "captioning",
    ]
    assert "going on after retrieval=validation, zero_shot=validation" in capsys.readouterr().out
    assert {"linear_probe/own-linear_probe/top1", "svm/own-svm/top1"} <= set(
        read_results(workdir).figures
    )
    assert not list(workdir.glob(".results*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["evaluate", "--suite=mlib"], "did you mean 'mlip'?"),
        (["evaluate", "--suite=svm,groundin"], "'groundin' is none of mlip, clip_lite, coca, all"),
        (["train", "--suite=all", "--config=x.py"], "--suite goes with the subcommand evaluate"),
        (["evaluate", "--compare=a,b", "--suite=all"], "takes no --suite"),
        (["evaluate", "--compare=nowhere*,b"], "there is no folder nowhere*"),
        (["evaluate", "--config.evaluation.svm=voc:nowhere"], "nowhere"),
        (["evaluate", "--config.evaluation.templates=a photo"], "where the class goes"),
        (["evaluate", "--config.evaluation.class_names=imagenet"], "did you mean 'imagenet1k'?"),
        (["evaluate", "--config.evaluation.probe.shots=(0,)"], "each at least 1"),
        (["evaluate", "--config.evaluation.probe.method=lbgfs"], "did you mean 'lbfgs'?"),
    ],
)
def test_mistakes_are_one_line(trained, flags, message, capfd):
    if "--compare" not in str(flags):
        flags = [*flags, f"--workdir={trained}"]
    assert door.main(["mlip", *flags]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def run(folder, seed, value, rate=0.0, **figures):
    config = schema.default()
    config.seed, config.name, config.model.image.merging.rate = seed, "clip", rate
    config.batch_size = 10
    folder.mkdir()
    (folder / "config.json").write_text(schema.to_json(config))
    results = Results(step=20)
    results.add("retrieval", outcome("a", **{"text_to_image_recall@1": value}))
    if figures:
        results.add("zero_shot", outcome("b", **figures))
    write_results(folder, results)


def table_lines(text):
    """Of a table on the terminal: the cells of each line, split where two blanks stand."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


def test_runs_side_by_side(tmp_path, capsys):
    for seed, value in enumerate((0.4, 0.5)):
        run(tmp_path / f"plain{seed}", seed, value)
    run(tmp_path / "merged", 0, 0.7, rate=0.3)
    lines = [{"step": s, "samples": 100 * s, "loss": 1, "images_per_second": 2} for s in (1, 2)]
    (tmp_path / "merged/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["mlip", "evaluate", f"--compare={tmp_path}/plain*,{tmp_path}/merged"]
    assert door.main(command) == 0
    output = capsys.readouterr().out
    rows = table_lines(output)
    assert ["Figure", "plain (2 seeds)", "merged", "Chance"] in rows
    assert ["samples", "200", "200"] in rows and ["parameters", "\u2014", "\u2014"] in rows
    assert ["time", "\u2014", "1.7 min"] in rows
    assert ["retrieval \u00b7 a"] in rows
    assert ["text to image R@1", "45.00 \u00b1 7.07 %", "70.00 %", "10.00 %"] in rows
    assert f"merged: {tmp_path}/merged (clip, model.image.merging.rate=0.3)" in output
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    labels = [column["label"] for column in comparison["columns"]]
    assert labels == ["plain (2 seeds)", "merged"]
    (figure,) = comparison["figures"].values()
    assert figure[0]["values"] == [0.4, 0.5] and figure[1]["deviation"] is None
    assert (
        "| retrieval \u00b7 a | text to image R@1 | 45.00 \u00b1 7.07 % | 70.00 % | 10.00 % |"
        in (tmp_path / "comparison.md").read_text()
    )
    assert "<td" in (tmp_path / "comparison.html").read_text()


def test_a_run_of_the_same_seed_is_no_second_seed(tmp_path, capsys):
    for name in ("one", "again"):
        run(tmp_path / name, 0, 0.4)
    assert door.main(["mlip", "evaluate", f"--compare={tmp_path}/one,{tmp_path}/again"]) == 0
    output = capsys.readouterr().out
    assert ["Figure", "one", "again", "Chance"] in table_lines(output)
    assert "standard deviation" not in output


def test_what_a_run_lacks_is_a_dash(tmp_path, capsys):
    run(tmp_path / "one", 0, 0.4, top1=0.2)
    run(tmp_path / "two", 0, 0.5, rate=0.3)
    run(tmp_path / "none", 0, 0.7, rate=0.5)
    (tmp_path / "none" / "results.json").unlink()
    command = f"--compare=first={tmp_path}/one,{tmp_path}/two,{tmp_path}/none"
    assert door.main(["mlip", "evaluate", command]) == 0
    output = capsys.readouterr().out
    rows = table_lines(output)
    assert ["Figure", "first", "two", "none", "Chance"] in rows
    assert ["text to image R@1", "40.00 %", "50.00 %", "\u2014", "10.00 %"] in rows
    assert ["top-1", "20.00 %", "\u2014", "\u2014", "10.00 %"] in rows
    assert f"none has no results: run evaluate --workdir={tmp_path}/none" in output


def test_no_name_is_dropped_at_80_columns(tmp_path, capsys):
    names = [f"a_run_with_a_rather_long_name_number_{index}" for index in range(9)]
    for index, name in enumerate(names):
        run(tmp_path / name, 0, 0.1, rate=index / 10)
    assert door.main(["mlip", "evaluate", f"--compare={tmp_path}/*"]) == 0
    drawn = capsys.readouterr().out.partition(f"{names[0]}:")[0].splitlines()
    assert max(map(len, drawn)) <= 80
    assert sum(line.count("Chance") for line in drawn) > 1  # several tables, one below the other
    heads = "".join(line for line in drawn if "\u2500" not in line and "%" not in line)
    for index in range(9):
        assert f"number_{index}" in re.sub(r"\s", "", heads) or f"_{index}" in heads
    assert "\u2026" not in "".join(drawn)


def test_results_under_other_prompts_and_rates_take_part(tmp_path, capsys):
    run(tmp_path / "one", 0, 0.4)
    results = Results(step=20)
    results.add("retrieval", outcome("a", **{"text_to_image_recall@1": 0.3}))
    for change in ("model.image.merging.rate=0.5", "evaluation.templates=clip_80"):
        write_results(tmp_path / "one", results, results_name([change]))
    assert door.main(["mlip", "evaluate", f"--compare={tmp_path}/one"]) == 0
    rows = table_lines(capsys.readouterr().out)
    assert ["text to image R@1", "40.00 %", "30.00 %", "30.00 %", "10.00 %"] in rows
    labels = json.loads((tmp_path / "comparison.json").read_text())["columns"]
    assert [column["label"] for column in labels] == [
        "one",
        "one, templates=clip_80",
        "one, rate=0.5",
    ]


def test_different_templates_never_share_a_file():
    templates = ["a photo of a {}", "a photo of a {}.", "a photo of a [{}]", "a photo of a_{}"]
    names = [results_name([f"evaluation.templates={each}"]) for each in templates]
    assert len(set(names)) == len(templates)
    assert results_name(["evaluation.templates=clip_80"]) == (
        "results,evaluation.templates=clip_80.json"
    )


def test_several_templates_at_once(workdir, families, capsys, monkeypatch):
    loaded = []
    load = verb.load
    monkeypatch.setattr(verb, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    wanted = "--config.evaluation.templates=clip_7|clip_80|a drawing of {}"
    assert evaluate(workdir, "--suite=zero_shot", wanted) == 0
    files = sorted(path.name for path in workdir.glob("results,*.json"))
    assert len(files) == 3 and files[1:] == [
        "results,evaluation.templates=clip_7.json",
        "results,evaluation.templates=clip_80.json",
    ]
    assert len(loaded) == 1
    output = capsys.readouterr().out
    assert "templates: clip_80" in output and f"--compare={workdir}" in output
    assert evaluate(workdir, "--rates=0.25", wanted) == 2
    assert "--rates goes with one name" in capsys.readouterr().err


def test_other_prompts_embed_no_image_again(monkeypatch):
    embedded = []

    def embed_source(*arguments, **options):
        embedded.append(arguments)
        return SimpleNamespace(embeddings="embeddings", features=None)

    monkeypatch.setattr(sets, "embed_source", embed_source)
    config = schema.default()
    opened = sets.Sets(SimpleNamespace(), config, SimpleNamespace(name="photos"))
    for templates in ("a {}", "the {}"):
        other = schema.default()
        other.evaluation.templates = templates
        under = opened.under(other)
        assert under.config.evaluation.templates == templates
        assert under.evaluation("validation").embeddings == "embeddings"
    assert len(embedded) == 1 and opened.config is config


def test_families_without_labels_are_named(monkeypatch):
    model = SimpleNamespace()
    config = schema.default()
    config.evaluation.linear_probe = ("validation",)
    for name in EVALUATIONS:
        kept = EVALUATIONS[name]
        family = dataclasses.replace(kept, score=lambda sets, spec: None)
        monkeypatch.setitem(EVALUATIONS._registered, name, family)
    validation = SimpleNamespace(name="photos", __len__=lambda: 3)
    results = suites.evaluate(model, config, validation=validation)
    assert results.left_out["zero_shot"] == (
        "photos lacks labels; add --config.evaluation.zero_shot=folder:DIR"
    )
    assert "photos lacks labels and a training split" in results.left_out["linear_probe"]
    assert (
        "photos lacks captions; add --config.evaluation.retrieval=jsonl:FILE"
        in (results.left_out["retrieval"])
    )
    assert any("zero-shot is left out: photos lacks" in note for note in sheet(results, "").notes)


def test_what_cannot_be_compared_is_said(tmp_path):
    run(tmp_path / "one", 0, 0.4)
    run(tmp_path / "other", 1, 0.4, rate=0.3)
    results = read_results(tmp_path / "other")
    results.examples["retrieval/a/text_to_image_recall@1"] = 8
    write_results(tmp_path / "other", results)
    runs = [run for name in ("one", "other") for run in compare.read_runs(tmp_path / name, name)]
    notes = compare.compare(compare.group(runs)).notes
    assert "Not to be compared" in notes[-1] and "text to image R@1" in notes[-1]


def test_tables_show_what_a_set_is_called(tmp_path):
    results = Results()
    results.add("zero_shot", outcome("a|b<c>", top1=0.25, text_to_image_median_rank=3.0))
    results_sheet = sheet(results, "Results")
    assert "| zero-shot · a\\|b\\<c\\> | top-1 | 25.00 % | 10.00 % | 7 | p |" in markdown(
        results_sheet
    )
    assert "a|b&lt;c&gt;" in html(results_sheet) and "Note." in html(results_sheet)


def test_names_are_no_markup(tmp_path):
    found = Results(step=1)
    found.add("svm", outcome("<img src=x onerror=alert(1)>|`[a](b)", top1=0.2))
    file_results(tmp_path, found)
    for suffix in (".md", ".html"):
        text = (tmp_path / "results.json").with_suffix(suffix).read_text()
        assert "onerror" in text and "<img" not in text.replace(r"\<img", "")
    assert r"\<img src=x onerror=alert(1)\>\|\`\[a\](b)" in (tmp_path / "results.md").read_text()


def test_prompts_and_class_names_are_data(tmp_path):
    assert len(find_templates("cifar10")) == 18
    assert find_templates("auto", "cifar10") == find_templates("cifar10")
    assert find_templates("auto", "caltech101-test") == find_templates("caltech101")
    assert find_templates("auto", "my birds") == ("a photo of a {}.",)
    assert find_templates("imagenet1k") == find_templates("clip_80")
    folder_names = [f"n{number}" for number in range(1000)]
    assert find_class_names("imagenet1k", folder_names, "imagenet")[0] == "tench"
    with pytest.raises(UserError, match="has 1000 names, the dataset 'pets' has 2 classes"):
        find_class_names("imagenet1k", ["a", "b"], "pets")
    file = tmp_path / "names.json"
    file.write_text('{"a": "ant", "b": "bee"}')
    assert find_class_names(str(file), ["b", "a"], "insects") == ("bee", "ant")
    with pytest.raises(UserError, match="the class 'c' of the dataset 'insects' is missing"):
        find_class_names(str(file), ["b", "c"], "insects")
    for content, message in (("[1]", "expected a list of class names"), ("{", "not JSON")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            find_class_names(str(file), ["a"], "insects")


def test_the_step_of_a_kept_evaluation_counts(tmp_path):
    draft = tmp_path / ".results.json.partial"
    results = Results(step=3, done=["svm=a"])
    verb._keep(draft, results)
    assert verb._read_draft(draft, 3) == results
    assert verb._read_draft(draft, 4) == Results(step=4)
    draft.write_text("{")
    assert verb._read_draft(draft, 3) == Results(step=3)
