"""The house rules: what imports what, what the README promises, what a package holds."""

import fnmatch
import importlib.metadata
import json
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
import yaml
from devices import understood

import mlip_jax
from mlip_jax.core.versions import TESTED_JAX

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile"))


def bash(*command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_dependencies_point_down():
    done = bash(sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()")
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_loading_owns_no_accelerator():
    # Grain imports JAX for itself; what matters is that no device is taken.
    code = (
        "import mlip_jax.data.batches.training, jax._src.xla_bridge as bridge\n"
        "assert not bridge.backends_are_initialized()"
    )
    done = bash(sys.executable, "-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr


def test_only_flags_that_xla_knows_are_set():
    good = "--xla_backend_optimization_level=0"
    assert understood("--xla_no_such_flag=1", good) == [good]


def test_the_oldest_jax_that_installs_is_the_oldest_that_is_tested(monkeypatch):
    setup_options = packaging(monkeypatch)
    required = next(line for line in setup_options["install_requires"] if line.startswith("jax>"))
    assert required == f"jax>={TESTED_JAX[0]}"


def test_readme_and_ci_give_the_same_commands():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    assert '-e ".[test]"' in readme and '-e ".[test]"' in ci
    assert "\npytest tests/\n" in readme and " pytest tests/\n" in ci
    phases = re.findall(r'^phase "([^"]+)"', ci, re.MULTILINE)
    assert phases[:2] == ["set up", "tests"], "nothing else is installed before the tests"
    commands = [step.get("run", "") for step in steps(ROOT / ".github/workflows/tests.yml")]
    assert {'pip install -e ".[test]"', "pytest tests/"} <= set(commands)


def packaging(monkeypatch, root=ROOT):
    """What setup.py tells setuptools."""
    setuptools = pytest.importorskip("setuptools")
    setup_options = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: setup_options.update(options))
    monkeypatch.chdir(root)
    runpy.run_path("setup.py")
    return setup_options


def steps(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_and_end(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 60
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/any@v1"))


def test_every_promised_python_is_tested(monkeypatch):
    setup_options = packaging(monkeypatch)
    promised = [
        match[1]
        for line in setup_options["classifiers"]
        if (match := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
    ]
    (job,) = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == promised
    assert setup_options["python_requires"] == f">={promised[0]}"


def test_hooks_before_a_commit_use_the_tools_of_the_extra_test(monkeypatch):
    scripts = set()
    for requirement in packaging(monkeypatch)["extras_require"]["test"]:
        files = importlib.metadata.files(re.match(r"[\w-]+", requirement)[0])
        scripts |= {path.name for path in files if path.parent.name == "bin"}
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = {hook["entry"].split()[0] for hook in local["hooks"] if hook["language"] == "system"}
    assert {"ruff", "lint-imports", "mypy", "shellcheck"} == tools <= scripts


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_are_forms(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    assert all(field["type"] == "textarea" for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)


def test_the_newest_release_is_the_version():
    releases = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert releases[0] == (citation["version"], str(citation["date-released"]))
    assert releases[0][0] == mlip_jax.__version__


def test_the_documentation_site_names_no_other_host():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["theme"]["font"] is False
    assert not {"site_url", "repo_url", "extra_javascript"} & site.keys()
    assert "http" not in json.dumps(site)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_hold_what_they_start(dockerfile, monkeypatch, tmp_path):
    text = dockerfile.read_text()
    # What .dockerignore lets through is enough to install.
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for name in allowed:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    setup_options = packaging(monkeypatch, tmp_path)
    assert set(setup_options["packages"]) == set(packaging(monkeypatch)["packages"])
    (extras,) = re.findall(r'--editable "\.\[([a-z0-9,]+)\]"$', text, re.MULTILINE)
    assert set(extras.split(",")) <= setup_options["extras_require"].keys()
    (command,) = json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1])
    points = dict(point.split(" = ") for point in setup_options["entry_points"]["console_scripts"])
    assert callable(pkgutil.resolve_name(points[command]))
    assert re.search(r"^USER (?!0|root)", text, re.MULTILINE)


@pytest.mark.parametrize("devices", ["tpu", "gpu"])
def test_pods_may_write_to_the_volumes_as_the_user_of_the_image(devices):
    manifest = (ROOT / f"launch/jobset_{devices}.yaml").read_text()
    dockerfile = (ROOT / f"docker/{devices}.Dockerfile").read_text()
    user = re.search(r"^USER \d+:(\d+)$", dockerfile, re.MULTILINE)
    assert re.search(r"fsGroup: (\d+)$", manifest, re.MULTILINE)[1] == user[1]


def test_every_data_file_is_packaged(monkeypatch):
    setup_options = packaging(monkeypatch)
    patterns = setup_options["package_data"]
    for path in (ROOT / "mlip_jax").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(fnmatch.fnmatch(path.name, p) for p in patterns.get(package, ())), path
    for path in (ROOT / "mlip_jax").rglob("*.py"):
        assert ".".join(path.parent.relative_to(ROOT).parts) in setup_options["packages"], path
    for package, package_patterns in patterns.items():
        for pattern in package_patterns:
            assert list(ROOT.joinpath(*package.split(".")).glob(pattern)), (package, pattern)


def test_launch_tells_what_it_would_do(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "new"), "EXTRAS": "gpu"}
    command = ["launch/local.sh", "--dry-run", "--config=configs/mlip.py", "--config.name=a b"]
    done = bash(*command, env=environment)
    assert done.returncode == 0, done.stderr
    make, install, job = done.stdout.splitlines()
    assert make.startswith("python3 -m venv")
    assert r"--editable .\[gpu\]" in install
    assert r"-m mlip_jax.main --config=configs/mlip.py --config.name=a\ b" in job
    assert not (tmp_path / "new").exists()


def test_launch_starts_again_after_75_and_only_then(tmp_path):
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    # Stops early twice, then ends with an error of its own.
    python.write_text(
        f"#!/bin/bash\necho run >> {tmp_path}/runs\n(($(wc -l < {tmp_path}/runs) > 2)) || exit 75\n"
        "exit 3\n"
    )
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv")}
    done = bash("launch/local.sh", "--config=x", env=environment)
    assert done.returncode == 3
    assert (tmp_path / "runs").read_text().count("run") == 3


def test_shapes_are_checked_in_tests():
    from mlip_jax import objectives

    with pytest.raises(jaxtyping.TypeCheckError):
        objectives.softmax_contrastive(jnp.ones((4, 8)), jnp.ones((4, 7)), jnp.float32(1.0))
