"""Trains the small text tokenizer on the texts of our data sets' train splits.

    unifluid data build easy_vqa openmoji
    python -m data.vocabulary data_cache unifluid_jax/assets/spm_small.model

Special tokens stand where Gemma has them (pad 0, eos 1, bos 2, unk 3), then ours. Text is folded to
lower case; what no piece covers is spelled in bytes, so that nothing is ever lost.
"""

import collections
import io
import os
import tempfile
from collections.abc import Iterator, Sequence

import sentencepiece
import tensorflow_datasets as tfds
from sentencepiece import sentencepiece_model_pb2

from unifluid_jax import cli

DATASETS = ("easy_vqa", "openmoji")
SPECIAL = ("<boi>", "<null>", "\n", *(f"<unused{i}>" for i in range(9)))
_CONTROL = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}

# Easy-vqa repeats 273 questions 30,000 times: without a cap nothing else would count.
_MAX_REPEATS = 20

SIZE = 1536  # pieces, with the special ones and the 256 bytes


def texts(record: dict) -> Iterator[str]:
    """Every text of a canonical record that a model reads or writes."""
    for field, names in {
        "captions": ("text",),
        "questions": ("question", "answer"),
        "edits": ("instruction",),
    }.items():
        for name in names:
            for text in record[field][name]:
                yield text.decode() if isinstance(text, bytes) else text


def corpus(data_dir: str | os.PathLike) -> list[str]:
    """The texts of the train splits, in a fixed order, each at most `_MAX_REPEATS` times."""
    count = collections.Counter()
    for name in DATASETS:
        for record in tfds.builder(name, data_dir=data_dir).as_data_source("train"):
            count.update(texts(record))
    return [text for text in sorted(count) for _ in range(min(count[text], _MAX_REPEATS))]


def train(sentences: Sequence[str], size: int = SIZE) -> bytes:
    """A SentencePiece model of `size` pieces as the bytes of its file."""
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        # Capital letters of Latin, Greek and Cyrillic. The trainer's own "nmt_nfkc_cf" folds all of
        # Unicode, with a table seven times the size of our model.
        for code in range(0x41, 0x450):
            small = chr(code).lower()
            if small != chr(code) and len(small) == 1:
                rules.write(f"{code:X}\t{ord(small):X}\n")
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",  # unigram splits "what" and "color": it counts distinct texts
            vocab_size=size,
            user_defined_symbols=list(SPECIAL),
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_tsv=rules.name,
            num_threads=1,
            minloglevel=2,
            **{f"{name}_id": number for name, number in _CONTROL.items()},
            **{f"{name}_piece": f"<{name}>" for name in _CONTROL},
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # a name that is new each time
    return proto.SerializeToString(deterministic=True)


def main(argv: list[str]) -> None:
    data_dir, output = cli.positional(argv, "DATA_DIR", "OUTPUT")
    sentences = corpus(data_dir)
    model = train(sentences)
    with open(output, "wb") as f:
        f.write(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    distinct = sorted(set(sentences))
    pieces = sum(len(processor.encode(text)) for text in distinct)
    words = sum(len(text.split()) for text in distinct)
    print(
        f"{output}: {len(processor)} pieces, {len(model):,} bytes; {len(distinct):,} distinct "
        f"texts, {pieces / words:.2f} pieces a word"
    )


if __name__ == "__main__":
    cli.run(main)
