"""InternLM2 as a Llama: its names, and its fused query-key-value projection taken apart.

The rows of `wqkv` are, for each key-value head: the query heads of its group, the key, the value. `w1` is the gate,
`w3` goes up, `w2` comes down. Source: InternLM's own `convert2llama.py`, checked against golden vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geochat.model.weights import Entry, State

WQKV = ".attention.wqkv."
_NAMES = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


@dataclass(frozen=True)
class Heads:
    """How `wqkv` is laid out."""

    queries: int
    keys: int
    width: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Heads:
        """From a config.json."""
        queries = config["num_attention_heads"]
        keys = config.get("num_key_value_heads") or queries
        return cls(queries, keys, config.get("head_dim") or config["hidden_size"] // queries)

    def rows(self, part: str) -> int:
        """Output features of "q", "k" or "v"."""
        return (self.queries if part == "q" else self.keys) * self.width

    def take(self, fused: Tensor, part: str) -> Tensor:
        """The rows of "q", "k" or "v" from a fused matrix [(queries + 2 * keys) * width, n]."""
        group = self.queries // self.keys
        heads = fused.reshape(self.keys, group + 2, self.width, -1)
        chosen = {"q": heads[:, :group], "k": heads[:, group], "v": heads[:, group + 1]}[part]
        return chosen.reshape(self.rows(part), -1)


def llama_name(key: str) -> str:
    """A key of InternLM2 under Llama's name; `wqkv`, which becomes three, stays."""
    for old, new in _NAMES.items():
        key = key.replace(old, new)
    return key


def from_internlm2(state: State, heads: Heads, where: str) -> State:
    """Llama names; each `wqkv` becomes q, k and v, cut out when they are read."""
    found: State = {}
    for key, entry in state.items():
        if WQKV not in key:
            found[llama_name(key)] = entry
            continue
        fused = heads.rows("q") + 2 * heads.rows("k")
        if entry.shape[0] != fused:
            raise ValueError(
                f"{where}: {key} has {entry.shape[0]} rows, the heads of config.json make {fused}"
            )
        for part in "qkv":
            name = key.replace(WQKV, f".self_attn.{part}_proj.")
            found[name] = split(entry, heads, part)
    return found


def split(entry: Entry, heads: Heads, part: str) -> Entry:
    """One of the three parts of a fused matrix, unread."""
    return entry.map(lambda fused: heads.take(fused, part), (heads.rows(part), *entry.shape[1:]))
