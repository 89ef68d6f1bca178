"""The order of samples: shuffled per epoch, optionally in batches of similar length and one modality."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

POOL_BATCHES = 50
"""Batches sorted together: enough to make neighbours similar, few enough to keep the order random."""


class EpochSampler(Sampler[int]):
    """All indices in an order that depends on seed and epoch alone, so that a resumed run sees the same one.

    lengths: words per sample, negative without an image (InstructionDataset.lengths); None shuffles only.
    batch: samples that one micro-step takes over all processes.
    """

    def __init__(self, size: int, *, seed: int, batch: int, lengths: np.ndarray | None = None) -> None:
        self.size = size
        self.seed = seed
        self.batch = batch
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.size)
        if self.lengths is not None:
            order = grouped(order, self.lengths, self.batch, random)
        return iter(order.tolist())


def grouped(order: np.ndarray, lengths: np.ndarray, batch: int, random: np.random.Generator) -> np.ndarray:
    """A permutation of `order` whose consecutive batches hold one modality and similar lengths.

    Files with only images or only text are one group; samples left over by both groups share the last batches.
    """
    batches: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for group in (order[lengths[order] >= 0], order[lengths[order] < 0]):
        whole = len(group) - len(group) % batch
        rest.append(group[whole:])
        for start in range(0, whole, batch * POOL_BATCHES):
            pool = group[start : min(start + batch * POOL_BATCHES, whole)]
            pool = pool[np.argsort(np.abs(lengths[pool]), kind="stable")]
            batches += np.split(pool, len(pool) // batch)
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    return np.concatenate([*shuffled, *rest])
