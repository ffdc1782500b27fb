"""Text and token ids: SentencePiece models, our small one and Gemma's 256k and 262k alike.

Gemma 1, 2 and PaliGemma share a file of 256,000 pieces, Gemma 3 has one of 262,144. Both lie in the
folders of the models that are downloaded (`tokenizer.model`).
"""

import os
import string
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import sentencepiece
from jaxtyping import Int
from sentencepiece import sentencepiece_model_pb2

from unifluid_jax.errors import UserError

# Tokens of ours, by the pieces that serve for them. A model trained without them lends what comes
# nearest: Gemma 3 has learned a beginning of images, Gemma 1 and 2 have unused slots only; a model
# without a newline piece spells it as a byte.
_OWN = {
    "boi": ("<boi>", "<start_of_image>", "<unused0>"),
    "null": ("<null>", "<unused1>"),
    "separator": ("\n", "<0x0A>"),
}

# PaliGemma: places in a picture, and codes of segmentation masks, behind Gemma's pieces.
PALIGEMMA_PIECES = (
    *(f"<loc{i:04d}>" for i in range(1024)),
    *(f"<seg{i:03d}>" for i in range(128)),
)


class TextTokenizer:
    """A SentencePiece model, the ids of the special tokens, and how a model is asked.

    Attributes:
        vocab_size: rows of the embedding table.
        pad, eos, bos: control tokens.
        boi, null: begin of image, dropped text. Pieces of their own, Gemma 3's `<start_of_image>`,
            or Gemma's `<unused0>` and `<unused1>`.
        separator: "\\n", which ends a prompt before its answer (PaliGemma).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        vocab_size: int = 0,
        paligemma: bool = False,
        caption_prompt: str = "caption en",
        answer_prompt: str = "answer en {question}",
    ):
        """Reads the model file; the arguments are the fields of `config.tokenizer`.

        Args:
            path: of the file.
            vocab_size: rows of the embedding table, where it has more than there are tokens
                (256,128 in the official Gemma 2, 257,216 in Hugging Face's PaliGemma); 0 for as
                many.
            paligemma: add PaliGemma's tokens for places and masks, 257,152 tokens with Gemma's.
            caption_prompt: asks for a caption. The defaults are PaliGemma's, for English; a model
                that starts from PaliGemma knows others, like "describe en" and "caption de".
            answer_prompt: asks a question, which stands where "{question}" does.

        Raises:
            UserError: no such file, no SentencePiece model in it, it lacks a special token, it has
                more tokens than the table has rows, or a prompt makes no sense.
        """
        try:
            with open(path, "rb") as file:
                serialized = file.read()
            if paligemma:
                serialized = _with_pieces(serialized, PALIGEMMA_PIECES)
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(serialized)
        except OSError as error:
            raise UserError(
                f'text tokenizer "{path}": no such file; set config.tokenizer.path'
            ) from error
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'text tokenizer "{path}": not a SentencePiece model; set config.tokenizer.path'
            ) from error
        self._pieces = self._model.vocab_size()
        self.vocab_size = vocab_size or self._pieces
        if self.vocab_size < self._pieces:
            raise UserError(
                f"config.tokenizer.vocab_size is {vocab_size}, but there are {self._pieces} tokens:"
                " set it to as many or more, or to 0"
            )
        self.pad = self._model.pad_id()
        self.eos = self._model.eos_id()
        self.bos = self._model.bos_id()
        if min(self.pad, self.eos, self.bos) < 0:
            raise UserError(f'text tokenizer "{path}" lacks a pad, eos or bos token: use another')
        self.boi, self.null, self.separator = (self._special(path, *p) for p in _OWN.values())
        self._caption_prompt, self._answer_prompt = caption_prompt, answer_prompt
        for name, template, wanted in (
            ("caption_prompt", caption_prompt, []),
            ("answer_prompt", answer_prompt, ["question"]),
        ):
            if _fields(template) != wanted:
                shape = '"{question}" once' if wanted else "no braces"
                raise UserError(f'config.tokenizer.{name} is "{template}": it must have {shape}')

    def _special(self, path: str | os.PathLike, *pieces: str) -> int:
        for piece in pieces:
            index = self._model.piece_to_id(piece)
            if index != self._model.unk_id():
                return index
        names = " nor ".join(map(repr, pieces))
        raise UserError(f'text tokenizer "{path}" has neither {names}: use another')

    @property
    def layout_ids(self) -> dict[str, int]:
        """The ids that `sequence.Layout` wants, by its names for them."""
        return {name: getattr(self, name) for name in ("bos", "eos", "boi", "null", "separator")}

    def prompt(self, task: str, text: str) -> str:
        """What the model reads for a prompt of this task, without the separator behind it."""
        if task == "caption":
            return self._caption_prompt
        return self._answer_prompt.format(question=text) if task == "vqa" else text

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token, whatever stands in the text."""
        special = (self.boi, self.null, self.separator)
        return [i for i in self._model.EncodeAsIds(text) if i not in special]

    def padded(self, text: str, length: int) -> Int[np.ndarray, "T"]:
        """Ids of a text and EOS, cut or padded to `length` (the text tower of a SigLIP)."""
        ids = [*self.encode(text)[: length - 1], self.eos]
        return np.array(ids + [self.pad] * (length - len(ids)), np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids up to the first end of sequence; special tokens leave nothing.

        Neither do ids of rows without a token.
        """
        ids = [int(i) for i in ids]
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        special = (self.pad, self.bos, self.boi, self.null)
        ids = [i for i in ids if i not in special and i < self._pieces]
        return self._model.DecodeIds(ids).strip()

    def piece(self, index: SupportsIndex) -> str:
        """One token as it is spelled in the model; empty for a row without a token."""
        return self._model.IdToPiece(int(index)) if int(index) < self._pieces else ""


def _with_pieces(serialized: bytes, pieces: Iterable[str]) -> bytes:
    """A SentencePiece model with more pieces behind its own, which no other piece can contain.

    Raises:
        ValueError: it is none.
    """
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(serialized)
    except Exception as error:  # protobuf's own kind, which differs between its implementations
        raise ValueError(str(error)) from error
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    return model.SerializeToString()


def _fields(template: str) -> list[str] | None:
    """Names in braces in a template; None when it is broken."""
    try:
        return [name for _, name, *_ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        return None
