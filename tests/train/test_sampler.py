"""Order of samples: a permutation, the same for the same seed and epoch, grouped when asked."""

from __future__ import annotations

import numpy as np
import pytest

from geochat.train.sampler import EpochSampler


def lengths_of(images: int, texts: int) -> np.ndarray:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 200, size=images + texts)
    lengths[images:] *= -1
    return random.permutation(lengths)


@pytest.mark.parametrize(("images", "texts"), [(203, 0), (0, 203), (150, 53), (3, 2), (1, 0)])
def test_grouping_is_a_permutation_whatever_the_modalities(images: int, texts: int) -> None:
    sampler = EpochSampler(images + texts, seed=1, batch=8, lengths=lengths_of(images, texts))
    assert sorted(sampler) == list(range(images + texts))


def test_batches_hold_one_modality_and_similar_lengths() -> None:
    lengths = lengths_of(4000, 800)
    order = np.array(list(EpochSampler(4800, seed=1, batch=8, lengths=lengths)))
    batches = lengths[order].reshape(-1, 8)
    assert all(len(set(batch >= 0)) == 1 for batch in batches)
    spread = np.abs(np.abs(batches).max(1) - np.abs(batches).min(1)).mean()
    assert spread < 10  # of 195 without grouping
    assert len({tuple(batch) for batch in batches[:20]}) > 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(50, seed=seed, batch=4)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
