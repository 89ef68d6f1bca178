"""Several samples in one sequence: samples of one image share their beginning, others follow one another.

The tokens up to and with the image are the same for every question about it, and with 1,296 image tokens they are nine
tenths of a sample. A document is that prefix once, then one branch for each sample. A branch sees the prefix and itself,
and its positions go on from the prefix's, so every token sees just what it would see alone: the same loss, the same
gradients. Documents in one row do not see each other, and their positions start at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geochat.data.encode import IGNORE_INDEX
from geochat.train.collate import Collator, pad_right

PADDING = -1
"""Document number of padding."""


@dataclass(frozen=True)
class Document:
    """One prefix and its branches; every array is int32[n]."""

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    """0: the prefix, which all branches see; 1, 2, …: the samples."""
    pixels: Tensor | None
    """float32[images, 3, side, side]"""

    def __len__(self) -> int:
        return len(self.input_ids)


class PackingCollator(Collator):
    """Samples → rows of documents.

    Returns what `Collator` does, over rows, and where a row holds more than one sample `"position_ids"`,
    `"documents"` and `"branches"`, int64[rows, n] each; see `allowed`.

    share: samples of the same image become one document. pack: documents fill up rows: of the longest document's
    length, or all in one row (`one_row`, for attention whose cost does not grow with the masked part).
    budget: most tokens, padding included, that are computed at once. The batch is then `{"parts": list of batches as
    above, "labels": the supervised tokens of all of them, behind one that is none}`; a document that is longer by itself
    is a part by itself.
    """

    def __init__(
        self,
        pad_token_id: int,
        image_token_id: int,
        *,
        share: bool = True,
        pack: bool = False,
        one_row: bool = False,
        budget: int | None = None,
    ) -> None:
        super().__init__(pad_token_id)
        self.image_token_id, self.share, self.pack, self.one_row = image_token_id, share, pack, one_row
        self.budget = budget

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        if any("input_ids" not in sample for sample in samples):
            return super().__call__(samples)
        documents = [
            document
            for group in (same_image(samples) if self.share else [[sample] for sample in samples])
            for document in join(group, self.image_token_id)
        ]
        bad = [reason for sample in samples for reason in sample.get("bad_samples", ())]
        batch: dict[str, Any]
        if self.budget is None:
            batch = self._rows(documents)
        else:
            parts = [self._rows(part) for part in within(documents, self.budget)]
            first = torch.tensor([IGNORE_INDEX])  # transformers leaves the first label out when it counts
            batch = {"parts": parts, "labels": torch.cat([first, *(_supervised(part) for part in parts)])}
        batch["sources"] = [sample["source"] for sample in samples]
        return {**batch, "bad_samples": bad} if bad else batch

    def _rows(self, documents: list[Document]) -> dict[str, Any]:
        """One batch of these documents."""
        rows = [[document] for document in documents]
        if self.pack:
            longest = max(map(len, documents))
            rows = fill(documents, sum(map(len, documents)) if self.one_row else longest)
        batch: dict[str, Any] = {
            "input_ids": _rows(rows, lambda d: d.input_ids, self.pad_token_id),
            "labels": _rows(rows, lambda d: d.labels, IGNORE_INDEX),
        }
        pixels = [document.pixels for row in rows for document in row if document.pixels is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if all(len(row) == 1 and row[0].branches.max() <= 1 for row in rows):
            return batch  # nothing to keep apart: plain causal attention is faster
        numbers = [np.repeat(np.arange(len(row)), [len(document) for document in row]) for row in rows]
        return {
            **batch,
            "position_ids": _rows(rows, lambda d: d.positions, 0),
            "branches": _rows(rows, lambda d: d.branches, 0),
            "documents": pad_right(numbers, PADDING),
        }


def allowed(documents: Tensor, branches: Tensor) -> Tensor:
    """Who sees whom: bool[rows, 1, n (sees), n (is seen)] for int[rows, n] documents and branches.

    Padding sees the padding before it, so that no row of the attention is empty.
    """
    n = documents.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=documents.device).tril()
    same = documents[:, :, None] == documents[:, None, :]
    prefix = (branches == 0)[:, None, :]
    branch = branches[:, :, None] == branches[:, None, :]
    return (causal & same & (prefix | branch))[:, None]


def attention_mask(documents: Tensor, branches: Tensor, implementation: str, dtype: torch.dtype) -> Any:
    """`allowed` as the attention implementation of that name takes it.

    Flash attention takes no mask: transformers reads from the positions where a document begins. That keeps documents
    apart, but not branches.
    """
    if implementation.startswith("flash"):
        return None
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = documents[row, query] == documents[row, key]
            branch = (branches[row, key] == 0) | (branches[row, query] == branches[row, key])
            return (query >= key) & same & branch

        rows, n = documents.shape
        return create_block_mask(sees, rows, None, n, n, device=str(documents.device))
    mask = allowed(documents, branches)
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )
    return mask


def same_image(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The samples by their images, in order of first appearance; those without an image each on their own."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.get("images") or number, []).append(sample)
    return list(groups.values())


def join(samples: list[dict[str, Any]], image_token_id: int) -> list[Document]:
    """One document of samples with the same images, or one for each where their texts before the image differ."""
    prefix = shared_prefix(samples) if len(samples) > 1 else 0
    images = [np.flatnonzero(sample["input_ids"] == image_token_id) for sample in samples]
    if len(samples) > 1 and any(len(places) == 0 or places[-1] >= prefix for places in images):
        return [document for sample in samples for document in join([sample], image_token_id)]
    head = samples[0]
    ids, labels = [head["input_ids"][:prefix]], [head["labels"][:prefix]]
    positions, branches = [np.arange(prefix)], [np.zeros(prefix, dtype=np.int32)]
    for number, sample in enumerate(samples, 1):
        n = len(sample["input_ids"])
        ids.append(sample["input_ids"][prefix:])
        labels.append(sample["labels"][prefix:])
        positions.append(np.arange(prefix, n))
        branches.append(np.full(n - prefix, number, dtype=np.int32))
    document = Document(
        np.concatenate(ids),
        np.concatenate(labels),
        np.concatenate(positions),
        np.concatenate(branches),
        head.get("pixels"),
    )
    return [document]


def shared_prefix(samples: list[dict[str, Any]]) -> int:
    """Tokens that all samples begin with, and that are nobody's target.

    At least one token without a target is left to each branch: what the prefix's last token predicts is then never asked.
    """
    shortest = min(int(np.argmax(np.append(sample["labels"], 0) != IGNORE_INDEX)) for sample in samples)
    rows = np.stack([sample["input_ids"][: max(shortest - 1, 0)] for sample in samples])
    differs = (rows != rows[0]).any(0)
    return int(np.argmax(differs)) if differs.any() else rows.shape[1]


def fill(documents: list[Document], capacity: int) -> list[list[Document]]:
    """Rows of at most `capacity` tokens, the longest documents first (first-fit decreasing)."""
    rows: list[list[Document]] = []
    free: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        place = next((row for row, room in enumerate(free) if room >= len(document)), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(capacity)
        rows[place].append(document)
        free[place] -= len(document)
    return rows


def within(documents: list[Document], budget: int) -> list[list[Document]]:
    """Parts whose rows, padded to their longest, hold at most `budget` tokens; similar lengths together."""
    parts: list[list[Document]] = []
    for document in sorted(documents, key=len, reverse=True):  # the first of a part is its longest
        if parts and len(parts[-1][0]) * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(document)
        else:
            parts.append([document])
    return parts


def nothing(device: torch.device) -> dict[str, Tensor]:
    """A part without targets: what a process computes while others still have parts."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}


def _supervised(batch: dict[str, Any]) -> Tensor:
    return batch["labels"][batch["labels"] != IGNORE_INDEX]


def _rows(rows: list[list[Document]], part: Callable[[Document], np.ndarray], padding: int) -> Tensor:
    return pad_right([np.concatenate([part(document) for document in row]) for row in rows], padding)
