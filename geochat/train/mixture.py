"""Several instruction files as one dataset, and the part of it that is held out for validation.

The files stay where they are and rows are read when they are asked for; what is kept is a number for each sample of an
epoch. Numbers, weights and the split follow from the files and the seed alone, so every process has the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from geochat.data.mixture import Source, describe, read_sources
from geochat.data.store import InstructionStore
from geochat.model.processor import Processor
from geochat.train.arguments import DataArguments, TrainingArguments
from geochat.train.dataset import InstructionDataset, first_usable


class Walk(NamedTuple):
    """What is known of every row without encoding it."""

    lengths: np.ndarray
    """int32[rows]: words, negative for a text without an image; 0 for a malformed row. Words stand in for tokens, as in
    LLaVA: grouping needs an order, not a count."""
    images: np.ndarray
    """int32[rows]: the same number, the same image (or images together); -1 without one."""
    families: np.ndarray
    """int32[rows]: rows that share a picture, directly or through others, have one number; so has each text."""


class Library:
    """The rows of several instruction files, numbered through."""

    def __init__(self, sources: Sequence[Source], datasets: Sequence[InstructionDataset]) -> None:
        self.sources, self.datasets = list(sources), list(datasets)
        self.starts = np.cumsum([0, *map(len, datasets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def files(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the files each row is from."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def find(self, number: int) -> tuple[InstructionDataset, int]:
        """The file that a row is from, and its place there."""
        file = int(self.files(np.array(number)))
        return self.datasets[file], number - int(self.starts[file])

    @cached_property
    def walk(self) -> Walk:
        lengths = np.zeros(len(self), dtype=np.int32)
        images = np.full(len(self), -1, dtype=np.int32)
        known: dict[tuple[str, ...], int] = {}
        rows = tqdm(range(len(self)), desc="records", unit=" rows", disable=None, leave=False, delay=5)
        for number in rows:
            dataset, row = self.find(number)
            try:
                sample = dataset.sample(row)
            except ValueError:
                continue  # named when its turn comes
            words = sum(len(turn.text.split()) for turn in sample.turns)
            lengths[number] = words if sample.images else -words
            if sample.images:
                images[number] = known.setdefault(dataset.pictures(sample), len(known))
        families = len(known) + np.arange(len(self), dtype=np.int32)
        families[images >= 0] = _families(known)[images[images >= 0]]
        return Walk(lengths, images, families)

    def held_out(self, share: float, seed: int) -> np.ndarray:
        """bool[rows]: whole families, drawn at random until they have this share of the rows.

        Raises: ValueError when nothing would be left on one side.
        """
        families, sizes = np.unique(self.walk.families, return_counts=True)
        order = np.random.default_rng([seed, len(self)]).permutation(len(families))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = families[order[before < share * len(self)]]
        mask = np.isin(self.walk.families, chosen)
        if mask.all() or not mask.any():
            raise ValueError(
                f"--val_share {share:g} of {len(self)} rows about {len(families)} pictures leaves nothing to "
                f"{'train on' if mask.any() else 'validate on'}"
            )
        return mask


class Mixture(Dataset):
    """The samples of an epoch: rows of a library, some of them more than once."""

    def __init__(self, library: Library, rows: np.ndarray) -> None:
        """rows: int[samples], numbers of the library."""
        self.library, self.rows = library, rows

    @classmethod
    def draw(cls, library: Library, seed: int, rows: np.ndarray | None = None) -> Mixture:
        """Each file's share of `rows` (default: all) as often as its weight says."""
        rows = np.arange(len(library)) if rows is None else rows
        files = library.files(rows)
        drawn = [
            source.draw(rows[files == number], np.random.default_rng([seed, number]))
            for number, source in enumerate(library.sources)
        ]
        mixture = cls(library, np.concatenate(drawn))
        if not len(mixture):
            raise ValueError(f"{library.sources[0].entry}: its weight leaves no sample of {len(rows)} rows")
        return mixture

    @property
    def processor(self) -> Processor:
        return self.library.datasets[0].processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return first_usable(self, index, self.library.datasets[0].on_bad_sample)

    def read(self, index: int) -> dict[str, Any]:
        dataset, row = self.find(index)
        return dataset.read(row)

    def encode(self, index: int) -> dict[str, Any]:
        dataset, row = self.find(index)
        return dataset.encode(row)

    def find(self, index: int) -> tuple[InstructionDataset, int]:
        """The file that a sample is from, and its row there."""
        return self.library.find(int(self.rows[index]))

    def lengths(self) -> np.ndarray:
        """int[samples], see `Walk`."""
        return self.library.walk.lengths[self.rows]

    def images(self) -> np.ndarray:
        """int[samples], see `Walk`; a row that is seen again counts as being about another image, so that the two do
        not meet."""
        order = np.argsort(self.rows, kind="stable")
        placed = self.rows[order]
        again = np.empty_like(order)
        again[order] = np.arange(len(order)) - np.searchsorted(placed, placed)
        numbers = self.library.walk.images[self.rows].astype(np.int64)
        return np.where(numbers < 0, -1, numbers + again * len(self.library))

    def describe(self) -> list[tuple[str, str]]:
        """Name and share of each file, where there are several or one is not drawn as it is."""
        if len(self.library.sources) == 1 and len(self) == len(self.library):
            return []
        files = self.library.files(self.rows)
        samples = np.bincount(files, minlength=len(self.library.sources)).tolist()
        return describe(self.library.sources, [len(part) for part in self.library.datasets], samples)


