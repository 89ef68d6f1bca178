"""ZeRO's checkpoints on another number of processes, through DeepSpeed's universal format."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from geochat.train.arguments import TrainingArguments

SUFFIX = "_universal"


def zero_shards(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that hold the optimizer's state under ZeRO, one of each process that saved it."""
    return sorted(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))


def spread_anew(checkpoint: Path, args: TrainingArguments) -> None:
    """Where another number of processes saved ZeRO's files, put them together in the universal format.

    It lies in the checkpoint, twelve bytes for each trained parameter, until it was read. Raises: ValueError when it
    cannot be written.
    """
    shards = zero_shards(checkpoint)
    if len(shards) in (0, args.world_size):
        return
    args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    args.notes.append(
        f"{checkpoint.name} was saved by {len(shards)} processes and is spread over {args.world_size} now"
    )
    if args.process_index == 0:
        _write(shards[0].parent)
    dist.barrier()


def part_again(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]], rates: list[float]) -> None:
    """Undo what ZeRO-3 does when it reads the format: it gives all groups of parameters the settings of the first, and
    one counter of steps, which each of them then advances.

    own: the groups' settings before; rates: their learning rates when the checkpoint was saved.
    """
    for group, settings, rate in zip(optimizer.param_groups, own, rates, strict=True):
        group.update(settings, lr=rate)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def forget_universal(checkpoint: Path) -> None:
    """Delete what `spread_anew` wrote, when every process has read it."""
    dist.barrier()
    if dist.get_rank() == 0:
        _delete(checkpoint)


def _write(step: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    settings = Namespace(
        input_folder=str(step),
        output_folder=str(step.with_name(f"{step.name}{SUFFIX}")),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    _delete(step.parent)  # what a killed process left
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            ds_to_universal.main(settings)
    except (OSError, RuntimeError) as error:
        _delete(step.parent)
        raise ValueError(f"{step} cannot be spread over another number of processes: {error}") from error


def _delete(checkpoint: Path) -> None:
    for folder in checkpoint.glob(f"*{SUFFIX}"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
