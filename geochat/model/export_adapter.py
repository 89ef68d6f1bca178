"""Write any adapter of the family as this project's adapter folder, which plain PEFT reads too.

LoRA and DoRA stay what they are: no base is read. What the adapter brings beside them goes where training would put it:
a projector among PEFT's `modules_to_save`, other tensors into `non_lora_trainables.safetensors`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlavaConfig

from geochat.model.base import BaseRecord, OnBase
from geochat.model.canonical import CANONICAL, rename
from geochat.model.checkpoint import portable_config
from geochat.model.formats.adapters import EXTRA, WEIGHTS, Update
from geochat.model.processor import Processor
from geochat.model.staging import staged
from geochat.model.weights import Entry, State, assert_same_keys, read_header, write_file, write_json

_PROJECTOR = "multi_modal_projector"
_PEFT = "base_model.model."


def write_adapter(folder: Path | str, source: OnBase) -> None:
    """Write an adapter folder, atomically.

    Raises ValueError: nothing in the source is LoRA, some layers have DoRA's magnitudes and others not, the folder
    holds a full model or cannot be written.
    """
    updates = source.adapter.updates
    if not updates:
        raise ValueError(f"{source.adapter.where}: holds no LoRA; convert it with --format hf")
    dora = {update.magnitude is not None for update in updates.values()}
    if len(dora) > 1:
        raise ValueError(f"{source.adapter.where}: only some of its layers have magnitudes (DoRA)")
    replaced = _changed(source)
    projector = {key: entry for key, entry in replaced.items() if key.startswith(_PROJECTOR)}
    extra = {key: entry for key, entry in replaced.items() if key not in projector}
    tensors = {f"{_PEFT}{_running(key)}": entry for key, entry in projector.items()}
    for key, update in updates.items():
        tensors |= _layer(_running(key), update)
    config = _config(updates, dora=dora.pop(), with_projector=bool(projector))
    record = BaseRecord.of(source.model, source.vision_tower)
    write_folder(Path(folder), tensors, extra, config, source.config, source.processor, record)


def write_folder(
    folder: Path,
    tensors: State,
    extra: State,
    peft_config: dict[str, Any],
    config: LlavaConfig,
    processor: Processor,
    base: BaseRecord,
) -> None:
    """The files of an adapter folder, atomically; other files in the folder stay.

    tensors: under PEFT's names. extra: under canonical names. Raises ValueError when the folder holds a full model or
    cannot be written.
    """
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        raise ValueError(f"{folder}: holds a full model; save the adapter in a folder of its own")
    peft_config = peft_config | {"inference_mode": True, "base_model_name_or_path": str(base.model)}
    dtype = next(iter(tensors.values())).dtype
    with staged(folder) as staging:
        write_file(staging / WEIGHTS, tensors)
        if extra:
            write_file(staging / EXTRA, extra)
        processor.save(staging)
        write_json(staging / "adapter_config.json", peft_config)
        write_json(staging / "config.json", portable_config(config, dtype))
        base.write(staging)
        written = {key: tuple(row["shape"]) for key, row in read_header(staging / WEIGHTS).items()}
        assert_same_keys(tensors, written, f"{folder} (as written)")


def _changed(source: OnBase) -> State:
    """The replaced tensors, in the base's shapes, that differ from the base's own: GeoChat's folders carry the frozen
    position table too. Raises ValueError when the adapter does not fit its base."""
    merged = source.adapter.applied(source.state)
    return {
        key: merged[key]
        for key in source.adapter.replaced
        if key not in source.state
        or not torch.equal(source.state[key].read().float(), merged[key].read().float())
    }


def _running(key: str) -> str:
    name = rename(key, CANONICAL, backwards=True)
    assert name is not None, key
    return name


def _layer(name: str, update: Update) -> dict[str, Entry]:
    layer = f"{_PEFT}{name.removesuffix('.weight')}"
    found = {f"{layer}.lora_A.weight": update.a, f"{layer}.lora_B.weight": update.b}
    if update.magnitude is not None:
        rows = update.shape[0]
        found[f"{layer}.lora_magnitude_vector"] = update.magnitude.map(lambda m: m.reshape(rows), (rows,))
    return found


def _config(updates: dict[str, Update], *, dora: bool, with_projector: bool) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha as such, layers with others in the patterns."""
    layers = {_running(key).removesuffix(".weight"): update for key, update in updates.items()}
    ranks = {name: update.a.shape[0] for name, update in layers.items()}
    alphas = {name: _plain(update.scale * ranks[name]) for name, update in layers.items()}
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in layers).most_common(1)[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        use_dora=dora,
        target_modules=sorted(layers),
        rank_pattern={_exactly(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={_exactly(name): a for name, a in alphas.items() if a != alpha},  # type: ignore[misc]
        modules_to_save=[_PROJECTOR] if with_projector else None,
        bias="none",
        task_type="CAUSAL_LM",
    ).to_dict()
    config["target_modules"] = sorted(layers)
    return config


def _exactly(name: str) -> str:
    """PEFT reads the keys of its patterns as regular expressions on the end of a name."""
    return name.replace(".", r"\.")


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
