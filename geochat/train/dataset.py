"""Instruction file → token ids, labels and pixels of one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from geochat.data.images import open_image
from geochat.data.sample import Sample
from geochat.data.store import InstructionStore
from geochat.model.processor import Processor

MAX_SUBSTITUTES = 64
"""So many unusable rows in a run are no accident: the image folder is wrong, or the file is."""


class BadSampleError(ValueError):
    """A record that cannot be trained on; the message names file, row and reason."""


class InstructionDataset(Dataset):
    """Map-style dataset over an instruction file.

    An item is `{"input_ids": int32[n], "labels": int32[n], "pixels": float32[images, 3, side, side]}`. A record
    that cannot be used is never blanked: with `on_bad_sample="skip"` the following usable row takes its place and
    the item carries the reasons under `"bad_samples"`; with `"error"` the item holds nothing but them. The reasons
    travel with the batch, so that the main process counts what its workers met.
    """

    def __init__(
        self,
        store: InstructionStore,
        image_folder: Path | None,
        processor: Processor,
        *,
        max_text_tokens: int = 2048,
        truncate: bool = False,
        on_bad_sample: Literal["skip", "error"] = "error",
    ) -> None:
        self.store = store
        self.image_folder = image_folder
        self.processor = processor
        self.on_bad_sample = on_bad_sample
        self.encoder = processor.encoder(max_text_tokens, truncate)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        reasons: list[str] = []
        for step in range(MAX_SUBSTITUTES if self.on_bad_sample == "skip" else 1):
            try:
                item = self.read((index + step) % len(self))
            except BadSampleError as error:
                reasons.append(str(error))
                continue
            return {**item, "bad_samples": reasons} if reasons else item
        return {"bad_samples": reasons}

    def read(self, index: int) -> dict[str, Any]:
        """Raises: BadSampleError naming file and row."""
        where = self.store.where(index)
        try:
            sample = Sample.from_record(self.store[index], where)
            encoded = self.encoder.encode(sample, where)
            pixels = [self.processor.pixels(open_image(self._image_path(name))) for name in sample.images]
        except (ValueError, OSError) as error:
            reason = str(error)
            raise BadSampleError(reason if where in reason else f"{where}: {reason}") from error
        item: dict[str, Any] = {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
        }
        if pixels:
            item["pixels"] = torch.stack(pixels)
        return item

    def lengths(self) -> np.ndarray:
        """Rough length in words of every row, negative for rows without an image; 0 for a malformed row.

        Words stand in for tokens, as in LLaVA: grouping needs an order, not a count, and tokenising a large file
        for it would take minutes.
        """
        lengths = np.zeros(len(self), dtype=np.int32)
        for index in range(len(self)):
            try:
                sample = Sample.from_record(self.store[index], "record")
            except ValueError:
                continue  # named when its turn comes
            words = sum(len(turn.text.split()) for turn in sample.turns)
            lengths[index] = words if sample.images else -words
        return lengths

    def _image_path(self, name: str) -> Path:
        if self.image_folder is None:
            raise ValueError(f"image {name}: no --image_folder was given")
        return self.image_folder / name
