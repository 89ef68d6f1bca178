"""Any checkpoint of the family as one unread canonical table; what it is, is read from its files.

Adapters of other programs are merged into their base when a tensor is read, in float32.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaConfig

from geochat.model.base import FILE as BASE_FILE
from geochat.model.base import BaseRecord, OnBase
from geochat.model.build import GEOCHAT_SIZE, local_folder, read_config, read_parts
from geochat.model.checkpoint import read_checkpoint
from geochat.model.formats import xtuner
from geochat.model.formats.adapters import read_adapter
from geochat.model.formats.gguf_file import is_gguf
from geochat.model.formats.gguf_read import sight_beside, text_file
from geochat.model.formats.internlm2 import Heads
from geochat.model.language import with_own_template
from geochat.model.processor import Processor
from geochat.model.weights import State, read_json

Opened = tuple[LlavaConfig, State, Processor]

_PROJECTOR = "multi_modal_projector."


def recognise(path: Path) -> str:
    """What a folder is: "canonical", "adapter", "llava" (original layout), "llm", "clip", "xtuner" or "projector"; a
    GGUF file or a folder of them: "gguf" with an `mmproj` beside the language model, "llm" without.

    "pth" is XTuner's training checkpoint. Raises ValueError when it is none of them.
    """
    if xtuner.is_training_checkpoint(path):
        return "pth"
    if is_gguf(path):
        return "gguf" if sight_beside(text_file(path)) else "llm"
    if (path / "adapter_config.json").exists():
        return "adapter"
    if any((path / part).is_dir() for part in xtuner.PARTS) and not (path / "model.safetensors").exists():
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
    vision_tower: CLIP folder of a model that does not hold its tower, or the `mmproj` file of a GGUF model.
    Raises ValueError that names the file and the flag to give when a part is not on this disk.
    """
    path = Path(path)
    if is_gguf(path) and is_gguf(vision_tower):
        return _gguf(path, vision_tower, image_size)
    kind = recognise(path)
    if kind == "gguf":
        return _gguf(path, vision_tower, image_size)
    if kind == "canonical":
        return read_checkpoint(path, image_size)
    if kind == "llava":
        return _whole(read_parts(path, vision_tower, image_size=image_size, seed=None), path)
    if kind in ("adapter", "xtuner"):
        opened = open_adapter(path, base=base, vision_tower=vision_tower, image_size=image_size)
        return _whole(opened.merged(), path)
    if kind == "pth":
        raise ValueError(
            f"{path}: is a training checkpoint of XTuner; convert it with scripts/convert_checkpoint.py, then name the result"
        )
    wanted = {"llm": "a language model", "clip": "a vision tower", "projector": "a projector"}[kind]
    raise ValueError(
        f"{path}: is {wanted} alone, not a model that sees; train with it, or name the whole model"
    )


def open_adapter(
    path: Path | str,
    *,
    base: Path | str | None = None,
    vision_tower: Path | str | None = None,
    image_size: int | None = None,
) -> OnBase:
    """An adapter folder of any program, beside its base; arguments and errors as for `open_model`."""
    path = Path(path)
    if (path / BASE_FILE).exists():
        return _own_adapter(path, base, vision_tower, image_size)
    if recognise(path) == "xtuner":
        return _xtuner_folder(path, base, vision_tower, image_size)
    base = _base(path, path, base)
    own = read_config(path) if (path / "config.json").exists() else {}
    if image_size is None and own.get("model_type") == "geochat":
        image_size = GEOCHAT_SIZE
    adapter = read_adapter(path, _heads(base))
    if recognise(base) == "llm":  # LoRA on a plain LLM, its projector trained beside
        tower = Path(vision_tower) if vision_tower else local_folder(path, own.get("mm_vision_tower"))
        opened = read_parts(base, tower, image_size=image_size, seed=None)
        return OnBase(*opened, adapter, base, tower)
    opened = open_model(base, vision_tower=vision_tower, image_size=image_size)
    return OnBase(*opened, adapter, base, Path(vision_tower) if vision_tower else None)


