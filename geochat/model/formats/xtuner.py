"""XTuner's two results: the converted folder, and the training checkpoint `iter_N.pth`.

A training checkpoint holds what was trained: `llm.` and `visual_encoder.` with LoRA under PEFT's running names or whole,
and `projector.model.`. It does not say alpha: XTuner's recipe for this family has r 512, alpha 256 on the language model
and r 64, alpha 16 on the tower, so the scales are 1/2 and 1/4 where nothing else is given.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import is_zipfile

import torch

from geochat.model.formats.adapters import Adapter, Scales, Update, assemble, read_adapter
from geochat.model.formats.internlm2 import Heads
from geochat.model.formats.llava import from_projector
from geochat.model.projector import read_projector
from geochat.model.weights import State, of_tensor

LLM, TOWER, PROJECTOR = "llm_adapter", "visual_encoder_adapter", "projector"
WHOLE_TOWER = "visual_encoder"
PARTS = (LLM, TOWER, WHOLE_TOWER, PROJECTOR)
_PREFIXES = ("llm.", "visual_encoder.", "projector.")
LLM_SCALE, TOWER_SCALE = 0.5, 0.25
"""alpha ÷ r of the recipe."""


def is_training_checkpoint(path: Path) -> bool:
    """Whether this is `iter_N.pth`, whatever its name: PyTorch's archive in one file, or DeepSpeed's folder of them."""
    if path.is_dir():
        return any(path.glob("mp_rank_*_model_states.pt"))
    return path.is_file() and is_zipfile(path)


def read_folder(folder: Path, heads: Heads | None) -> Adapter:
    """What a converted folder trains: LoRA on the language model and on the tower, and the projector."""
    updates: dict[str, Update] = {}
    replaced: State = {}
    for name, part in ((LLM, ""), (TOWER, "vision_tower")):
        if (folder / name).is_dir():
            own = read_adapter(folder / name, heads if not part else None, part=part)
            updates |= own.updates
            replaced |= own.replaced
    if (folder / PROJECTOR).is_dir():
        replaced |= read_projector(folder / PROJECTOR)
    return Adapter(str(folder), updates, replaced)


def read_training_checkpoint(
    path: Path,
    heads: Heads | None = None,
    *,
    llm_alpha: float | None = None,
    tower_alpha: float | None = None,
    trusted: bool = False,
) -> Adapter:
    """What `iter_N.pth` trains.

    llm_alpha, tower_alpha: lora_alpha of the two LoRAs; None: half and a quarter of their ranks.
    trusted: unpickle everything, which can run code of the file; without it only tensors and plain containers are read.
    Raises ValueError: unreadable file, a file that needs `trusted`, tensors of no known part.
    """
    tensors = training_tensors(path, trusted)
    parts: dict[str, State] = {"llm.": {}, "visual_encoder.": {}, "projector.": {}}
    for key, entry in tensors.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{path}: {key} belongs to no part of an XTuner LLaVA model")
        parts[prefix][key.removeprefix(prefix)] = entry
    where = str(path)
    updates: dict[str, Update] = {}
    replaced = from_projector(parts["projector."], where)
    for prefix, part, alpha, scale in (
        ("llm.", "", llm_alpha, LLM_SCALE),
        ("visual_encoder.", "vision_tower", tower_alpha, TOWER_SCALE),
    ):
        rank = next((e.shape[0] for key, e in parts[prefix].items() if ".lora_A." in key), 1)
        scales = Scales({"r": rank, "lora_alpha": rank * scale if alpha is None else alpha})
        own = assemble(parts[prefix], where, scales, heads=None if part else heads, part=part)
        updates |= own.updates
        replaced |= own.replaced
    return Adapter(where, updates, replaced)


def training_tensors(path: Path, trusted: bool = False) -> State:
    """The tensors of `iter_N.pth`, a file or a folder of DeepSpeed's, under XTuner's names."""
    if path.is_dir():
        return _from_deepspeed(path, trusted)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=True)
    except Exception as error:  # torch raises half a dozen types for a damaged or unsafe file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read as plain tensors ({reason}); if the file holds other objects and you trust where "
            "it comes from, give --allow-pickle, which lets it run code"
        ) from None
    table = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    known = [key for key in table or () if str(key).startswith(_PREFIXES)]
    if not isinstance(table, dict) or not known:
        raise ValueError(f"{path}: holds no table of tensors; is it XTuner's iter_N.pth?")
    return {key: of_tensor(value, path) for key, value in table.items() if torch.is_tensor(value)}


def _from_deepspeed(path: Path, trusted: bool) -> State:
    """A checkpoint that DeepSpeed split over its processes, put together by DeepSpeed's own function."""
    if not trusted:
        raise ValueError(
            f"{path}: DeepSpeed's checkpoint is a set of pickles; if you trust where it comes from, give "
            "--allow-pickle, which lets it run code"
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        found = get_fp32_state_dict_from_zero_checkpoint(
            str(path.absolute().parent), tag=path.name, exclude_frozen_parameters=True
        )
    except Exception as error:  # whatever the pickles and DeepSpeed's own checks raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be put together ({reason})") from None
    return {key.removeprefix("module."): of_tensor(tensor) for key, tensor in found.items()}
