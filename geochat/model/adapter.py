"""LoRA and DoRA on the language model and, if asked, on the tower: attach, list what trains, save and load.

An adapter folder holds PEFT's `adapter_config.json` and `adapter_model.safetensors` (with a trained projector inside),
the resolved `config.json`, the processor files and `geochat_base.json`, which names the base and its fingerprint.
What is neither LoRA nor in the base (a projector from a file, a tuned tower) is in `non_lora_trainables.safetensors`
under canonical names.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlavaConfig

from geochat.model.base import BaseRecord
from geochat.model.build import build_model
from geochat.model.canonical import CANONICAL, canonical_key, rename
from geochat.model.checkpoint import load
from geochat.model.dora import use_held_norms
from geochat.model.export_adapter import write_folder
from geochat.model.formats.adapters import EXTRA, WEIGHTS
from geochat.model.lora import use_fewer_passes
from geochat.model.open import recognise
from geochat.model.processor import Processor
from geochat.model.vision import blocks_read, find_tower, freeze_tower
from geochat.model.weights import (
    State,
    assert_same_keys,
    of_tensor,
    open_file,
    read_json,
)

# PEFT matches the whole name. Leaf names alone would also hit CLIP's q_proj, k_proj and v_proj.
LLM_LINEARS = (
    r"(?:^|.*\.)language_model\.(?:.*\.)?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
)
# Of the blocks whose numbers are filled in; PEFT reads the keys of its rank patterns as regular expressions too.
TOWER_LINEARS = (
    r"(?:^|.*\.)vision_tower\.(?:.*\.)?layers\.(?:{blocks})\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])$"
)
_ANY_OF_TOWER = r"vision_tower\..*"
_PROJECTOR = "multi_modal_projector"

Groups = dict[str, list[tuple[str, nn.Parameter]]]


@dataclass(frozen=True)
class AdapterSpec:
    """What to attach; the defaults are GeoChat's."""

    r: int = 64
    alpha: int = 16
    """The update is scaled by alpha / r."""
    dropout: float = 0.05
    use_dora: bool = False
    train_projector: bool = False
    """False: as GeoChat on a LLaVA base. True: as LLaVA-1.5."""
    vision_r: int = 0
    """Rank in the blocks of the vision tower that the projector sees; 0: no adapter there."""
    vision_alpha: int = 16


def attach(model: nn.Module, spec: AdapterSpec) -> PeftModel:
    """LoRA or DoRA on every linear layer of the language model; all else is frozen, but for what the spec asks for.

    The tower is kept out of the autograd graph unless it has adapters too. Adapter weights have the dtype of the base.
    """
    targets, on_tower = LLM_LINEARS, bool(spec.vision_r)
    if on_tower:
        blocks = "|".join(str(index) for index in range(blocks_read(model.config)))
        targets = f"{LLM_LINEARS}|{TOWER_LINEARS.format(blocks=blocks)}"
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.use_dora,
        target_modules=targets,
        rank_pattern={_ANY_OF_TOWER: spec.vision_r} if on_tower else {},
        alpha_pattern={_ANY_OF_TOWER: spec.vision_alpha} if on_tower else {},
        modules_to_save=[_PROJECTOR] if spec.train_projector else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return _wrap(model, config)


def _wrap(model: Any, config: LoraConfig) -> PeftModel:
    model.requires_grad_(False)
    # float32 adapters beside a bfloat16 projector make ZeRO-3's flat buffers fail.
    with warnings.catch_warnings():  # PEFT asks transformers under an old name; nothing a user can mend
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    use_fewer_passes(adapted)
    use_held_norms(adapted)
    if not any(".lora_" in name for name, _ in find_tower(adapted).named_parameters()):
        freeze_tower(adapted)
    return adapted


