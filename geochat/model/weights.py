"""Weights on disk as a lazy table: what a folder holds is known at once, a tensor is read when it is asked for.

Everything that reads or writes weights goes through here, so that a 7B model is converted, merged or saved
one tensor at a time. Reading: safetensors and (with `weights_only=True`) PyTorch pickles. Writing: safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_FROM_NAME = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    peek: Callable[[int, int], Tensor] | None = None
    """Some of the values, flat, without reading the others; None where the whole tensor is at hand anyway."""
    file: Path | None = None
    """Where the tensor, or what it is computed from, lies on disk."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def values(self, first: int, last: int) -> Tensor:
        """The flat values from `first` up to `last`."""
        return self.peek(first, last) if self.peek else self.read().reshape(-1)[first:last]

    def map(
        self,
        change: Callable[[Tensor], Tensor],
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Entry:
        """The entry whose tensor is `change(tensor)`, still unread; the new shape and dtype are stated here."""
        return Entry(shape or self.shape, dtype or self.dtype, lambda: change(self.read()), file=self.file)

    def to(self, dtype: torch.dtype | None) -> Entry:
        """The same entry rounded to `dtype` when it is read (None: as stored)."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return self.map(lambda tensor: tensor.to(dtype), dtype=dtype)


State = dict[str, Entry]


def read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    """A JSON object. Raises ValueError that names the file when it is damaged, or not there (unless optional: {})."""
    if optional and not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: damaged, no JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: damaged, holds a {type(value).__name__}, not an object; copy it again")
    return value


def write_json(file: Path, value: Any) -> None:
    """A configuration file: keys in order, sets as sorted lists (PEFT's settings have some)."""
    text = json.dumps(value, indent=2, sort_keys=True, default=sorted)
    file.write_text(text + "\n", encoding="utf-8")


def of_tensor(tensor: Tensor, file: Path | None = None) -> Entry:
    """An entry for a tensor that is in memory, or mapped from a file."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor, file=file)


def open_weights(folder: Path) -> State:
    """All tensors of a checkpoint folder under their names on disk; safetensors go before pickles, these before GGUF.

    Raises ValueError when the folder has no weights, when a shard named by the index is missing, or when a file is
    damaged.
    """
    return open_files(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder in reading order."""
    if folder.suffix == ".gguf" and folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).exists():
            places = read_json(folder / index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise ValueError(f"{folder / index}: damaged, has no weight_map; copy it again")
            if strange := [name for name in places.values() if Path(name).name != name]:
                raise ValueError(f"{folder / index}: names {strange[0]!r}, which is no file of this folder")
            names = sorted(set(places.values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise ValueError(
                    f"{folder}: {index} names {missing[0]}, which is not there; copy the folder again"
                )
            return [folder / name for name in names]
        if (folder / single).exists():
            return [folder / single]
    if ggufs := sorted(folder.glob("*.gguf")):
        return ggufs
    raise ValueError(f"{folder}: no model.safetensors or pytorch_model.bin (nor their shards with an index)")


def open_files(files: Iterable[Path]) -> State:
    """The tensors of several files in one table."""
    state: State = {}
    for file in files:
        state.update(open_file(file))
    return state


def open_file(file: Path) -> State:
    """The tensors of one .safetensors, .gguf, .bin or .pth file. Pickles are read with `weights_only=True`."""
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if file.suffix == ".gguf":
        from geochat.model.formats.gguf_file import open_gguf  # it builds on this module

        return open_gguf(file).tensors
    tensors = _load_pickle(file, map_location="meta")  # names, shapes, and where the numbers lie
    places = {key: _place(tensor) for key, tensor in tensors.items()}
    if None not in places.values():
        return {
            key: _stored(file, key, places[key] or 0, tuple(tensor.shape), tensor.dtype)
            for key, tensor in tensors.items()
        }
    # No zip archive (PyTorch before 1.6), a torch that does not tell the places, or a view of another tensor.
    try:
        tensors = _load_pickle(file, map_location="cpu", mmap=True)
    except ValueError:
        tensors = _load_pickle(file, map_location="cpu")
    return {key: of_tensor(tensor, file) for key, tensor in tensors.items()}


def _load_pickle(file: Path, **options: Any) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, weights_only=True, **options)
    except Exception as error:  # torch raises half a dozen types for a damaged or unsafe file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file}: cannot be read as plain tensors ({reason})") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file}: holds a {type(loaded).__name__}, not a table of tensors")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def _place(tensor: Tensor) -> int | None:
    """Where the numbers of a tensor begin in the file it was loaded from onto "meta"; None if not in one piece."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        return None
    return start + tensor.storage_offset() * tensor.dtype.itemsize


def _stored(file: Path, key: str, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    """A tensor whose numbers lie in one piece in a file, from byte `start` on."""

    def peek(first: int, last: int) -> Tensor:
        # Not mapped: pages of a mapped file count as memory of the process, and a file cut short kills it.
        data = bytearray((last - first) * dtype.itemsize)
        with file.open("rb") as stream:
            stream.seek(start + first * dtype.itemsize)
            if stream.readinto(data) != len(data):
                raise ValueError(f"{file}: cut short while reading {key}")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    return Entry(shape, dtype, lambda: peek(0, math.prod(shape)).reshape(shape), peek, file)


def _open_safetensors(file: Path) -> State:
    header = read_header(file)
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")

    def entry(key: str) -> Entry:
        record = header[key]
        if record["dtype"] not in _FROM_NAME:
            raise ValueError(f"{file}: tensor {key} has dtype {record['dtype']}, which is not supported")
        first = start + record["data_offsets"][0]
        return _stored(file, key, first, tuple(record["shape"]), _FROM_NAME[record["dtype"]])

    return {key: entry(key) for key in header}


def read_header(file: Path, whole: bool = True) -> dict[str, dict[str, Any]]:
    """The table of a safetensors file: key -> dtype, shape, data_offsets. Raises ValueError on a damaged file.

    whole: False takes a file that ends behind its header, too.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: cut short or no safetensors file; copy or save it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file}: damaged, its header is no JSON; copy or save it again") from None
    header.pop("__metadata__", None)
    end = max((record["data_offsets"][1] for record in header.values()), default=0)
    if whole and size != 8 + length + end:
        raise ValueError(
            f"{file}: {size} bytes, but its header announces {8 + length + end}; copy or save it again"
        )
    return header


def plan_header(state: State) -> dict[str, dict[str, Any]]:
    """The table that a safetensors file of these tensors, one after the other, begins with; see `read_header`."""
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for key, entry in state.items():
        span = [offset, offset + entry.nbytes]
        header[key] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        offset = span[1]
    return header


def write_file(file: Path, state: State, progress: Callable[[], object] = lambda: None) -> None:
    """One safetensors file, written tensor by tensor, after each of which `progress` is called."""
    header = {"__metadata__": {"format": "pt"}, **plan_header(state)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to start on a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for key, entry in state.items():
            tensor = entry.read().detach().cpu().contiguous()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{key}: announced {entry.shape} {entry.dtype}, is {tuple(tensor.shape)} {tensor.dtype}"
                )
            stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
            progress()


def write_weights(
    folder: Path, state: State, max_shard_bytes: int = MAX_SHARD_BYTES, title: str | None = None
) -> list[str]:
    """`model.safetensors`, or numbered shards with their index when it would exceed `max_shard_bytes`.

    title: of a progress bar by tensor; None: no bar. Returns the names written. Holds one tensor in memory at a time.
    A shard that is there already, with just these tensors, is kept: each is written under another name and then
    renamed, so that it is there whole or not at all.
    """
    shards: list[State] = [{}]
    filled = 0
    for key, entry in state.items():
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = entry
        filled += entry.nbytes
    several = len(shards) > 1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if several else ["model.safetensors"]
    with tqdm(total=len(state), desc=title, unit="tensor", disable=title is None, leave=False) as bar:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, bar)
    if not several:
        return names
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in state.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return [*names, "model.safetensors.index.json"]


def resume_key(state: State, folders: Iterable[Path | str | None], *settings: object) -> str:
    """A hash of the files that a table and its configuration are read from (name, size, time) and of the settings: a
    stopped write may go on while it stays the same."""
    files = {entry.file for entry in state.values() if entry.file is not None}
    for folder in folders:
        if folder is not None and Path(folder).is_dir():
            # XTuner's folders hold their parts one level down.
            found = [*Path(folder).glob("*"), *Path(folder).glob("*/*")]
            files |= {file for file in found if file.is_file()}
        elif folder is not None and Path(folder).is_file():
            files.add(Path(folder))
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    names = [(key, entry.shape, str(entry.dtype)) for key, entry in state.items()]
    return hashlib.sha256(repr((stats, names, [str(value) for value in settings])).encode()).hexdigest()


def _write_shard(file: Path, shard: State, bar: tqdm) -> None:
    if file.exists() and list(read_header(file).items()) == list(plan_header(shard).items()):
        bar.update(len(shard))
        return
    partial = file.with_name(f"{file.name}.partial")
    write_file(partial, shard, bar.update)
    with partial.open("rb") as stream:  # a power cut must not leave a renamed file without its data
        os.fsync(stream.fileno())
    partial.replace(file)


def assert_same_keys(found: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a table whose keys or shapes differ from the wanted ones, or with whole numbers as weights, naming the first
    few of each kind."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    shapes = [
        f"{key} is {list(found[key].shape)}, should be {list(shape)}"
        for key, shape in wanted.items()
        if key in found and found[key].shape != tuple(shape)
    ]
    kinds = [f"{key} is {entry.dtype}" for key, entry in found.items() if not entry.dtype.is_floating_point]
    groups = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "no floating point": kinds,
    }
    parts = [
        f"{len(group)} {kind} ({', '.join(group[:3])}{', …' if len(group) > 3 else ''})"
        for kind, group in groups.items()
        if group
    ]
    if parts:
        raise ValueError(f"{where}: tensors do not fit the model: {'; '.join(parts)}")
