"""A finished run in a bucket, looked at by every subcommand."""

import numpy as np
import pytest

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core import places
from mlip_jax.core.buckets import Mirror


@pytest.fixture
def url(bucket, trained):
    """The finished run, copied to a bucket."""
    Mirror(bucket, trained).publish(trained)
    return bucket


def mlip(*arguments):
    return door.main(["mlip", *map(str, arguments)])


def test_every_subcommand_takes_it(url, pairs, trained, capfd):
    exported = f"{url}-exported"
    assert mlip("export", f"--workdir={url}", f"--out={exported}") == 0
    assert f"mlip model: {exported} (" in capfd.readouterr().out
    places.release()
    texts = ["picture 1", "picture 2"]
    own, of_export = (mlip_jax.load(place).encode_text(texts) for place in (trained, exported))
    assert np.array_equal(own, of_export)
    assert mlip("export", f"--workdir={url}", f"--out={exported}") == 2
    assert f"--out={exported} exists already" in capfd.readouterr().err

    assert mlip("evaluate", f"--compare={trained},{url}", f"--workdir={url}-compared") == 0
    assert f"comparison: {url}-compared/comparison.json" in capfd.readouterr().out

    places.release()
    assert mlip("report", f"--workdir={url}") == 0
    assert f"report: {url}/report.html" in capfd.readouterr().out
    assert "report.html" in places.names(places.local(url))

    search = ["search", f"--workdir={url}"]
    assert mlip(*search, f"--images={pairs.parent}") == 0
    assert f"index: {url}/search/{pairs.parent.name}: 40 images" in capfd.readouterr().out
    places.release()
    assert mlip(*search, "--text=picture 1", "--top=3") == 0
    assert capfd.readouterr().out.count(".png") == 3
