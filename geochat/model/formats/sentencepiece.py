"""Reading and writing a sentencepiece `tokenizer.model` without sentencepiece: a small protocol-buffer message."""

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
        return cls.parse(file.read_bytes(), str(file))

    @classmethod
    def parse(cls, data: bytes, where: str) -> SentencePieceModel:
        """Parse the content of a file. Raises ValueError, naming `where`, when it is no sentencepiece model."""
        model = cls()
        try:
            for number, value in _fields(data):
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
            raise ValueError(f"{where}: not a sentencepiece model") from None
        if not model.pieces:
            raise ValueError(f"{where}: not a sentencepiece model (it has no pieces)")
        return model

    def serialise(self) -> bytes:
        """The content of a file that `read` and sentencepiece itself take as this model."""
        pieces = [
            _text(1, text) + _number(2, struct.pack("<f", score)) + _number(3, kind)
            for text, score, kind in self.pieces
        ]
        trainer = _number(3, self.model_type) + _number(4, len(pieces)) + _number(35, self.byte_fallback)
        trainer += (
            _number(40, self.unk_id) + _number(41, self.bos_id) + _number(42, self.eos_id) + _number(43, -1)
        )
        for number, role in ((45, self.unk_id), (46, self.bos_id), (47, self.eos_id)):
            trainer += _text(number, self.pieces[role][0])  # sentencepiece looks the roles up by their text
        rules = _text(1, "identity") + _text(2, self.charsmap) + _number(3, self.add_dummy_prefix)
        rules += _number(4, self.remove_extra_whitespaces) + _number(5, True)
        return b"".join(_text(1, piece) for piece in pieces) + _text(2, trainer) + _text(3, rules)


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


def _text(number: int, value: bytes | str) -> bytes:
    """A field that has a length: a string, bytes or a nested message."""
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int | bytes) -> bytes:
    """A field that holds a whole number, or the four bytes of a float."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 5) + value
    return _varint(number << 3) + _varint(value & ((1 << 64) - 1))


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
