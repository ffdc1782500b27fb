"""The notebooks: their form here, and by `make test-slow` that they run from top to bottom."""

import os
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest

from tests import worlds
from unifluid_jax import checkpoint, pretrained
from unifluid_jax import config as configs
from unifluid_jax.parts import assemble

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def test_all_of_them_are_looked_at():
    assert NAMES == ["data", "finetune", "inference"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_sound_installs_first_and_holds_no_results(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    first, title, *_ = book.cells
    assert first.cell_type == "code" and '"pip", "install"' in first.source
    assert first.source == nbformat.read(NOTEBOOKS[0], as_version=4).cells[0].source
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped model; without it, an untrained one of the quickstart's form."""
    if "unifluid-small" in pretrained.names():
        return "unifluid-small"
    folder = tmp_path_factory.mktemp("model")
    config = configs.load("experiments/quickstart.py:debug")
    params = jax.jit(assemble(config).model.init)(jax.random.key(0))
    with checkpoint.Checkpointer(folder / "run", keep=1) as checkpoints:
        checkpoints.save(0, {"params": params}, {}, {"config": configs.to_json(config)})
    worlds.export_checkpoint(folder / "run", folder / "untrained", dtype=np.dtype(np.float16))
    return str(folder / "untrained")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_from_top_to_bottom(path, model, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("UNIFLUID_MODEL", model)
    monkeypatch.setenv("UNIFLUID_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("UNIFLUID_STEPS", "4")
    # The kernel is a process of its own: one device, as most notebooks have.
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    book = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=1800, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
