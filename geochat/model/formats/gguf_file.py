"""The GGUF container (llama.cpp's file format): metadata and unread tensors of one file.

Little-endian, versions 2 and 3. The file is not mapped; a tensor is read when it is asked for. Plain float tensors need
no other package, quantised ones are made float16 by the `gguf` package. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geochat.model.weights import Entry, State

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Codes of the value types of metadata.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Codes of the tensor types that are plain numbers.
FLOATS: dict[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufFile:
    """One file: its metadata, and its tensors under their names in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: State

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata. Raises ValueError when it is missing without a default, or of another kind."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: its metadata has no {key}")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}")
        return value


def is_gguf(path: Path | str | None) -> bool:
    """Whether a path is a GGUF file, or a folder of them that is no checkpoint folder besides."""
    if path is None:
        return False
    path = Path(path)
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def package() -> Any:
    """The `gguf` package. Raises ValueError with the command that installs it."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError("this GGUF operation needs the package gguf: pip install 'gguf>=0.17'") from None
    return gguf


def open_gguf(file: Path) -> GgufFile:
    """Metadata and unread tensors. Raises ValueError for a file that is missing, damaged or of another kind."""
    try:
        with file.open("rb") as stream:
            return _Header(file, stream).read()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


class _Info(NamedTuple):
    """What a file says of one tensor."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as in torch."""
    kind: int
    offset: int


class _Header:
    """Reads from the beginning of a file; every length is checked against what is left."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file = file
        self.stream = stream
        self.size = file.stat().st_size

    def read(self) -> GgufFile:
        if self.stream.read(4) != _MAGIC:
            raise ValueError(f"{self.file}: no GGUF file (it does not begin with GGUF)")
        version = self.scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"{self.file}: GGUF version {version}; little-endian 2 and 3 can be read")
        count, pairs = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        infos = [self.info() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged()
        start = -(-self.stream.tell() // alignment) * alignment
        tensors = {info.name: self.entry(info, start) for info in infos}
        return GgufFile(self.file, metadata, tensors)

    def take(self, count: int) -> bytes:
        data = self.stream.read(count) if count <= self.size else b""
        if len(data) != count:
            raise self.damaged()
        return data

    def damaged(self) -> ValueError:
        return ValueError(f"{self.file}: cut short or damaged; copy it again")

    def scalar(self, code: str) -> Any:
        value = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]
        # 1e-5 was rounded to float32 in the file: the shortest decimal that gives the same float32 was meant.
        return float(str(np.float32(value))) if code == "f" else value

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError:
            raise self.damaged() from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged()
        inner, length = self.scalar("I"), self.scalar("Q")
        if inner not in _SCALARS:
            return [self.value(inner) for _ in range(length)]
        width = struct.calcsize(_SCALARS[inner])
        return list(struct.unpack(f"<{length}{_SCALARS[inner]}", self.take(length * width)))

    def info(self) -> _Info:
        name, dims = self.string(), self.scalar("I")
        if dims > _MAX_DIMS:
            raise self.damaged()
        shape = tuple(self.scalar("Q") for _ in range(dims))
        return _Info(name, shape[::-1], self.scalar("I"), self.scalar("Q"))

    def entry(self, info: _Info, start: int) -> Entry:
        name, shape, kind, offset = info
        file, place = self.file, start + offset
        block, width = (1, FLOATS[kind].itemsize) if kind in FLOATS else _quant_block(file, name, kind)
        if shape and shape[-1] % block:
            raise self.damaged()
        if place + math.prod(shape) // block * width > self.size:
            raise ValueError(f"{file}: cut short ({self.size} bytes, {name} lies beyond); copy it again")

        def data(first: int, last: int) -> bytearray:
            """The bytes of the values from `first` up to `last`; both begin a block."""
            found = bytearray((last - first) // block * width)
            with file.open("rb") as stream:
                stream.seek(place + first // block * width)
                if stream.readinto(found) != len(found):
                    raise ValueError(f"{file}: cut short while reading {name}")
            return found

        if kind not in FLOATS:
            return Entry(shape, torch.float16, lambda: _dequantised(file, name, kind, data, shape), file=file)
        dtype = FLOATS[kind]

        def peek(first: int, last: int) -> Tensor:
            return (
                torch.frombuffer(data(first, last), dtype=dtype)
                if last > first
                else torch.empty(0, dtype=dtype)
            )

        return Entry(shape, dtype, lambda: peek(0, math.prod(shape)).reshape(shape), peek, file)


def _quant_block(file: Path, name: str, kind: int) -> tuple[int, int]:
    """Values and bytes of one block of a quantised type."""
    gguf = package()
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"{file}: {name} has tensor type {kind}, which is not known here") from None


def _dequantised(file: Path, name: str, kind: int, data: Any, shape: tuple[int, ...]) -> Tensor:
    gguf = package()
    quant = gguf.GGMLQuantizationType(kind)
    packed = np.frombuffer(data(0, math.prod(shape)), dtype=np.uint8)
    try:
        values = gguf.quants.dequantize(packed.reshape(*shape[:-1], -1), quant)
    except NotImplementedError:
        raise ValueError(f"{file}: {name} is quantised as {quant.name}, which gguf cannot read") from None
    return torch.from_numpy(values.reshape(shape)).to(torch.float16)
