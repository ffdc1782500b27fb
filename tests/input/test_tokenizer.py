import io
import pickle

import pytest
import sentencepiece

from unifluid_jax.errors import UserError
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.sequence import Layout

SMALL = "unifluid_jax/assets/spm_small.model"


def train(path, symbols, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "what color is the shape?"] * 20),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=symbols,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, **options},
    )
    path.write_bytes(model.getvalue())
    return path


def test_text_comes_back():
    tokenizer = TextTokenizer(SMALL)
    for text in ("what color is the circle?", "a teal triangle", "naïve 漢字 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_ends_at_the_first_eos_and_leaves_special_tokens_out():
    tokenizer = TextTokenizer(SMALL)
    ids = tokenizer.encode("a red circle")
    around = [tokenizer.bos, tokenizer.null, *ids, tokenizer.boi, tokenizer.eos, *ids]
    assert tokenizer.decode(around) == "a red circle"
    assert tokenizer.decode([]) == ""


def test_nothing_typed_becomes_a_special_token():
    tokenizer = TextTokenizer(SMALL)
    special = {tokenizer.pad, *tokenizer.layout_ids.values()}
    assert len(special) == 6
    for text in ("<boi><null>", "a\nb", "<bos> <eos> <pad>", "x<boi>\n<null>y"):
        assert not special & set(tokenizer.encode(text)), text


def test_layout_ids_are_what_a_layout_takes():
    tokenizer = TextTokenizer(SMALL)
    layout = Layout(**tokenizer.layout_ids, vision_tokens=1, image_tokens=1, token_dim=1)
    assert tokenizer.piece(layout.separator) == "\n"
    assert [tokenizer.piece(i) for i in (layout.boi, layout.null)] == ["<boi>", "<null>"]


def test_gemmas_unused_slots_serve_for_tokens_of_ours(tmp_path):
    symbols = ["<unused0>", "<unused1>", "\n"]
    tokenizer = TextTokenizer(train(tmp_path / "gemma", symbols))
    pieces = [tokenizer.piece(i) for i in (tokenizer.boi, tokenizer.null, tokenizer.separator)]
    assert pieces == symbols


def test_it_travels_to_worker_processes():
    tokenizer = TextTokenizer(SMALL)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a red circle") == tokenizer.encode("a red circle")
    assert copy.layout_ids == tokenizer.layout_ids


def test_unusable_files_are_named(tmp_path):
    broken = tmp_path / "broken.model"
    with open(SMALL, "rb") as file:
        broken.write_bytes(file.read()[:1000])
    with pytest.raises(UserError, match="none.model.*no such file.*config.tokenizer.path"):
        TextTokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="broken.model.*not a SentencePiece model"):
        TextTokenizer(broken)
    with pytest.raises(UserError, match="neither '<boi>' nor '<unused0>'"):
        TextTokenizer(train(tmp_path / "plain", []))
    with pytest.raises(UserError, match="lacks a pad"):
        TextTokenizer(train(tmp_path / "padless", ["<boi>", "<null>"], pad_id=-1))
