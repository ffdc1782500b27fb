import hashlib
import subprocess

import pytest

from data import fetch
from unifluid_jax.errors import UserError

CONTENT = b"a wheel"
WHEEL = fetch.Wheel(
    package="some-data",
    version="1.2",
    filename="some_data-1.2-py3-none-any.whl",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def pip(monkeypatch):
    """A pip that writes `pip.content`, or fails with `pip.error`; counts its calls."""

    class Pip:
        content, error, calls = CONTENT, None, 0

        def run(self, command, **kwargs):
            self.calls += 1
            assert command[1:4] == ["-m", "pip", "download"]
            assert command[-1] == "some-data==1.2"
            assert "--no-deps" in command
            if self.error is not None:
                return subprocess.CompletedProcess(command, 1, "", self.error)
            (into,) = (word[len("--dest=") :] for word in command if word.startswith("--dest="))
            with open(f"{into}/{WHEEL.filename}", "wb") as f:
                f.write(self.content)
            return subprocess.CompletedProcess(command, 0, "", "")

    fake = Pip()
    monkeypatch.setattr(fetch.subprocess, "run", fake.run)
    return fake


def test_downloads_once(pip, tmp_path):
    path = fetch.fetch(WHEEL, tmp_path)
    assert path.read_bytes() == CONTENT
    assert fetch.fetch(WHEEL, tmp_path) == path
    assert pip.calls == 1


def test_a_wheel_put_there_by_hand_needs_no_network(pip, tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / WHEEL.filename).write_bytes(CONTENT)
    fetch.fetch(WHEEL, tmp_path)
    assert pip.calls == 0


def test_no_network(pip, tmp_path):
    pip.error = (
        "WARNING: Retrying after connection broken\n"
        "ERROR: Could not find a version that satisfies the requirement some-data==1.2\n"
        "ERROR: No matching distribution found for some-data==1.2\n"
    )
    with pytest.raises(UserError) as error:
        fetch.fetch(WHEEL, tmp_path)
    for part in ("some-data==1.2", "Could not find a version", WHEEL.filename, WHEEL.sha256):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_another_file_than_the_known_one_is_not_kept(pip, tmp_path):
    pip.content = b"another wheel"
    with pytest.raises(UserError) as error:
        fetch.fetch(WHEEL, tmp_path)
    assert WHEEL.sha256 in str(error.value)
    assert hashlib.sha256(b"another wheel").hexdigest() in str(error.value)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_damaged_cache_is_named(pip, tmp_path):
    path = fetch.fetch(WHEEL, tmp_path)
    path.write_bytes(CONTENT[:3])
    with pytest.raises(UserError, match=f"delete {path}"):
        fetch.fetch(WHEEL, tmp_path)
