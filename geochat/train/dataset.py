"""Instruction file → token ids, labels and pixels of one sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import Dataset

from geochat.data.images import open_image
from geochat.data.sample import Sample
from geochat.data.store import InstructionStore
from geochat.model.processor import Processor

if TYPE_CHECKING:
    from geochat.train.mixture import Mixture

MAX_SUBSTITUTES = 64
"""So many unusable rows in a run are no accident: the image folder is wrong, or the file is."""


class BadSampleError(ValueError):
    """A record that cannot be trained on; the message names file, row and reason."""


class InstructionDataset(Dataset):
    """Map-style dataset over an instruction file.

    An item is `{"input_ids": int32[n], "labels": int32[n], "source": "file:row", "images": tuple[str], "pixels":
    float32[images, 3, side, side]}`, without the last two for a text. A record that cannot be used is never blanked:
    with `on_bad_sample="skip"` the following usable row takes its place and the item carries the reasons under
    `"bad_samples"`; with `"error"` the item holds nothing but them. The reasons travel with the batch, so that the main
    process counts what its workers met.
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
        self.image_folder = image_folder.resolve() if image_folder else None
        self.processor = processor
        self.on_bad_sample = on_bad_sample
        self.encoder = processor.encoder(max_text_tokens, truncate)
        self._last: tuple[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return first_usable(self, index, self.on_bad_sample)

    def read(self, index: int) -> dict[str, Any]:
        """Raises: BadSampleError naming file and row."""
        item = self.encode(index)
        if "images" in item:
            try:
                item["pixels"] = torch.stack([self._pixels(picture) for picture in item["images"]])
            except (ValueError, OSError) as error:
                raise _bad(error, item["source"]) from error
        return item

    def encode(self, index: int) -> dict[str, Any]:
        """The item without its pixels. Raises: BadSampleError naming file and row."""
        where = self.store.where(index)
        try:
            sample = self.sample(index)
            encoded = self.encoder.encode(sample, where)
        except ValueError as error:
            raise _bad(error, where) from error
        item: dict[str, Any] = {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "source": where,
        }
        return {**item, "images": self.pictures(sample)} if sample.images else item

    def sample(self, index: int) -> Sample:
        """The record as it is read. Raises: ValueError naming file and row."""
        return Sample.from_record(self.store[index], self.store.where(index))

    def pictures(self, sample: Sample) -> tuple[str, ...]:
        """Paths of a sample's images, by which they are known to be the same."""
        folder = self.image_folder or Path()
        return tuple(str(folder / name) for name in sample.images)

    def _pixels(self, picture: str) -> torch.Tensor:
        """float32[3, side, side]; samples that follow one another often ask about the same image."""
        if self.image_folder is None:
            raise ValueError(f"image {picture}: no --image_folder was given")
        if self._last is None or self._last[0] != picture:
            self._last = picture, self.processor.pixels(open_image(Path(picture)))
        return self._last[1]


def first_usable(
    dataset: InstructionDataset | Mixture, index: int, on_bad_sample: Literal["skip", "error"]
) -> dict[str, Any]:
    """The item at `index`, or the next one that can be used, with the reasons against those before it."""
    reasons: list[str] = []
    for step in range(MAX_SUBSTITUTES if on_bad_sample == "skip" else 1):
        try:
            item = dataset.read((index + step) % len(dataset))
        except BadSampleError as error:
            reasons.append(str(error))
            continue
        return {**item, "bad_samples": reasons} if reasons else item
    return {"bad_samples": reasons}


def _bad(error: Exception, where: str) -> BadSampleError:
    reason = str(error)
    return BadSampleError(reason if where in reason else f"{where}: {reason}")
