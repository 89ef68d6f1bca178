"""Samples → one batch, padded on the right."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from geochat.data.encode import IGNORE_INDEX


class Collator:
    """Pads to the longest sample of the batch.

    Returns `{"input_ids": int64[batch, n], "labels": int64[batch, n]}`, plus `"pixel_values":
    float32[images, 3, side, side]` when any sample has images (in the order of the placeholders),
    `"sources": list[str]` (where each sample is from) and `"bad_samples": list[str]` when any row was unusable. There is
    no attention mask: with causal attention a supervised token never sees the padding on its right, and without a mask
    the fast causal kernels apply.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        bad = [reason for sample in samples for reason in sample.get("bad_samples", ())]
        if any("input_ids" not in sample for sample in samples):
            return {"bad_samples": bad}
        batch: dict[str, Any] = {
            "input_ids": pad_right([sample["input_ids"] for sample in samples], self.pad_token_id),
            "labels": pad_right([sample["labels"] for sample in samples], IGNORE_INDEX),
            "sources": [sample["source"] for sample in samples],
        }
        pixels = [sample["pixels"] for sample in samples if "pixels" in sample]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if bad:
            batch["bad_samples"] = bad
        return batch


def pad_right(rows: list[np.ndarray], value: int) -> torch.Tensor:
    """Rows int[n_i] → int64[len(rows), max n_i]."""
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for line, row in zip(padded, rows):
        line[: len(row)] = row
    return torch.from_numpy(padded)
