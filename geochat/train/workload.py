"""What the batches of a run hold, laid out by training's own sampler, encoder and collator, without images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from geochat.data.encode import IGNORE_INDEX
from geochat.data.sample import Sample
from geochat.train.collate import Collator
from geochat.train.dataset import MAX_SUBSTITUTES, InstructionDataset
from geochat.train.flops import Load


@dataclass(frozen=True)
class Layout:
    """How the rows of a file become micro-batches."""

    micro_batch: int
    processes: int
    accumulation: int
    drop_last: bool = False

    def micro_batches(self, rows: int) -> int:
        """Of one epoch, over all processes, as accelerate's BatchSamplerShard deals them out."""
        if self.drop_last:
            return rows // self.micro_batch // self.processes * self.processes
        each = -(-rows // (self.micro_batch * self.processes))
        return each * self.processes if self.processes > 1 else -(-rows // self.micro_batch)

    def steps(self, rows: int) -> int:
        """Optimizer steps of one epoch; the last may gather fewer micro-batches."""
        each = self.micro_batches(rows) // self.processes
        return max(-(-each // self.accumulation), 1)

    def dealt(self, order: np.ndarray) -> list[np.ndarray]:
        """The epoch's micro-batches. With several processes the last ones are filled from the epoch's start, so that
        all have as many; one process alone takes the short rest."""
        count, m = self.micro_batches(len(order)), self.micro_batch
        if self.processes > 1 and not self.drop_last:
            order = np.resize(order, count * m)  # repeats from the start
        return [order[i * m : (i + 1) * m] for i in range(count)]

    def ending(self, rows: int) -> str:
        """What becomes of the samples that fill no whole batch."""
        m, n, count = self.micro_batch, self.processes, self.micro_batches(rows)
        if self.drop_last:
            over = rows - count * m
            return f"{over} samples of each epoch are left out" if over else "nothing is left over"
        parts = []
        if n > 1 and (repeated := count * m - rows):
            parts.append(
                f"{repeated} samples of the epoch's start are taken twice to fill the last micro-batches"
            )
        elif n == 1 and rows % m:
            parts.append(f"the last micro-batch has {rows % m} samples instead of {m}")
        if last := count // n % self.accumulation:
            parts.append(f"the epoch's last step gathers {last} micro-batches instead of {self.accumulation}")
        return "; ".join(parts) or "nothing is left over"


@dataclass(frozen=True)
class Tokens:
    """Of the rows that were read, image placeholders apart."""

    text: int
    image: int
    supervised: int
    images: int
    longest: int
    """Positions of the longest sample."""
    most_supervised: int
    most_images: int


@dataclass(frozen=True)
class Batches:
    """Micro-batches of the first epoch: all, or some spread evenly over it."""

    of: int
    """Micro-batches of the epoch, over all processes."""
    laid_out: int
    """Micro-batches that were looked at; the rest is about them."""
    loads: list[Load]
    """What is computed at once: the micro-batches, or with `--max_tokens_per_micro_batch` their parts."""
    samples: int
    real: int
    """Positions that are no padding."""

    @property
    def positions(self) -> int:
        return sum(load.rows * load.length for load in self.loads)

    @property
    def padding(self) -> float:
        """Share of all positions."""
        return 1 - self.real / self.positions


@dataclass
class Reader:
    """Rows as training encodes them, pixels aside."""

    dataset: InstructionDataset
    bad: dict[int, str] = field(default_factory=dict)
    """Rows that could not be used, with the reason."""
    counts: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Row → its positions, targets and images."""

    def items(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """The rows that can be used; in the place of a bad one the next usable row, as `--on_bad_sample skip`."""
        return [item for row in rows if (item := self._usable(row)) is not None]

    def _usable(self, row: int) -> dict[str, Any] | None:
        for step in range(MAX_SUBSTITUTES):
            item = self._item((row + step) % len(self.dataset))
            if item is not None:
                return item
        return None

    def _item(self, row: int) -> dict[str, Any] | None:
        if row in self.bad:
            return None
        where = self.dataset.store.where(row)
        try:
            sample = Sample.from_record(self.dataset.store[row], where)
            encoded = self.dataset.encoder.encode(sample, where)
        except ValueError as error:
            self.bad[row] = str(error)
            return None
        targets = int((encoded.labels != IGNORE_INDEX).sum())
        self.counts[row] = len(encoded.input_ids), targets, len(sample.images)
        item: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels, "source": where}
        if sample.images:  # pixels without a size: the collator only counts them here
            item |= {"pixels": torch.empty(len(sample.images), 0), "images": tuple(sample.images)}
        return item

    def tokens(self, image_tokens: int) -> Tokens:
        """Over all rows encoded so far."""
        lengths, targets, images = (list(column) for column in zip(*self.counts.values(), strict=True))
        return Tokens(
            text=sum(lengths) - sum(images) * image_tokens,
            image=sum(images) * image_tokens,
            supervised=sum(targets),
            images=sum(images),
            longest=max(lengths),
            most_supervised=max(targets),
            most_images=max(images),
        )


def lay_out(
    order: np.ndarray, layout: Layout, reader: Reader, collate: Collator, most_rows: int, *, masked: bool
) -> Batches:
    """The micro-batches of an epoch in this order, at most `most_rows` rows of them (0: all).

    masked: rows of several samples need a mask that the attention multiplies in full.
    Raises: ValueError when no row can be used.
    """
    dealt = layout.dealt(order)
    if not dealt:
        raise ValueError(
            f"{len(order)} samples fill no micro-batch for each process, and the last is dropped"
        )
    count = len(dealt)
    if 0 < most_rows < len(order):
        count = min(count, max(1, most_rows // layout.micro_batch))
    chosen = np.unique(np.linspace(0, len(dealt) - 1, count).round().astype(int))
    loads, samples, real = [], 0, 0
    for index in tqdm(chosen, desc="tokens", unit=" micro-batches", disable=None, leave=False, delay=2):
        items = reader.items(dealt[index].tolist())
        if not items:
            reason = next(iter(reader.bad.values()))
            raise ValueError(f"no usable row was found among {len(reader.bad)}, the first: {reason}")
        batch = collate(items)
        for part in batch.get("parts") or [batch]:
            loads.append(load_of(part, masked))
            real += _real(part, collate.pad_token_id)
        samples += len(items)
    return Batches(len(dealt), len(chosen), loads, samples, real)


def load_of(batch: dict[str, Any], masked: bool) -> Load:
    """What one batch, or a part of one, asks of the model; masked: as for `lay_out`."""
    rows, length = batch["input_ids"].shape
    pictures = len(batch["pixel_values"]) if "pixel_values" in batch else 1  # an empty one stands in
    targets = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    return Load(rows, length, pictures, targets, causal=not (masked and "documents" in batch))


def _real(batch: dict[str, Any], pad_token_id: int) -> int:
    """Positions that are no padding."""
    if "documents" in batch:
        return int((batch["documents"] >= 0).sum())
    return int((batch["input_ids"] != pad_token_id).sum())
