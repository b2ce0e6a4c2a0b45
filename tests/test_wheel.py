"""The wheel, installed where there is no checkout: it brings its configs and does the main job."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    # A copy of what git knows or would take: a build leaves its own folders in the tree.
    listed = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z")
    copy = folder / "tree"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    for form in ("wheel", "sdist"):
        build = f"import sys; from setuptools import build_meta as b; b.build_{form}(sys.argv[1])"
        run(sys.executable, "-c", build, folder, cwd=copy)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel, and what it needs from this one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where).strip())
    # A path in a .pth file is searched, but its own .pth files, such as an editable install's, are
    # not read.
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_and_sdist_hold_the_configs(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"mlip_jax/configs/{name}" for name in CONFIGS} <= set(names)
    assert "mlip_jax/py.typed" in names
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"configs/{name}" for name in CONFIGS} <= inside


def test_the_main_job_from_an_empty_folder(installed, pairs, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"

    def mlip(*arguments):
        return run(installed, "-m", "mlip_jax.main", *arguments, cwd=tmp_path, env=environment)

    where = run(
        installed, "-c", "import mlip_jax; print(mlip_jax.__file__)", cwd=tmp_path, env=environment
    )
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    output = mlip(
        f"--config=mlip:data=jsonl:{pairs}",
        "--workdir=run",
        "--config.batch_size=16",
        "--config.samples=64",
        "--config.data.workers=0",
        "--config.evaluation.every_samples=0",
    )
    assert "report:  run/report.html" in output
    figures = json.loads((tmp_path / "run/results.json").read_text())
    mlip("evaluate", "--workdir=run")
    assert json.loads((tmp_path / "run/results.json").read_text()) == figures
    mlip("report", "--workdir=run")
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
