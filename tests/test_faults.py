"""Runs that are broken at random end as an undisturbed one does. `make test-faults` breaks 100."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_three_faults_change_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "tests/faults.py", "--faults=3", "--seed=613", f"--folder={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    logs = "".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("*/log.*")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "as if nothing had happened" in done.stdout
    for processes in (1, 2, 4):
        assert f" {processes} processes" in done.stdout, "another seed draws them all"
    assert done.stdout.splitlines()[-1].startswith("3 faults (")
