"""Reading a sentencepiece `tokenizer.model` without sentencepiece: a small protocol-buffer message."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE_MODEL = 2


@dataclass
class SentencePieceModel:
    """What a `tokenizer.model` file holds (sentencepiece_model.proto), as far as encoding depends on it."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, type
    model_type: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @classmethod
    def read(cls, file: Path) -> SentencePieceModel:
        """Parse the file. Raises ValueError when it is no sentencepiece model."""
        model = cls()
        try:
            for number, value in _fields(file.read_bytes()):
                if number == 1:
                    piece = dict(_fields(value))
                    score = piece.get(2, 0.0)
                    model.pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
                elif number == 2:
                    trainer = dict(_fields(value))
                    model.model_type = trainer.get(3, model.model_type)
                    model.byte_fallback = bool(trainer.get(35, 0))
                    model.unk_id = trainer.get(40, model.unk_id)
                    model.bos_id = trainer.get(41, model.bos_id)
                    model.eos_id = trainer.get(42, model.eos_id)
                elif number == 3:
                    rules = dict(_fields(value))
                    model.charsmap = rules.get(2, b"")
                    model.add_dummy_prefix = bool(rules.get(3, 1))
                    model.remove_extra_whitespaces = bool(rules.get(4, 1))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError, StopIteration):
            raise ValueError(f"{file}: not a sentencepiece model") from None
        if not model.pieces:
            raise ValueError(f"{file}: not a sentencepiece model (it has no pieces)")
        return model


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """(field number, value) of a protocol-buffer message; nested messages and strings stay bytes."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value - (1 << 64) if value >> 63 else value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        value: Any
        if kind == 0:
            value = varint()
        elif kind == 2:
            length = varint()
            if at + length > len(data):
                raise ValueError("cut short")
            value = data[at : at + length]
            at += length
        elif kind == 5:
            value = struct.unpack_from("<f", data, at)[0]
            at += 4
        elif kind == 1:
            value = struct.unpack_from("<d", data, at)[0]
            at += 8
        else:
            raise ValueError(f"wire type {kind}")
        found.append((number, value))
    return found
