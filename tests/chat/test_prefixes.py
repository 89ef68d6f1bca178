"""Which computed beginning serves a prompt, and which are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from geochat.chat.prefixes import Prefix, Prefixes, longest, shared_tokens  # noqa: E402

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def prefix(ids: list[int]) -> Prefix:
    """A prefix whose one layer takes 8 bytes a token."""
    layer = (torch.zeros(1, len(ids), 1), torch.zeros(1, len(ids), 1))
    return Prefix(np.array(ids, dtype=np.int64), [layer])


@given(tokens, tokens)
def test_shared_tokens_are_those_in_common_from_the_start(one: list[int], other: list[int]) -> None:
    shared = shared_tokens(np.array(one), np.array(other))
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    common = min(len(one), len(other)) if common is None else common
    common = min(common, len(one) - 1)
    assert shared == (common if 2 * common >= len(one) else 0)


@given(tokens, st.lists(tokens, max_size=6), st.integers(0, 200))
def test_the_longest_is_found_and_the_bound_is_kept(
    ids: list[int], others: list[list[int]], limit: int
) -> None:
    store = Prefixes(limit)
    for other in others:
        store.keep(prefix(other))
        assert store.nbytes <= limit
    signature = np.array(ids)
    found = longest(signature, store.kept)
    best = max((shared_tokens(signature, one.signature) for one in store.kept), default=0)
    assert (found[1] if found else 0) == best


def test_a_longer_one_takes_the_place_of_what_it_begins_with() -> None:
    store = Prefixes(1000)
    for ids in ([1, 2], [1, 3], [1, 2, 5]):
        store.keep(prefix(ids))
    assert [one.signature.tolist() for one in store.kept] == [[1, 3], [1, 2, 5]]


def test_the_latest_used_stays() -> None:
    store = Prefixes(2 * 8 * 3)
    first, second = prefix([1, 1, 1]), prefix([2, 2, 2])
    store.keep(first)
    store.keep(second)
    store.use(first)
    store.keep(prefix([3, 3, 3]))
    assert store.kept[0] is first
    assert second not in store.kept
