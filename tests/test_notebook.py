"""The notebook is well-formed, and its cells run from top to bottom."""

import json
import shutil
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "notebooks/load_to_search.ipynb"
RUN = '"../runs/mlip"'


def test_the_notebook_runs(trained, tmp_path, capsys):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    assert RUN in code[0]
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    names = {}
    for source in code:
        exec(source.replace(RUN, repr(str(run))), names)
    out = capsys.readouterr().out
    assert "step 8, images of 16 pixels" in out
    assert "8 images (8 new)" in out and "Images for 'red heart'" in out
    assert len(out.rstrip().splitlines()[-5:]) == 5 and names["scores"].shape == (3, 8)
