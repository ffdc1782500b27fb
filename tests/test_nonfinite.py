"""Steps that are not finite are counted, kept, and put together again."""

import jax
import numpy as np
import pytest

from unifluid_jax import nonfinite
from unifluid_jax.errors import UserError
from unifluid_jax.nonfinite import Guard


def batch(rows):
    return {"x": np.asarray(rows, np.float32)[:, None] * 10, "segment": np.asarray(rows)}


def test_so_many_in_a_row_are_borne(tmp_path):
    guard = Guard(tmp_path, 2, [0, 1])
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        guard.check(step, skipped, batch([0, 1]))
    message = (
        r"step 6 are not finite, the 3. in a row \(config.train.max_skipped=2\).*"
        rf"unifluid train --config={tmp_path}/config.json --workdir={tmp_path} --replay=6$"
    )
    with pytest.raises(UserError, match=message):
        guard.check(6, True, batch([0, 1]))
    kept = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert kept == [f"000000{step}_0.npz" for step in (1, 2, 4, 5, 6)]


def test_none_is_borne_by_default_and_the_disk_is_not_filled(tmp_path):
    with pytest.raises(UserError, match="the 1. in a row"):
        Guard(tmp_path / "none", 0, [0]).check(1, True, batch([0]))
    guard = Guard(tmp_path, 100, [0])
    for step in range(1, 31):
        guard.check(step, True, batch([0]))
    assert len(list((tmp_path / "nonfinite").iterdir())) == 10


def test_the_batch_of_all_processes_is_put_together(tmp_path, monkeypatch):
    for process, rows in enumerate([[0, 1, 4, 5], [2, 3, 6, 7], [2, 3, 6, 7]]):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        Guard(tmp_path, 9, rows).check(3, True, batch(rows))
    for name, rows in nonfinite.load(tmp_path, 3).items():
        np.testing.assert_array_equal(rows, batch(range(8))[name])
    (tmp_path / "nonfinite" / "0000003_0.npz").unlink()
    with pytest.raises(UserError, match="rows of step 3 are missing"):
        nonfinite.load(tmp_path, 3)
    with pytest.raises(UserError, match=r"no batch of step 4 in .*: it has \[3\]"):
        nonfinite.load(tmp_path, 4)
    with pytest.raises(UserError, match="it has none"):
        nonfinite.load(tmp_path / "nowhere", 4)
