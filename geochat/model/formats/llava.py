"""Key tables of the folders that a model is put together from: LLaVA / GeoChat / Llama, CLIP, projector files."""

from __future__ import annotations

import re

from geochat.model.canonical import DERIVED_BUFFERS, KeyTable, rename
from geochat.model.weights import State

# (prefix in the folder, canonical prefix). A plain Llama folder has the last two rows only.
LLAVA: KeyTable = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# CLIPVisionModel, or the vision half of CLIPModel; bare names are what transformers >= 5.6 holds in memory.
CLIP: KeyTable = (
    ("vision_model.", "vision_tower.vision_model."),
    ("embeddings.", "vision_tower.vision_model.embeddings."),
    ("pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
    ("encoder.", "vision_tower.vision_model.encoder."),
    ("post_layernorm.", "vision_tower.vision_model.post_layernorm."),
)
_CLIP_ELSEWHERE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
# Projector files carry whatever prefix the program that trained them had.
_PROJECTOR = (
    (re.compile(r"(?:^|\.)mm_projector\.([02])\.(weight|bias)$"), {"0": "linear_1", "2": "linear_2"}),
    (re.compile(r"^model\.([02])\.(weight|bias)$"), {"0": "linear_1", "2": "linear_2"}),
    (re.compile(r"(?:^|\.)linear_([12])\.(weight|bias)$"), {"1": "linear_1", "2": "linear_2"}),
)


def from_llava(state: State, where: str) -> State:
    """Canonical names for a Llama or LLaVA-1.5 folder; an unknown key is an error."""
    return _renamed(state, LLAVA, where)


def from_clip(state: State, where: str) -> State:
    """Canonical names for the tower of a CLIP folder; the text half of a full CLIPModel is left out."""
    return _renamed(
        {key: entry for key, entry in state.items() if not key.startswith(_CLIP_ELSEWHERE)}, CLIP, where
    )


def from_projector(state: State, where: str) -> State:
    """Canonical names for a projector file; other trained tensors in it (input embeddings) are refused."""
    found: State = {}
    for key, entry in state.items():
        for pattern, layers in _PROJECTOR:
            if match := pattern.search(key):
                found[f"multi_modal_projector.{layers[match[1]]}.{match[2]}"] = entry
                break
        else:
            raise ValueError(f"{where}: {key} is no part of a two-layer projector")
    return found


def _renamed(state: State, table: KeyTable, where: str) -> State:
    found: State = {}
    for key, entry in state.items():
        if key.endswith(DERIVED_BUFFERS):
            continue
        name = rename(key, table)
        if name is None:
            raise ValueError(f"{where}: unknown tensor {key}; is this the right folder?")
        found[name] = entry
    return found
