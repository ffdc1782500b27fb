"""A folder to finetune on: easy-vqa's pictures with a question that no model of ours has learned.

    python -m benchmarks.described_folder data_cache described_shapes
    unifluid data import --nolatents described_shapes
    unifluid train --config=experiments/finetune_vqa.py:data=described_shapes --workdir=runs/my
    unifluid evaluate --workdir=runs/my

"what is drawn?" is answered with colour and shape, "red circle". The quickstart's model knows the
pictures and the words, but answers questions with one word: what its score gains here, the adapters
have learned. docs/finetuning.md has the numbers.
"""

import json
from pathlib import Path

from unifluid_jax import cli
from unifluid_jax.input.records import Records

QUESTION = "what is drawn?"
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
            answer = f"{record.extra['color']} {record.extra['shape']}"
            lines.append({"image": str(path), "question": QUESTION, "answer": answer})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        print(f"{folder / split}.jsonl: {len(lines)} lines")


if __name__ == "__main__":
    cli.run(main)
