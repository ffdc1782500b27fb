"""Fetches the SentencePiece files of Gemma 2 (of Gemma 1 and PaliGemma too) and of Gemma 3.

    python -m data.tokenizers data_cache

Writes data_cache/tokenizers/gemma2.model and gemma3.model: for tests, and for models that speak
Gemma's vocabulary without starting from its weights. With the weights comes the same file, as
tokenizer.model. Gemma's terms of use (https://ai.google.dev/gemma/terms) hold for both.
"""

import hashlib
import os
import pathlib
import zipfile

from data.fetch import Wheel, fetch
from unifluid_jax import cli
from unifluid_jax.errors import UserError

# The Apache-2.0 package that carries them.
MAXTEXT = Wheel(
    package="maxtext",
    version="0.2.5",
    filename="maxtext-0.2.5-py3-none-any.whl",
    sha256="2fe8e4ffc3a06bd06f94daeaaf5fe3ecee748bb6f661c0f426e07e2ca10c9406",
)
FILES = {
    "gemma2.model": (
        "maxtext/assets/tokenizers/tokenizer.gemma",
        "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2",
    ),
    "gemma3.model": (
        "maxtext/assets/tokenizers/tokenizer.gemma3",
        "a96dfa1c296977bd225176202b305aeb29f3f49cc7d54b15bd31e998f91b9736",
    ),
}


def folder(data_dir: str | os.PathLike) -> pathlib.Path:
    """Where the files lie."""
    return pathlib.Path(data_dir) / "tokenizers"


def extract(data_dir: str | os.PathLike) -> list[pathlib.Path]:
    """Writes what is not there yet; downloads the wheel for it.

    Raises:
        UserError: the wheel cannot be had, or a file is not the one that we know.
    """
    paths = []
    for name, (member, sha256) in FILES.items():
        path = folder(data_dir) / name
        if not path.exists():
            with zipfile.ZipFile(fetch(MAXTEXT, data_dir)) as wheel:
                content = wheel.read(member)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{name}.partial")
            partial.write_bytes(content)
            partial.replace(path)
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            raise UserError(f"{path} has sha256 {found}, expected {sha256}: delete it")
        paths.append(path)
    return paths


def main(argv: list[str]) -> None:
    (data_dir,) = cli.positional(argv, "DATA_DIR")
    for path in extract(data_dir):
        print(path)


if __name__ == "__main__":
    cli.run(main)
