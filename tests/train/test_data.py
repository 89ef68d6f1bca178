"""Samples and batches: layout, and what becomes of rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from geochat.data.encode import IGNORE_INDEX
from geochat.data.store import InstructionStore
from geochat.model.build import build_model
from geochat.train.collate import Collator
from geochat.train.dataset import BadSampleError, InstructionDataset


@pytest.fixture(scope="module")
def processor(tiny_llm: Path, tiny_clip: Path):
    return build_model(tiny_llm, tiny_clip, None, image_size=84, dtype=torch.float32)[1]


def with_rows(records: list[dict], folder: Path) -> InstructionStore:
    file = folder / "rows.json"
    file.write_text(json.dumps(records))
    return InstructionStore(file)


def test_an_item_has_pixels_and_expanded_placeholders(processor, tiny_records) -> None:
    dataset = InstructionDataset(InstructionStore(tiny_records.file), tiny_records.image_folder, processor)
    item = dataset[0]
    assert item["pixels"].shape == (1, 3, 84, 84)
    assert int((item["input_ids"] == processor.image_token_id).sum()) == 36
    assert len(item["input_ids"]) == len(item["labels"])
    assert "pixels" not in dataset[7]


def test_a_batch_is_padded_on_the_right(processor, tiny_records) -> None:
    dataset = InstructionDataset(InstructionStore(tiny_records.file), tiny_records.image_folder, processor)
    batch = Collator(processor.pad_token_id)([dataset[0], dataset[7], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 84, 84)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    length = len(dataset[7]["input_ids"])
    assert set(batch["input_ids"][1, length:].tolist()) == {processor.pad_token_id}
    assert set(batch["labels"][1, length:].tolist()) == {IGNORE_INDEX}
    assert "attention_mask" not in batch


def bad_rows(tiny_records, folder: Path) -> tuple[list[dict], list[str]]:
    """Rows of every kind that cannot be used, each followed by a good one, and the reason expected for each."""
    images = folder / "images"
    images.mkdir()
    for file in tiny_records.image_folder.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    (images / "cut.jpg").write_bytes((tiny_records.image_folder / "wide.jpg").read_bytes()[:500])
    (images / "empty.png").write_bytes(b"")
    good = tiny_records.records[0]
    question, answer = good["conversations"]
    rows = [
        ({**good, "image": "absent.png"}, "absent.png"),
        ({**good, "image": "cut.jpg"}, "cut.jpg"),
        ({**good, "image": "empty.png"}, "empty.png"),
        ({**good, "conversations": [question]}, "row"),
        ({**good, "conversations": [question, {**answer, "value": ""}]}, "supervised"),
        (
            {**good, "conversations": [{**question, "value": "<image>\n" + "ship " * 3000}, answer]},
            "text tokens",
        ),
    ]
    return [row for bad, _ in rows for row in (bad, good)], [reason for _, reason in rows]


def test_bad_rows_are_named_and_replaced(processor, tiny_records, tmp_path: Path) -> None:
    records, expected = bad_rows(tiny_records, tmp_path)
    store = with_rows(records, tmp_path)
    dataset = InstructionDataset(store, tmp_path / "images", processor, on_bad_sample="skip")
    for i, reason in enumerate(expected):
        item = dataset[2 * i]
        assert np.array_equal(item["input_ids"], dataset[2 * i + 1]["input_ids"])
        assert len(item["bad_samples"]) == 1
        assert reason in item["bad_samples"][0]
        assert "rows.json" in item["bad_samples"][0]
    batch = Collator(processor.pad_token_id)([dataset[0], dataset[1]])
    assert len(batch["bad_samples"]) == 1
    assert len(batch["input_ids"]) == 2


def test_bad_rows_are_fatal_on_request(processor, tiny_records, tmp_path: Path) -> None:
    records, expected = bad_rows(tiny_records, tmp_path)
    dataset = InstructionDataset(with_rows(records, tmp_path), tmp_path / "images", processor)
    assert set(dataset[0]) == {"bad_samples"}
    for i, reason in enumerate(expected):
        with pytest.raises(BadSampleError, match=reason):
            dataset.read(2 * i)
    assert set(Collator(0)([dataset[1], dataset[0]])) == {"bad_samples"}


def test_long_text_is_cut_on_request(processor, tiny_records, tmp_path: Path) -> None:
    question, _ = tiny_records.records[0]["conversations"]
    long = [question, {"from": "gpt", "value": "ship " * 3000}]
    store = with_rows([{**tiny_records.records[0], "conversations": long}], tmp_path)
    dataset = InstructionDataset(
        store, tiny_records.image_folder, processor, max_text_tokens=200, truncate=True
    )
    assert len(dataset[0]["input_ids"]) == 200 + 35


def test_a_folder_of_nothing_but_bad_rows_ends(processor, tiny_records, tmp_path: Path) -> None:
    dataset = InstructionDataset(
        with_rows(tiny_records.records[:7], tmp_path), tmp_path, processor, on_bad_sample="skip"
    )
    assert set(dataset[0]) == {"bad_samples"}
