"""What generation needs from its surroundings: a device, a dtype, memory."""

from __future__ import annotations

from typing import Any

import psutil
import torch


def pick_device(name: str = "auto") -> str:
    """ "auto": CUDA, else Apple's MPS, else the CPU. ValueError when a named device is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    if missing or kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not available here; use auto, cpu, cuda, cuda:N or mps")
    return name


def default_dtype(device: str) -> torch.dtype:
    """float32 on the CPU, bfloat16 on a GPU that has it, else float16."""
    if device == "cpu":
        return torch.float32
    wide = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wide else torch.float16


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken on a device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in every layer of a language model."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