def trainable_groups(model: nn.Module) -> Groups:
    """The parameters that train, by part: "lora", "vision_lora", "projector", "vision_tower", "language_model"."""
    groups: Groups = {
        "lora": [],
        "vision_lora": [],
        "projector": [],
        "vision_tower": [],
        "language_model": [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_part(name)].append((name, parameter))
    return groups


def _part(name: str) -> str:
    if ".lora_" in name:
        return "vision_lora" if "vision_tower." in name else "lora"
    if f"{_PROJECTOR}." in name:
        return "projector"
    return "vision_tower" if "vision_tower." in name else "language_model"


def save_adapter(
    model: PeftModel,
    processor: Processor,
    folder: Path | str,
    *,
    base: BaseRecord,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a complete adapter folder, atomically; other files in the folder stay.

    state: gathered tensors under the model's own names where the model is sharded (ZeRO-3).
    Raises ValueError when the folder cannot be written or holds a full model.
    """
    tensors = {key: of_tensor(value) for key, value in _adapter_tensors(model, state).items()}
    extra = _extra_tensors(model, state, with_projector=bool(base.vision_tower or base.projector))
    config = model.peft_config["default"].to_dict()
    write_folder(Path(folder), tensors, extra, config, model.get_base_model().config, processor, base)


def load_adapter_state(model: PeftModel, folder: Path | str) -> None:
    """Copy the tensors of an adapter folder into a model that has an adapter of this kind attached.

    Raises ValueError when a tensor is missing, left over or of another shape: the adapter of another base.
    """
    folder = Path(folder)
    found = (
        open_file(folder / WEIGHTS)
        if (folder / WEIGHTS).exists()
        else open_file(folder / "adapter_model.bin")
    )
    places = _adapter_tensors(model, dict(model.named_parameters()))
    wanted = {key: tuple(place.shape) for key, place in places.items()}
    assert_same_keys(found, wanted, f"{folder} (adapter of another base?)")
    for key, place in places.items():
        if (
            ".lora_" in key
        ):  # PEFT computes in the adapter's own precision: never round it to a half-precision base
            place.data = place.data.to(torch.promote_types(place.dtype, found[key].dtype))
        place.data.copy_(found[key].read())
    if (folder / EXTRA).exists():
        _load_extra(model.get_base_model(), open_file(folder / EXTRA), folder)


def load_adapter(model: nn.Module, folder: Path | str, *, trainable: bool = False) -> PeftModel:
    """A base model with the adapter of a folder attached; `load_with_base` finds the base too."""
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: is a {config.peft_type} adapter; LoRA and DoRA are supported")
    config.inference_mode = not trainable
    config.base_model_name_or_path = None  # PEFT would warn that the object has no such name
    adapted = _wrap(model, config)
    load_adapter_state(adapted, folder)
    return adapted if trainable else adapted.eval()


def load_with_base(
    path: Path,
    base: Path | str | None = None,
    *,
    image_size: int | None = None,
    vision_tower: Path | str | None = None,
    **options: Any,
) -> tuple[PeftModel, Processor]:
    """Base, adapter and processor of an adapter folder; `options` as for `geochat.model.checkpoint.load`."""
    record = BaseRecord.read(path).moved_to(base, vision_tower)
    processor = Processor.load(path).with_image_size(image_size or adapter_image_size(path))
    model: nn.Module
    if recognise(record.model) in ("llm", "llava", "gguf"):
        config = LlavaConfig.from_dict(read_json(path / "config.json"))
        model, _ = build_model(
            record.model,
            record.vision_tower,
            image_size=processor.image_size,
            feature_layer=config.vision_feature_layer,
            **options,
        )
    else:
        model, _ = load(record.model, image_size=processor.image_size, **options)
    return load_adapter(model, path), processor


def adapter_image_size(path: Path) -> int:
    """The resolution an adapter was trained at."""
    config = read_json(path / "config.json")
    return int(config["vision_config"]["image_size"])


def _adapter_tensors(model: PeftModel, state: dict[str, Any] | None) -> dict[str, Any]:
    return get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


def _extra_tensors(model: PeftModel, state: dict[str, Tensor] | None, with_projector: bool) -> State:
    """What a base folder does not give back: other trained weights, and a projector that came from elsewhere."""
    found: State = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        frozen_projector = with_projector and _part(name) == "projector" and ".original_module." not in name
        if parameter.requires_grad or frozen_projector:
            tensor = state[name] if state is not None and name in state else parameter.detach()
            found[canonical_key(name.removeprefix("base_model.model."))] = of_tensor(tensor)
    return found


def _load_extra(base: nn.Module, extra: State, folder: Path) -> None:
    for key, entry in extra.items():
        name = rename(key, CANONICAL, backwards=True)
        try:
            place = base.get_parameter(name or key)
        except AttributeError:
            raise ValueError(f"{folder}: the base has no {key}") from None
        if tuple(place.shape) != entry.shape:
            raise ValueError(f"{folder}: {key} is {list(entry.shape)}, the base has {list(place.shape)}")
        with torch.no_grad():
            place.copy_(entry.read())
