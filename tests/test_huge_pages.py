"""Huge pages: when the program starts itself again for them."""

import os
import subprocess
import sys

import pytest

from mlip_jax.devices import huge_pages


@pytest.fixture
def started(monkeypatch):
    """A machine where they help; what would be executed."""
    executed = []
    monkeypatch.setattr(os, "execv", lambda program, words: executed.append((program, words)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36")
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return executed


def mode(monkeypatch, tmp_path, text):
    path = tmp_path / "enabled"
    path.write_text(text)
    monkeypatch.setattr(huge_pages, "_MODE", path)


ON_REQUEST = "always [madvise] never\n"


def test_the_same_words_are_executed_again_but_once(started, monkeypatch, tmp_path):
    mode(monkeypatch, tmp_path, ON_REQUEST)
    huge_pages.restart_with_huge_pages()
    assert started == [(sys.executable, sys.orig_argv)] and huge_pages.asked_for()
    huge_pages.restart_with_huge_pages()
    assert len(started) == 1


def test_other_settings_of_the_c_library_stay(started, monkeypatch, tmp_path):
    mode(monkeypatch, tmp_path, ON_REQUEST)
    monkeypatch.setenv(huge_pages.VARIABLE, "glibc.malloc.arena_max=2")
    huge_pages.restart_with_huge_pages()
    assert os.environ[huge_pages.VARIABLE] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("text", "library", "tunables"),
    [
        ("[always] madvise never", "glibc 2.36", ""),
        ("always madvise [never]", "glibc 2.36", ""),
        (ON_REQUEST, "glibc 2.34", ""),
        (ON_REQUEST, "musl 1.2.5", ""),
        (ON_REQUEST, "glibc 2.36", "glibc.malloc.hugetlb=0"),
    ],
)
def test_nothing_starts_where_it_would_not_help(
    started, monkeypatch, tmp_path, text, library, tunables
):
    mode(monkeypatch, tmp_path, text)
    monkeypatch.setattr(os, "confstr", lambda _: library)
    monkeypatch.setenv(huge_pages.VARIABLE, tunables)
    huge_pages.restart_with_huge_pages()
    assert not started


def test_a_machine_with_an_accelerator_is_left_alone(started, monkeypatch, tmp_path):
    mode(monkeypatch, tmp_path, ON_REQUEST)
    monkeypatch.setattr(huge_pages, "_ACCELERATORS", (str(tmp_path / "*"),))
    monkeypatch.delenv("JAX_PLATFORMS")
    huge_pages.restart_with_huge_pages()
    assert not started


@pytest.mark.parametrize("program", ["mlip_jax", "mlip_jax.main"])
def test_the_program_ends_as_without(program):
    environment = {key: value for key, value in os.environ.items() if key != huge_pages.VARIABLE}
    words = [sys.executable, "-m", program, "evaluate", "--workdir=no/such"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
