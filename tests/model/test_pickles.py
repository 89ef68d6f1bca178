"""Tensors of a pickle are read from their places in the file, one by one, and never mapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geochat.model.weights import open_file


def assert_reads_as_torch_does(file: Path) -> None:
    entries, tensors = open_file(file), torch.load(file, weights_only=True)
    assert list(entries) == list(tensors)
    for key, tensor in tensors.items():
        entry = entries[key]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(entry.read(), tensor), key
        count = tensor.numel()
        assert torch.equal(entry.values(count // 3, count), tensor.reshape(-1)[count // 3 :]), key


def some_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 5, generator=draw)
    return {
        "float32": matrix,
        "rows of it": matrix[2:5],
        "parameter": torch.nn.Parameter(torch.randn(3, generator=draw)),
        "bfloat16": torch.randn(33, 2, generator=draw).bfloat16(),
        "float16": torch.randn(1, 4, generator=draw).half(),
        "int64": torch.arange(11),
        "nothing": torch.empty(0, 4),
        "number": torch.tensor(2.5),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip archive", "before PyTorch 1.6"])
def test_values_are_those_of_torch(tmp_path: Path, zipped: bool) -> None:
    torch.save(some_tensors(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert_reads_as_torch_does(tmp_path / "x.bin")


def test_a_view_that_is_not_in_one_piece(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    torch.save({"turned": matrix.T, "column": matrix[:, 1], "whole": matrix}, tmp_path / "x.bin")
    assert_reads_as_torch_does(tmp_path / "x.bin")


def test_reading_maps_nothing(tmp_path: Path) -> None:
    """Pages of a mapped file would count as memory of the process: a 7B model's conversion would show 14 GB."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process has mapped")
    torch.save(some_tensors(), tmp_path / "mapped-or-not.bin")
    entries = open_file(tmp_path / "mapped-or-not.bin")
    tensors = [entry.read() for entry in entries.values()]
    assert len(tensors) == len(entries)
    assert "mapped-or-not.bin" not in maps.read_text()


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(10_000)}, file)
    entry = open_file(file)["a"]
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"x\.bin: cut short while reading a"):
        entry.read()
