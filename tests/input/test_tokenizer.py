import io
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece

from data import tokenizers
from unifluid_jax.errors import UserError
from unifluid_jax.input.tokenizer import PALIGEMMA_PIECES, TextTokenizer
from unifluid_jax.sequence import Layout

SMALL = "unifluid_jax/assets/spm_small.model"
GOLDEN = Path("tests/golden/tokenizer")


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
    with pytest.raises(UserError, match="neither '<boi>' nor .* nor '<unused0>'"):
        TextTokenizer(train(tmp_path / "plain", []))
    with pytest.raises(UserError, match="lacks a pad"):
        TextTokenizer(train(tmp_path / "padless", ["<boi>", "<null>"], pad_id=-1))
    for paligemma in (False, True):
        broken.write_bytes(b"no protocol buffer at all")
        with pytest.raises(UserError, match="broken.model.*not a SentencePiece model"):
            TextTokenizer(broken, paligemma=paligemma)


def test_prompts_are_templates():
    tokenizer = TextTokenizer(SMALL, caption_prompt="caption de", answer_prompt="{question} ?")
    assert tokenizer.prompt("caption", "") == "caption de"
    assert tokenizer.prompt("vqa", "is {it} red") == "is {it} red ?"
    assert tokenizer.prompt("generate", "a {red} circle") == "a {red} circle"
    assert TextTokenizer(SMALL).prompt("vqa", "is it?") == "answer en is it?"
    for field, template in (
        ("caption_prompt", "caption {language}"),
        ("answer_prompt", "answer en"),
        ("answer_prompt", "answer {lang} {question}"),
        ("answer_prompt", "answer en {question"),
    ):
        with pytest.raises(UserError, match=f"config.tokenizer.{field} is .*it must have"):
            TextTokenizer(SMALL, **{field: template})


def test_a_table_may_have_more_rows_than_there_are_tokens():
    plain, padded = TextTokenizer(SMALL), TextTokenizer(SMALL, vocab_size=1600)
    assert (plain.vocab_size, padded.vocab_size) == (1536, 1600)
    ids = plain.encode("a red circle")
    assert padded.decode([*ids, 1599]) == "a red circle" and padded.piece(1599) == ""
    with pytest.raises(UserError, match="vocab_size is 1000, but there are 1536 tokens"):
        TextTokenizer(SMALL, vocab_size=1000)


def test_paligemmas_pieces_stand_behind_the_models_own():
    plain, more = TextTokenizer(SMALL), TextTokenizer(SMALL, paligemma=True)
    assert more.vocab_size == plain.vocab_size + 1024 + 128
    assert [more.piece(1536 + i) for i in (0, 1023, 1024, 1151)] == [
        "<loc0000>", "<loc1023>", "<seg000>", "<seg127>",
    ]  # fmt: skip
    assert more.encode("a red circle") == plain.encode("a red circle")
    box = "<loc0012><loc1023>"
    assert more.encode(box)[-2:] == [1536 + 12, 1536 + 1023]
    assert more.decode(more.encode(f"{box} circle")) == f"{box} circle"
    assert pickle.loads(pickle.dumps(more)).encode(box) == more.encode(box)


# --- Gemma's own files ---


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def gemma(request):
    """Name, file, and what the `gemma` package makes of our texts with it."""
    path = tokenizers.folder("data_cache") / f"{request.param}.model"
    if not path.exists():
        pytest.skip(f"{path} is missing: python -m data.tokenizers data_cache")
    golden = json.loads((GOLDEN / "golden.json").read_text())[request.param]
    return request.param, path, golden


@pytest.fixture(scope="module")
def texts():
    found = json.loads((GOLDEN / "texts.json").read_text())
    assert len(found) > 40
    return found


@pytest.mark.interop
def test_ids_are_those_of_the_gemma_package(gemma, texts):
    _, path, golden = gemma
    tokenizer = TextTokenizer(path)
    assert {key: tokenizer.encode(text) for key, text in texts.items()} == golden["ids"]
    special = golden["special"]
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (
        special["PAD"], special["EOS"], special["BOS"],
    )  # fmt: skip
    assert tokenizer.vocab_size == golden["vocab_size"]
    for key, text in texts.items():
        if key not in ("blanks", "widths", "combining"):
            assert tokenizer.decode(golden["ids"][key]) == text.strip(), key


@pytest.mark.interop
def test_tokens_of_ours_are_on_unused_slots(gemma):
    """Gemma 3 has learned a beginning of images; nothing that is typed becomes one."""
    name, path, golden = gemma
    tokenizer = TextTokenizer(path)
    custom = golden["special"]["CUSTOM"]
    assert tokenizer.piece(custom) == "<unused0>"
    boi = custom if name == "gemma2" else golden["special"]["START_OF_IMAGE"]
    assert (tokenizer.boi, tokenizer.null) == (boi, custom + 1)
    assert tokenizer.piece(tokenizer.separator) == "\n"
    typed = tokenizer.encode("<unused0><unused1> a\nb <start_of_image>")
    assert not {tokenizer.boi, tokenizer.null, tokenizer.separator} & set(typed)


@pytest.mark.interop
@pytest.mark.parametrize("gemma", ["gemma2"], indirect=True)
def test_paligemmas_vocabulary(gemma, texts):
    """PaliGemma 1 and 2 speak Gemma 2's."""
    _, path, golden = gemma
    tokenizer = TextTokenizer(path, paligemma=True)
    assert tokenizer.vocab_size == 257_152 == golden["vocab_size"] + len(PALIGEMMA_PIECES)
    places = [tokenizer.encode(piece)[-1] for piece in ("<loc0000>", "<loc1023>", "<seg127>")]
    assert places == [256_000, 257_023, 257_151]
    for key, text in texts.items():
        if "<loc" not in text:
            assert tokenizer.encode(text) == golden["ids"][key], key
    padded = TextTokenizer(path, paligemma=True, vocab_size=257_216)
    assert padded.vocab_size == 257_216


@pytest.mark.interop
def test_ids_are_those_of_the_gemma_package_live(gemma, texts):
    name, path, golden = gemma
    gm = pytest.importorskip("gemma.gm")
    kind = {"gemma2": gm.text.Gemma2Tokenizer, "gemma3": gm.text.Gemma3Tokenizer}[name]
    theirs, ours = kind(path=path), TextTokenizer(path)
    for key, text in texts.items():
        assert ours.encode(text) == theirs.encode(text) == golden["ids"][key], key
