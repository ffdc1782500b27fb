"""A folder to finetune on: easy-vqa's pictures, asked and answered in German, one JSON line each.

    python -m benchmarks.german_folder data_cache german_shapes
    unifluid data import --nolatents german_shapes
    unifluid train --config=experiments/finetune_vqa.py:data=german_shapes --workdir=runs/german
    unifluid evaluate --workdir=runs/german

No model of ours has seen a German word, and the quickstart's model knows the pictures: what its
score gains here, the adapters have learned. docs/finetuning.md has the numbers.
"""

import json
from pathlib import Path

from unifluid_jax import cli
from unifluid_jax.input.records import Records

QUESTIONS = {"color": "welche farbe?", "shape": "welche form?"}
WORDS = {
    "black": "schwarz",
    "blue": "blau",
    "brown": "braun",
    "gray": "grau",
    "green": "grün",
    "red": "rot",
    "teal": "türkis",
    "yellow": "gelb",
    "circle": "kreis",
    "rectangle": "viereck",
    "triangle": "dreieck",
}
SPLITS = {"train": 1000, "test": 250}


def main(argv: list[str]) -> None:
    data_dir, folder = cli.positional(argv, "DATA_DIR", "FOLDER")
    folder = Path(folder)
    for split, count in SPLITS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        records = Records("easy_vqa", split, data_dir)
        lines = []
        for record in (records[i] for i in range(len(records))):
            if len(lines) == count:
                break
            if not record.captions:
                continue  # its colour and shape are not certain
            path = Path(split) / f"{len(lines):04}.png"
            (folder / path).write_bytes(record.images[0])
            answers = [WORDS[record.extra[name]] for name in QUESTIONS]
            lines.append(
                {"image": str(path), "question": list(QUESTIONS.values()), "answer": answers}
            )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(lines)} lines")


if __name__ == "__main__":
    cli.run(main)