def open_training_checkpoint(
    path: Path | str,
    *,
    base: Path | str | None,
    vision_tower: Path | str | None = None,
    image_size: int | None = None,
    llm_alpha: float | None = None,
    tower_alpha: float | None = None,
    trusted: bool = False,
) -> OnBase:
    """XTuner's `iter_N.pth` beside its base, which the file does not name.

    llm_alpha, tower_alpha, trusted: see `geochat.model.formats.xtuner`; the others as for `open_model`.
    """
    path = Path(path)
    if base is None:
        raise ValueError(f"{path}: does not name its base; say where it is with --model-base")
    base = _base(path, path, base)
    adapter = xtuner.read_training_checkpoint(
        path, _heads(base), llm_alpha=llm_alpha, tower_alpha=tower_alpha, trusted=trusted
    )
    opened = read_parts(base, vision_tower, image_size=image_size, seed=None)
    return OnBase(*opened, adapter, base, Path(vision_tower) if vision_tower else None)


def _gguf(path: Path, vision_tower: Path | str | None, image_size: int | None) -> Opened:
    config, state, processor = read_parts(path, vision_tower, image_size=image_size, seed=None)
    return _whole((config, state, with_own_template(processor, path)), path)


def _whole(opened: Opened, path: Path) -> Opened:
    if not any(key.startswith(_PROJECTOR) for key in opened[1]):
        raise ValueError(
            f"{path}: holds no projector; it is a language model and a tower that were never joined"
        )
    return opened


def _base(path: Path, adapter: Path, given: Path | str | None, flag: str = "--model-base") -> Path:
    """The folder that `flag` gives, or that an adapter_config.json names."""
    if given is not None:
        if not Path(given).is_dir() and not is_gguf(given):
            raise ValueError(f"{flag} {given}: no such folder")
        return Path(given)
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    found = local_folder(path, named) or local_folder(path.parent, named)
    if found is None:
        raise ValueError(f"{adapter}: its base {named} is not on this disk; say where it is with {flag}")
    return found


def _own_adapter(
    path: Path, base: Path | str | None, vision_tower: Path | str | None, image_size: int | None
) -> OnBase:
    """An adapter of this project knows its base's parts and fingerprint, and carries its processor."""
    record = BaseRecord.read(path).moved_to(base, vision_tower)
    own = LlavaConfig.from_dict(read_config(path))
    size, layer = image_size or own.vision_config.image_size, own.vision_feature_layer
    if recognise(record.model) in ("llm", "llava", "gguf"):
        config, state, _ = read_parts(
            record.model, record.vision_tower, image_size=size, feature_layer=layer, seed=None
        )
    else:
        config, state, _ = open_model(record.model, image_size=size)
    processor = Processor.load(path).with_image_size(size)
    return OnBase(config, state, processor, read_adapter(path), record.model, record.vision_tower)


def _heads(base: Path) -> Heads | None:
    """Layout of the base's fused attention, where it has one."""
    source = read_config(base) if (base / "config.json").exists() else {}
    return Heads.of(source) if source.get("model_type") == "internlm2" else None


def _xtuner_folder(
    path: Path, base: Path | str | None, vision_tower: Path | str | None, image_size: int | None
) -> OnBase:
    """XTuner's converted folder: LoRA on the LLM, LoRA on the tower or the tower itself, and the projector."""
    llm, tower = path / xtuner.LLM, path / xtuner.TOWER
    if base is not None or llm.is_dir():
        base = _base(path, llm, base)
    else:
        base = path  # the language model was trained as a whole and lies here
    if vision_tower is None and (path / xtuner.WHOLE_TOWER).is_dir():
        vision_tower = path / xtuner.WHOLE_TOWER
    if vision_tower is None and tower.is_dir():
        vision_tower = _base(path, tower, None, "--vision-tower")
    opened = read_parts(base, vision_tower, image_size=image_size, seed=None)
    adapter = xtuner.read_folder(path, _heads(base))
    return OnBase(*opened, adapter, base, Path(vision_tower) if vision_tower else None)
