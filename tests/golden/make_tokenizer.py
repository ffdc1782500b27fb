"""Writes tests/golden/tokenizer/golden.json: the texts' ids by the `gemma` package's tokenizers.

python -m data.tokenizers data_cache
VENV/bin/python tests/golden/make_tokenizer.py data_cache    # an environment with `gemma`
"""

import json
import pathlib
import sys

from gemma import gm

FOLDER = pathlib.Path(__file__).with_name("tokenizer")


def main(data_dir: str) -> None:
    texts = json.loads((FOLDER / "texts.json").read_text())
    files = pathlib.Path(data_dir) / "tokenizers"
    kinds = {"gemma2": gm.text.Gemma2Tokenizer, "gemma3": gm.text.Gemma3Tokenizer}
    lines = []
    for name, kind in kinds.items():
        tokenizer = kind(path=files / f"{name}.model")
        special = {key: int(token) for key, token in tokenizer.special_tokens.__members__.items()}
        ids = {key: tokenizer.encode(text) for key, text in texts.items()}
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in ids.items())
        head = f'"special": {json.dumps(special)}, "vocab_size": {tokenizer.vocab_size}'
        lines.append(f'{json.dumps(name)}: {{{head}, "ids": {{\n{rows}\n}}}}')
    (FOLDER / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
