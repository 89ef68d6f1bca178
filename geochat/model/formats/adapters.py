"""Adapters of every program of the family, as updates of canonical tensors.

Read here: this project's folders, PEFT's (0.4 and later) on a LLaVA, GeoChat or llava-hf model, NVlabs' DoRA, LoRA on
InternLM2's fused `wqkv`, XTuner's. What they carry beside LoRA (a projector, a tuned tower, a position table) replaces
the base's tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geochat.model.canonical import CANONICAL, DERIVED_BUFFERS, canonical_key, rename
from geochat.model.formats.internlm2 import WQKV, Heads, llama_name
from geochat.model.formats.internlm2 import split as split_wqkv
from geochat.model.formats.llava import LLAVA
from geochat.model.vision import resample_positions
from geochat.model.weights import Entry, State, open_file, read_json

WEIGHTS = "adapter_model.safetensors"
EXTRA = "non_lora_trainables.safetensors"
_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
_NVLABS = re.compile(r"\.weight_[mg]_wdecomp(?:\.default)?(?:\.weight)?$")
_RUNNING = ("model.language_model.", "model.multi_modal_projector.", "model.vision_tower.")
_NESTED_TOWER = (
    "model.vision_tower.vision_tower."  # LLaVA's own name, which begins like one of the running model
)
_PROJECTOR = "multi_modal_projector."
_POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class Update:
    """One layer's LoRA or DoRA, still on disk."""

    a: Entry  # [r, in]
    b: Entry  # [out, r]
    magnitude: Entry | None  # [out] or [out, 1]; DoRA only
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes."""
        return self.b.shape[0], self.a.shape[1]

    def apply(self, weight: Tensor) -> Tensor:
        """W + s·B·A, for DoRA (arXiv 2402.09353) m · (W + s·B·A) / ‖W + s·B·A‖ by rows; float32 until the end."""
        merged = (self.b.read().float() @ self.a.read().float()).mul_(self.scale).add_(weight)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
            merged *= self.magnitude.read().float().reshape(-1, 1) / norm
        return merged


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base, by canonical key."""

    where: str
    updates: dict[str, Update]
    replaced: State

    def to(self, dtype: torch.dtype | None) -> Adapter:
        """The same adapter with its matrices rounded to `dtype` when they are read (None: as stored)."""
        updates = {
            key: replace(
                update, a=update.a.to(dtype), b=update.b.to(dtype),
                magnitude=update.magnitude.to(dtype) if update.magnitude else None,
            )
            for key, update in self.updates.items()
        }  # fmt: skip
        return Adapter(self.where, updates, {key: entry.to(dtype) for key, entry in self.replaced.items()})

    def applied(self, state: State) -> State:
        """The base's table with updates and replacements made when a tensor is read.

        Updated tensors are stated as float32: the writer rounds to the target dtype, once.
        Raises ValueError for a tensor that the base does not have, or has in another shape.
        """
        merged = dict(state)
        for key, entry in self.replaced.items():
            if key == _POSITIONS and key in state and entry.shape != state[key].shape:
                resample = partial(resample_positions, side=math.isqrt(state[key].shape[0] - 1))
                entry = entry.to(torch.float32).map(resample, state[key].shape)
            brought = (
                key.startswith(_PROJECTOR) and key not in state
            )  # trained on a language model that had none
            self._check(brought or (key in state and state[key].shape == entry.shape), key, state)
            merged[key] = entry
        for key, update in self.updates.items():
            fits = update.magnitude is None or math.prod(update.magnitude.shape) == update.shape[0]
            self._check(key in state and state[key].shape == update.shape and fits, key, state)
            merged[key] = state[key].map(update.apply, dtype=torch.float32)
        return merged

    def _check(self, fits: bool, key: str, state: State) -> None:
        if not fits:
            own = f"has it as {list(state[key].shape)}" if key in state else "has no such tensor"
            raise ValueError(
                f"{self.where}: its {key} does not fit this base, which {own}; is it the right base?"
            )


