"""Text and token ids: SentencePiece models, our small one and Gemma's 256k alike."""

import os
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import sentencepiece
from jaxtyping import Int

from unifluid_jax.errors import UserError

# Tokens of ours, by the pieces that serve for them. A model trained without them, like Gemma's,
# lends unused slots; a model without a newline piece spells it as a byte.
_OWN = {
    "boi": ("<boi>", "<unused0>"),
    "null": ("<null>", "<unused1>"),
    "separator": ("\n", "<0x0A>"),
}


class TextTokenizer:
    """A SentencePiece model and the ids of the special tokens.

    Attributes:
        vocab_size: number of pieces.
        pad, eos, bos: control tokens.
        boi, null: begin of image, dropped text. Pieces of their own, or Gemma's `<unused0>` and
            `<unused1>`.
        separator: "\\n", which ends a prompt before its answer (PaliGemma).
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the model file.

        Raises:
            UserError: no such file, no SentencePiece model in it, or it lacks a special token.
        """
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(os.fspath(path))
        except (OSError, RuntimeError) as error:
            reason = "not a SentencePiece model" if os.path.exists(path) else "no such file"
            raise UserError(
                f'text tokenizer "{path}": {reason}; set config.tokenizer.path'
            ) from error
        self.vocab_size = self._model.vocab_size()
        self.pad = self._model.pad_id()
        self.eos = self._model.eos_id()
        self.bos = self._model.bos_id()
        if min(self.pad, self.eos, self.bos) < 0:
            raise UserError(f'text tokenizer "{path}" lacks a pad, eos or bos token: use another')
        self.boi, self.null, self.separator = (self._special(path, *p) for p in _OWN.values())

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

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token, whatever stands in the text."""
        special = (self.boi, self.null, self.separator)
        return [i for i in self._model.EncodeAsIds(text) if i not in special]

    def padded(self, text: str, length: int) -> Int[np.ndarray, "T"]:
        """Ids of a text and EOS, cut or padded to `length` (the text tower of a SigLIP)."""
        ids = [*self.encode(text)[: length - 1], self.eos]
        return np.array(ids + [self.pad] * (length - len(ids)), np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids up to the first end of sequence; special tokens leave nothing."""
        ids = [int(i) for i in ids]
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        special = (self.pad, self.bos, self.boi, self.null)
        return self._model.DecodeIds([i for i in ids if i not in special]).strip()

    def piece(self, index: SupportsIndex) -> str:
        """One token as it is spelled in the model."""
        return self._model.IdToPiece(int(index))
