"""The order of samples: shuffled per epoch, optionally in batches of similar length and one modality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from geochat.train.arguments import TrainingArguments
    from geochat.train.mixture import Mixture

POOL_BATCHES = 50
"""Batches sorted together: enough to make neighbours similar, few enough to keep the order random."""


class EpochSampler(Sampler[int]):
    """All indices in an order that a resumed run sees again: it depends on seed and epoch alone, and where samples are
    grouped on the batch, whatever the number of processes.

    lengths: words per sample, negative without an image (Mixture.lengths); None shuffles only.
    batch: samples that one optimizer step takes over all processes.
    images: number of each sample's image, -1 without one (Mixture.images): samples of an image then come in
        the same micro-batch of one process.
    micro_batch: samples that one micro-step takes in one process; needed with `images`.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        batch: int,
        lengths: np.ndarray | None = None,
        images: np.ndarray | None = None,
        micro_batch: int = 1,
    ) -> None:
        self.size = size
        self.seed = seed
        self.batch = batch
        self.lengths = lengths
        self.images = images
        self.micro_batch = micro_batch
        self.epoch = 0

    @classmethod
    def of(cls, dataset: Mixture, args: TrainingArguments, *, grouped: bool) -> EpochSampler:
        """As the flags ask for, but for `grouped`: batches of similar length or not."""
        return cls(
            len(dataset),
            seed=args.order_seed,
            batch=args.samples_per_step,
            lengths=dataset.lengths() if grouped else None,
            images=dataset.images() if args.share_image_prefix else None,
            micro_batch=args.per_device_train_batch_size,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.size)
        if self.images is not None:
            order = by_image(order, self.images, self.lengths, self.batch, self.micro_batch, random)
        elif self.lengths is not None:
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


def by_image(
    order: np.ndarray,
    images: np.ndarray,
    lengths: np.ndarray | None,
    batch: int,
    micro_batch: int,
    random: np.random.Generator,
) -> np.ndarray:
    """A permutation of `order` in which the samples of an image stand in one micro-batch.

    An image with more samples than a micro-batch holds is spread over several, and so are some where the numbers do not
    fit together. Images are taken in the order in which `order` first names them, POOL_BATCHES batches at a time, in
    which (where `lengths` are given) those of similar length share a micro-batch and similar micro-batches a batch;
    texts without an image keep to themselves. Batches are then shuffled: which samples meet is all that differs from a
    random order.
    """
    whole: list[np.ndarray] = []  # of all processes
    single: list[np.ndarray] = []  # micro-batches that make no whole batch
    rest: list[np.ndarray] = []  # of images and of texts, less than a micro-batch each
    for texts in (False, True):
        left: list[np.ndarray] = []
        for pool in _pools(
            _groups(order[(images[order] < 0) == texts], images, micro_batch), batch * POOL_BATCHES
        ):
            full, left = _filled([*left, *pool], lengths, micro_batch)
            each = batch // micro_batch
            units = [np.concatenate(full[i : i + each]) for i in range(0, len(full) - each + 1, each)]
            whole += units
            single += full[len(units) * each :]
        rest += left
    shuffled = [
        *(whole[i] for i in random.permutation(len(whole))),
        *(single[i] for i in random.permutation(len(single))),
    ]
    return np.concatenate([*shuffled, *rest]) if shuffled or rest else order


def _pools(groups: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Consecutive groups with about `size` samples together."""
    pool: list[np.ndarray] = []
    held = 0
    for group in groups:
        pool.append(group)
        held += len(group)
        if held >= size:
            yield pool
            pool, held = [], 0
    if pool:
        yield pool


def _groups(order: np.ndarray, images: np.ndarray, most: int) -> list[np.ndarray]:
    """The samples of each image, at most `most` together, images in the order in which they are first named."""
    if not len(order):
        return []
    _, first, image = np.unique(images[order], return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    place = rank[image] if images[order[0]] >= 0 else np.arange(len(order))  # a text is a group of its own
    together = np.argsort(place, kind="stable")
    ends = np.flatnonzero(np.diff(place[together])) + 1
    return [
        group[start : start + most]
        for group in np.split(order[together], ends)
        for start in range(0, len(group), most)
    ]


def _filled(
    groups: list[np.ndarray], lengths: np.ndarray | None, micro_batch: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Whole micro-batches out of groups, and what is left, less than one. Groups are only cut where none would fit."""
    if lengths is not None:
        groups = sorted(groups, key=lambda group: int(np.abs(lengths[group]).sum()))  # a row holds them all
    full: list[np.ndarray] = []
    begun: list[list[np.ndarray]] = []
    room: list[int] = []
    for group in groups:
        place = next((i for i, free in enumerate(room) if free >= len(group)), None)
        if place is None:
            place = len(room)
            begun.append([])
            room.append(micro_batch)
        begun[place].append(group)
        room[place] -= len(group)
        if room[place] == 0:
            full.append(np.concatenate(begun.pop(place)))
            room.pop(place)
    if not begun:
        return full, []
    tail = np.concatenate([group for batch in begun for group in batch])
    whole = len(tail) - len(tail) % micro_batch
    full += np.split(tail[:whole], whole // micro_batch) if whole else []
    return full, [tail[whole:]] if whole < len(tail) else []
