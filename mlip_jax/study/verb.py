"""The subcommand study."""

from __future__ import annotations

from rich.console import Console

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import check_name, check_writable, write_atomically
from mlip_jax.core.stopping import STOPPED
from mlip_jax.study import runs, sheet
from mlip_jax.study.table import read_table

FILE = "study.md"


def study(config: None, workdir: None, *, table: str, out: str, parallel: int = 1) -> int:
    """Trains the runs of a table that are not complete, and writes study.md.

    Args:
      config: none; the table names them.
      workdir: none; the runs have theirs in `out`.
      table: a file, see `table.read_table`.
      out: the study's folder.
      parallel: runs at a time.

    Returns:
      0; 75 when it was told to stop, 1 when a run failed.

    Raises:
      UserError: for a table that cannot be used, or a folder in a bucket.
    """
    del config, workdir
    if places.is_url(out):
        raise UserError(f"--out={out}: a study is kept in a folder of this machine")
    folder = places.local(out).absolute()
    check_name(folder, "--out")
    planned = read_table(table, folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder, "--out")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    stopped = runs.run_all(planned.runs, folder, parallel, console.print)
    log = runs.read_log(folder)
    text = sheet.markdown(planned, log)
    write_atomically(folder / FILE, text)
    console.print(text.partition("\n## All runs")[0])
    console.print(f"written: {folder / FILE}")
    if stopped:
        return STOPPED
    failed = [run for run in planned.runs if log[run.key].code != 0]
    for run in failed:
        console.print(f"failed: {run.key}: see {run.workdir.with_suffix('.log')}")
    return 1 if failed else 0