def read_adapter(folder: Path, heads: Heads | None = None, part: str = "") -> Adapter:
    """The adapter of a folder that has adapter_config.json.

    heads: layout of the base's `wqkv`, where the base is an InternLM2 that was read as a Llama.
    part: "vision_tower" for XTuner's adapter on the bare tower.
    Raises ValueError: another kind of adapter, tensors missing, ranks that differ from the configuration.
    """
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    unsupported = [name for name in ("fan_in_fan_out", "wdecompose_target_modules") if config.get(name)]
    if kind not in ("LORA", "DORA") or unsupported or config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: cannot use peft_type {kind} with {unsupported or 'bias'}")
    dora = kind == "DORA" or bool(config.get("use_dora"))
    file = folder / WEIGHTS
    tensors = open_file(file if file.exists() else folder / "adapter_model.bin")
    old_extra = folder / "non_lora_trainables.bin"
    if old_extra.exists():
        tensors |= open_file(old_extra)
    adapter = assemble(tensors, str(folder), Scales(config), dora=dora, heads=heads, part=part)
    if (folder / EXTRA).exists():
        adapter.replaced.update(open_file(folder / EXTRA))
    return adapter


class Scales:
    """alpha ÷ rank of every layer, from adapter_config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.rank, self.alpha = config["r"], config["lora_alpha"]
        self.ranks, self.alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        self.rslora = bool(config.get("use_rslora"))

    def of(self, layer: str, rank: int, where: str) -> float:
        """For a layer under its name in the adapter, whose matrices have this rank."""
        wanted = self._pattern(self.ranks, layer, self.rank)
        if rank != wanted:
            raise ValueError(f"{where}: {layer} has rank {rank}, adapter_config.json says {wanted}")
        return self._pattern(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @staticmethod
    def _pattern(patterns: dict[str, int], layer: str, default: int) -> int:
        return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", layer)), default)


def assemble(
    tensors: State,
    where: str,
    scales: Scales,
    *,
    dora: bool = False,
    heads: Heads | None = None,
    part: str = "",
) -> Adapter:
    """Updates and replacements from the tensors of an adapter under the names they have on disk."""
    layers: dict[str, dict[str, Entry]] = {}
    replaced: State = {}
    for name, entry in tensors.items():
        name = (
            name.removeprefix("base_model.model.")
            .replace(".modules_to_save.default.", ".")
            .replace(".modules_to_save.", ".")
        )
        if name.endswith(DERIVED_BUFFERS):
            continue
        match = _LORA.fullmatch(_NVLABS.sub(".lora_magnitude_vector", name))
        if not match:
            replaced[_canonical(name, part)] = entry
        elif WQKV in f"{match[1]}." and heads is not None:
            for third in "qkv":
                layer = match[1].replace(WQKV.rstrip("."), f".self_attn.{third}_proj")
                own = entry if match[2] == "lora_A" else split_wqkv(entry, heads, third)
                layers.setdefault(layer, {})[match[2]] = own
        else:
            layers.setdefault(llama_name(match[1] + ".").rstrip("."), {})[match[2]] = entry
    updates = {}
    for layer, parts in layers.items():
        _require(parts, ["lora_A", "lora_B"], where, layer)
        if dora:
            _require(parts, ["lora_magnitude_vector"], where, layer)
        rank = parts["lora_A"].shape[0]
        if parts["lora_B"].shape[1] != rank:
            raise ValueError(
                f"{where}: {layer} has lora_A of rank {rank}, lora_B of {parts['lora_B'].shape[1]}"
            )
        updates[_canonical(layer + ".weight", part)] = Update(
            parts["lora_A"],
            parts["lora_B"],
            parts.get("lora_magnitude_vector"),
            scales.of(layer, rank, where),
        )
    return Adapter(where, updates, replaced)


def _require(parts: dict[str, Entry], names: Iterable[str], where: str, layer: str) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        hint = (
            "; this DoRA adapter was saved without its magnitudes: non_lora_trainables.bin has them"
            if missing == ["lora_magnitude_vector"]
            else ""
        )
        raise ValueError(f"{where}: {layer} has no {', '.join(missing)}{hint}")


def _canonical(name: str, part: str) -> str:
    """A weight's name in an adapter, without PEFT's prefix, as the canonical key."""
    if part == "vision_tower":
        return "vision_tower.vision_model." + name.removeprefix("vision_model.")
    if rename(name, CANONICAL, backwards=True) is not None:  # llava-hf's names
        return name
    if name.startswith(_RUNNING) and not name.startswith(_NESTED_TOWER):
        return canonical_key(name)
    return rename(llama_name(name), LLAVA) or canonical_key(name)
