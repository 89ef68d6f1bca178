"""Attention of prompts that share their beginning.

The keys and values of a shared beginning (system sentence and picture, mostly) exist once, however many questions follow
it; each question adds its own. All queries of the questions on one picture are multiplied with the shared keys in one
product, so that the picture's keys are read once a step, not once a question. The softmax runs over both parts together:
what comes out is ordinary attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from geochat.chat.prefixes import Prefix

_NAME = "geochat_shared_prefix"
_GROWTH = 64  # tokens


class Place(Protocol):
    """Where a row's tokens are: the first `shared` in its prefix, the next `length` among the own tokens."""

    prefix: Prefix
    shared: int
    length: int


class OwnTokens:
    """Keys and values that belong to one row each; rows and tokens are added as they come."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (config.num_hidden_layers, 2, config.num_key_value_heads, 0, 0, config.head_dim)
        self._data = torch.zeros(self._shape, dtype=dtype, device=device)

    def reserve(self, rows: int, tokens: int) -> None:
        """Room for this many rows of this many tokens. New room is zero: what is masked must still be a number."""
        has_rows, has_tokens = self._data.shape[3:5]
        if rows <= has_rows and tokens <= has_tokens:
            return
        wanted = list(self._data.shape)
        wanted[3] = max(rows, has_rows)
        wanted[4] = has_tokens if tokens <= has_tokens else tokens + _GROWTH
        grown = self._data.new_zeros(wanted)
        grown[:, :, :, :has_rows, :has_tokens] = self._data
        self._data = grown

    def move(self, source: int, target: int) -> None:
        """Row `source` takes the place of row `target`. One for which there never was room has nothing to move."""
        if source < self._data.shape[3]:
            self._data[:, :, :, target] = self._data[:, :, :, source]

    def clear(self, row: int) -> None:
        """What is no number would be none behind a mask either."""
        self._data[:, :, :, row] = 0

    def layer(self, index: int) -> torch.Tensor:
        """Keys and values [2, key-value head, row, token, width]."""
        return self._data[index]

    def row(self, index: int, length: int) -> torch.Tensor:
        """A row's keys and values [layer, 2, key-value head, token, width]."""
        return self._data[:, :, :, index, :length]


@dataclass
class _Group:
    """Rows that share a prefix."""

    prefix: Prefix
    rows: torch.Tensor | slice
    count: int
    length: int  # tokens of the prefix that one of them has at least
    seen: int  # the first tokens of the prefix, which all of them have
    hidden: torch.Tensor  # bool [row, 1, query, key]: keys from `seen` on that the query must not see


class View:
    """What the queries of one pass see. The rows are neighbours among the own tokens, beginning at `start`."""

    def __init__(self, own: OwnTokens, rows: Sequence[Place], start: int, queries: int) -> None:
        self._own = own
        width = max(row.length for row in rows) + queries
        own.reserve(start + len(rows), width)
        device = own.layer(0).device
        shared = torch.tensor([row.shared for row in rows], device=device)
        self._slots = torch.arange(start, start + len(rows), device=device)[:, None]
        self._columns = torch.tensor([[row.length] for row in rows], device=device) + torch.arange(
            queries, device=device
        )
        self.positions = shared[:, None] + self._columns
        """Position ids [row, query]."""
        self._tokens = slice(start, start + len(rows)), slice(width)
        later = torch.arange(width, device=device) > self._columns[..., None]
        self._groups = [self._group(indices, rows, shared, later) for indices in _by_prefix(rows)]

    def _group(
        self, indices: list[int], rows: Sequence[Place], shared: torch.Tensor, later: torch.Tensor
    ) -> _Group:
        lengths = [rows[i].shared for i in indices]
        which: torch.Tensor | slice = slice(None)
        if len(indices) < len(rows):
            which = torch.tensor(indices, device=shared.device)
        length, seen = max(lengths), min(lengths)
        foreign = torch.arange(seen, length, device=shared.device) >= shared[which, None]
        queries = later.shape[1]
        hidden = torch.cat([foreign[:, None].expand(-1, queries, -1), later[which]], dim=-1)
        return _Group(rows[indices[0]].prefix, which, len(indices), length, seen, hidden[:, None])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Note the new keys and values [row, key-value head, query, width], attend with `query` [row, head, query,
        width]. Returns [row, query, head, width]."""
        own = self._own.layer(layer)
        own[0][:, self._slots, self._columns] = key.transpose(0, 1)
        own[1][:, self._slots, self._columns] = value.transpose(0, 1)
        keys, values = own[:, :, self._tokens[0], self._tokens[1]]
        heads = query.shape[1]
        query = (query * scaling).unflatten(1, (len(keys), -1)).transpose(0, 1)
        output = torch.empty_like(query)  # [key-value head, row, heads of it, query, width]
        for group in self._groups:
            output[:, group.rows] = _attend(
                group, layer, query[:, group.rows], keys[:, group.rows], values[:, group.rows]
            )
        return output.permute(1, 3, 0, 2, 4).flatten(2, 3).unflatten(2, (heads, -1)).contiguous()


def _attend(
    group: _Group, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """One group: query [key-value head, row, heads of it, query, width], own keys [key-value head, row, token, width]."""
    shape = query.shape
    shared_keys, shared_values = (part[:, : group.length] for part in group.prefix.layers[layer])
    flat = query.reshape(shape[0], -1, shape[-1])
    scores = flat.new_empty(*flat.shape[:2], group.length + keys.shape[2])
    torch.bmm(flat, shared_keys.transpose(1, 2), out=scores[..., : group.length])
    own = query.flatten(2, 3) @ keys.transpose(2, 3)
    scores[..., group.length :] = own.flatten(1, 2)
    scores.view(*shape[:-1], -1)[..., group.seen :].masked_fill_(group.hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.bmm(weights[..., : group.length], shared_values)
    own_weights = weights[..., group.length :].unflatten(1, own.shape[1:3])
    return (output + (own_weights @ values).flatten(1, 2)).view(shape)


def _by_prefix(rows: Sequence[Place]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(id(row.prefix), []).append(i)
    return list(groups.values())


@contextmanager
def shared_prefix_attention(config: Any) -> Iterator[None]:
    """Within it, a language model of this config takes `view=View(…)` and attends through it."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    view: View,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    return view.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(_NAME, _attention)
