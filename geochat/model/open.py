"""Any checkpoint of the family as one unread canonical table; what it is, is read from its files.

Adapters of other programs are merged into their base when a tensor is read, in float32.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaConfig

from geochat.model.base import FILE as BASE_FILE
from geochat.model.base import BaseRecord
from geochat.model.build import GEOCHAT_SIZE, local_folder, read_config, read_parts
from geochat.model.checkpoint import read_checkpoint
from geochat.model.formats.adapters import read_adapter
from geochat.model.formats.internlm2 import Heads
from geochat.model.processor import Processor
from geochat.model.weights import State, read_json

Opened = tuple[LlavaConfig, State, Processor]

_PROJECTOR = "multi_modal_projector."
_XTUNER_PARTS = ("llm_adapter", "visual_encoder_adapter", "visual_encoder", "projector")


def recognise(path: Path) -> str:
    """What a folder is: "canonical", "adapter", "llava" (original layout), "llm", "clip", "xtuner" or "projector".

    Raises ValueError when it is none of them.
    """
    if (path / "adapter_config.json").exists():
        return "adapter"
    if any((path / part).is_dir() for part in _XTUNER_PARTS) and not (path / "model.safetensors").exists():
        return "xtuner"
    config = read_config(path)
    kind = config.get("model_type")
    if kind == "llava" and "text_config" in config:
        return "canonical"
    if config.get("mm_vision_tower"):
        return "projector" if any(path.glob("mm_projector.*")) else "llava"
    if kind in ("clip", "clip_vision_model"):
        return "clip"
    if kind in ("llama", "internlm", "internlm2"):
        return "llm"
    raise ValueError(f"{path}: {kind} is no model of this family")


def open_model(
    path: Path | str,
    *,
    base: Path | str | None = None,
    vision_tower: Path | str | None = None,
    image_size: int | None = None,
) -> Opened:
    """Configuration, unread canonical weights and processor.

    base: for an adapter, its base where it is not the one that the adapter names; a base may be of any kind.
    vision_tower: CLIP folder of a model that does not hold its tower.
    Raises ValueError that names the file and the flag to give when a part is not on this disk.
    """
    path = Path(path)
    kind = recognise(path)
    if kind == "canonical":
        return read_checkpoint(path, image_size)
    if kind == "llava":
        return _whole(read_parts(path, vision_tower, image_size=image_size, seed=None), path)
    if kind == "adapter":
        return _whole(_with_adapter(path, base, vision_tower, image_size), path)
    if kind == "xtuner":
        return _whole(_xtuner(path, base, vision_tower, image_size), path)
    wanted = {"llm": "a language model", "clip": "a vision tower", "projector": "a projector"}[kind]
    raise ValueError(
        f"{path}: is {wanted} alone, not a model that sees; train with it, or name the whole model"
    )


def _whole(opened: Opened, path: Path) -> Opened:
    if not any(key.startswith(_PROJECTOR) for key in opened[1]):
        raise ValueError(
            f"{path}: holds no projector; it is a language model and a tower that were never joined"
        )
    return opened


def _with_adapter(
    path: Path, base: Path | str | None, vision_tower: Path | str | None, image_size: int | None
) -> Opened:
    if (path / BASE_FILE).exists():
        return _own_adapter(path, base, vision_tower, image_size)
    named = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    base = Path(base) if base is not None else local_folder(path, named)
    if base is None:
        raise ValueError(f"{path}: its base {named} is not on this disk; say where it is with --model-base")
    if not Path(base).is_dir():
        raise ValueError(f"--model-base {base}: no such folder")
    own = read_config(path) if (path / "config.json").exists() else {}
    if image_size is None and own.get("model_type") == "geochat":
        image_size = GEOCHAT_SIZE
    if recognise(Path(base)) == "llm":  # LoRA on a plain LLM, its projector trained beside
        tower = vision_tower or local_folder(path, own.get("mm_vision_tower"))
        config, state, processor = read_parts(base, tower, image_size=image_size, seed=None)
    else:
        config, state, processor = open_model(base, vision_tower=vision_tower, image_size=image_size)
    return config, read_adapter(path, _heads(Path(base))).applied(state), processor


def _own_adapter(
    path: Path, base: Path | str | None, vision_tower: Path | str | None, image_size: int | None
) -> Opened:
    """An adapter of this project knows its base's parts and fingerprint, and carries its processor."""
    record = BaseRecord.read(path).moved_to(base, vision_tower)
    own = LlavaConfig.from_dict(read_config(path))
    size, layer = image_size or own.vision_config.image_size, own.vision_feature_layer
    if recognise(record.model) in ("llm", "llava"):
        config, state, _ = read_parts(
            record.model, record.vision_tower, image_size=size, feature_layer=layer, seed=None
        )
    else:
        config, state, _ = open_model(record.model, image_size=size)
    # The projector of a base that was built from parts came with the adapter.
    adapter = read_adapter(path)
    state |= {key: entry for key, entry in adapter.replaced.items() if key.startswith(_PROJECTOR)}
    return config, adapter.applied(state), Processor.load(path).with_image_size(size)


def _heads(base: Path) -> Heads | None:
    """Layout of the base's fused attention, where it has one."""
    source = read_config(base) if (base / "config.json").exists() else {}
    return Heads.of(source) if source.get("model_type") == "internlm2" else None


def _xtuner(
    path: Path, base: Path | str | None, vision_tower: Path | str | None, image_size: int | None
) -> Opened:
    """XTuner's converted folder: LoRA on the LLM, LoRA on the tower or the tower itself, and the projector."""
    llm, tower = path / "llm_adapter", path / "visual_encoder_adapter"
    if base is None and llm.is_dir():
        named = read_json(llm / "adapter_config.json")["base_model_name_or_path"]
        base = local_folder(path, named) or local_folder(path.parent, named)
        if base is None:
            raise ValueError(
                f"{llm}: its base {named} is not on this disk; say where it is with --model-base"
            )
    elif base is None:
        base = path  # the language model was trained as a whole and lies here
    if vision_tower is None and (path / "visual_encoder").is_dir():
        vision_tower = path / "visual_encoder"
    if vision_tower is None and tower.is_dir():
        named = read_json(tower / "adapter_config.json")["base_model_name_or_path"]
        vision_tower = local_folder(path, named) or local_folder(path.parent, named)
        if vision_tower is None:
            raise ValueError(f"{tower}: its base {named} is not on this disk; give it with --vision-tower")
    projector = path / "projector"
    config, state, processor = read_parts(
        base, vision_tower, projector if projector.is_dir() else None, image_size=image_size, seed=None
    )
    if llm.is_dir():
        state = read_adapter(llm, _heads(Path(base))).applied(state)
    if tower.is_dir():
        state = read_adapter(tower, part="vision_tower").applied(state)
    return config, state, processor
