from pathlib import Path

import pytest
import sentencepiece

import unifluid_jax
from data import vocabulary

MODEL = Path(unifluid_jax.__file__).parent / "assets" / "spm_small.model"


@pytest.fixture(scope="module")
def small():
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def test_special_tokens_stand_where_they_should(small):
    assert [small.pad_id(), small.eos_id(), small.bos_id(), small.unk_id()] == [0, 1, 2, 3]
    for offset, piece in enumerate(vocabulary.SPECIAL):
        assert small.piece_to_id(piece) == 4 + offset
    assert len(small) == vocabulary.SIZE
    assert MODEL.stat().st_size < 100_000


@pytest.mark.parametrize(
    "text",
    [
        "what color is the shape?",
        "does the image not contain a teal rectangle?",
        "is there a yellow triangle in the image?",
        "a brown circle",
        "change the color of the rectangle to gray",
        "make the skin tone dark",
        "turn it into a woman",
    ],
)
def test_one_token_a_word(small, text):
    assert small.encode(text, out_type=str) == [
        *(f"▁{word}" for word in text.rstrip("?").split()),
        *(["?"] if text.endswith("?") else []),
    ]


@pytest.mark.parametrize("text", ["a red circle", "über 9000 zebras!", "日本 🏃", "a\nb"])
def test_nothing_is_lost(small, text):
    assert small.decode(small.encode(text)) == text


def test_capitals_are_folded(small):
    assert small.encode("What Color IS it? ÄÉ") == small.encode("what color is it? äé")


def test_texts_of_a_record():
    record = {
        "captions": {"image": [0], "text": [b"a red circle"]},
        "questions": {"image": [0], "question": [b"what is it?"], "answer": ["circle"]},
        "edits": {"source": [0], "target": [1], "instruction": [b"make it blue"]},
    }
    assert list(vocabulary.texts(record)) == [
        "a red circle",
        "what is it?",
        "circle",
        "make it blue",
    ]


def test_training_is_reproducible():
    sentences = ["what color is the shape?", "a red circle", "make it blue"] * 5
    model = vocabulary.train(sentences, size=310)
    assert model == vocabulary.train(sentences, size=310)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(processor) == 310
    assert processor.decode(processor.encode("a RED circle")) == "a red circle"
