"""Instruction file → token ids, labels and pixels of one sample."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

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

    An item is `{"input_ids": int32[n], "labels": int32[n], "source": "file:row", "pixels": float32[images, 3, side,
    side], "images": tuple[str]}`, without the last two for a text. A record
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
        self._last: tuple[str, torch.Tensor] | None = None

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
            pixels = [self._pixels(name) for name in sample.images]
        except (ValueError, OSError) as error:
            reason = str(error)
            raise BadSampleError(reason if where in reason else f"{where}: {reason}") from error
        item: dict[str, Any] = {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "source": where,
        }
        if pixels:
            item["pixels"] = torch.stack(pixels)
            item["images"] = tuple(sample.images)
        return item

    def lengths(self) -> np.ndarray:
        """Rough length in words of every row, negative for rows without an image; 0 for a malformed row.

        Words stand in for tokens, as in LLaVA: grouping needs an order, not a count, and tokenising a large file
        for it would take minutes.
        """
        return self._walked[0]

    def images(self) -> np.ndarray:
        """Number of every row's image (or images together): the same number, the same image; -1 without one."""
        return self._walked[1]

    @cached_property
    def _walked(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.zeros(len(self), dtype=np.int32)
        images = np.full(len(self), -1, dtype=np.int32)
        numbers: dict[tuple[str, ...], int] = {}
        rows = tqdm(range(len(self)), desc="records", unit=" rows", disable=None, leave=False, delay=5)
        for index in rows:
            try:
                sample = Sample.from_record(self.store[index], "record")
            except ValueError:
                continue  # named when its turn comes
            words = sum(len(turn.text.split()) for turn in sample.turns)
            lengths[index] = words if sample.images else -words
            if sample.images:
                images[index] = numbers.setdefault(tuple(sample.images), len(numbers))
        return lengths, images

    def _pixels(self, name: str) -> torch.Tensor:
        """float32[3, side, side]; samples that follow one another often ask about the same image."""
        if self._last is None or self._last[0] != name:
            self._last = name, self.processor.pixels(open_image(self._image_path(name)))
        return self._last[1]

    def _image_path(self, name: str) -> Path:
        if self.image_folder is None:
            raise ValueError(f"image {name}: no --image_folder was given")
        return self.image_folder / name