def open_library(
    sources: Sequence[Source],
    processor: Processor,
    data_args: DataArguments,
    args: TrainingArguments,
) -> Library:
    """Raises: ValueError when a file is malformed as a whole, or empty."""
    datasets = []
    for source in sources:
        datasets.append(
            InstructionDataset(
                InstructionStore(source.path),
                source.image_folder,
                processor,
                max_text_tokens=args.model_max_length,
                truncate=data_args.truncate_text,
                on_bad_sample=data_args.on_bad_sample,
            )
        )
        if not len(datasets[-1]):
            raise ValueError(f"{source.path}: no records")
    return Library(sources, datasets)


def open_sets(
    processor: Processor, data_args: DataArguments, args: TrainingArguments, *, look_for_images: bool = True
) -> tuple[Mixture, Mixture | None]:
    """The samples to train on, and those to validate on where the flags ask for any.

    Raises: ValueError, naming flag or file, for what cannot be used.
    """
    folders = data_args.image_folder or []
    sources = read_sources(data_args.data_path or [], folders, data_args.data_weights or [])
    others = _validation_sources(data_args.eval_data_path, folders) if data_args.eval_data_path else []
    for source in [*sources, *others] if look_for_images else []:
        source.require_images()
    library = open_library(sources, processor, data_args, args)
    if others:
        held_out = Mixture.draw(open_library(others, processor, data_args, args), args.order_seed)
        return Mixture.draw(library, args.order_seed), held_out
    if data_args.val_share is None:
        return Mixture.draw(library, args.order_seed), None
    mask = library.held_out(data_args.val_share, args.order_seed)
    training = Mixture.draw(library, args.order_seed, np.flatnonzero(~mask))
    return training, Mixture(library, np.flatnonzero(mask))


def _validation_sources(path: str, folders: list[str]) -> list[Source]:
    sources = read_sources([path], folders if len(folders) == 1 else [])
    if len(folders) > 1 and any(source.image_folder is None for source in sources):
        raise ValueError(
            f"--eval_data_path {path}: of several --image_folder none is known to be its own; name it in a mixture file"
        )
    return sources


def _families(known: dict[tuple[str, ...], int]) -> np.ndarray:
    """int32[numbers]: the smallest number among those that share a picture, directly or through others."""
    parents = list(range(len(known)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    owners: dict[str, int] = {}
    for pictures, number in known.items():
        for picture in pictures:
            first, second = sorted((root(number), root(owners.setdefault(picture, number))))
            parents[second] = first
    return np.array([root(number) for number in parents], dtype=np.int32)
