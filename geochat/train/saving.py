"""What a training run writes: complete folders, published by renaming."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from geochat.model.adapter import load_adapter_state, save_adapter
from geochat.model.base import BaseRecord
from geochat.model.canonical import CANONICAL, rename
from geochat.model.checkpoint import read_checkpoint, save_model
from geochat.model.formats.llava import LLAVA, from_projector
from geochat.model.processor import Processor
from geochat.model.weights import State, assert_same_keys, of_tensor, open_file, read_json, write_file
from geochat.train.arguments import TrainingArguments

STAGING = ".saving-"
PROJECTOR_FILE = "mm_projector.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

Kind = Literal["adapter", "projector", "full"]
_WEIGHTS = {
    "adapter": ("adapter_model.safetensors",),
    "projector": (PROJECTOR_FILE,),
    "full": ("model.safetensors", "model.safetensors.index.json"),
}


class SaveError(RuntimeError):
    """A save that did not come about: disk full, no permission, folder gone."""


class LossError(RuntimeError):
    """The loss or the weights are no numbers any more; the message names the samples of the batch."""


@contextmanager
def explained(run: Path, name: str) -> Iterator[None]:
    """Turns what torch, safetensors and the file system raise for a failed write into one SaveError line.

    What was written of the save is deleted, so that a full disk has room again.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        kept = checkpoints(run)
        previous = f"{kept[-1].name} is intact" if kept else "there was no earlier checkpoint"
        reason = getattr(error, "strerror", None) or _refusal(run) or str(error).strip().split("\n")[0]
        shutil.rmtree(run / f"{STAGING}{name}", ignore_errors=True)
        raise SaveError(f"{run / name} could not be saved ({reason}); {previous}") from error


class RunSaver:
    """Writes and restores the loadable part of a save.

    kind: "adapter" (LoRA, DoRA), "projector" (only it trains: `mm_projector.safetensors`, fit for
    `--pretrain_mm_mlp_adapter`) or "full" (a canonical model folder).
    model: what is trained, without DDP or DeepSpeed around it. base: where an adapter belongs.
    """

    def __init__(self, kind: Kind, model: nn.Module, processor: Processor, base: BaseRecord) -> None:
        self.kind = kind
        self.model = model
        self.processor = processor
        self.base = base

    @property
    def partial(self) -> bool:
        """True when frozen weights are left out."""
        return self.kind != "full"

    def check(self, run: Path, resume: Path | None) -> None:
        """Before the hours of training. Raises: ValueError when a folder holds another kind of model."""
        if resume is not None and not any((resume / name).exists() for name in _WEIGHTS[self.kind]):
            raise ValueError(
                f"{resume} is no checkpoint of this kind of run: it has no {_WEIGHTS[self.kind][0]}"
            )
        if resume is not None and self.kind == "adapter":
            self._check_adapter(resume)
        for kind in ("adapter", "full"):
            if kind != self.kind and any((run / name).exists() for name in _WEIGHTS[kind]):
                raise ValueError(f"{run} holds a model of another kind ({kind}): choose another --output_dir")

    def _check_adapter(self, resume: Path) -> None:
        before = read_json(resume / "adapter_config.json")
        now = self.model.peft_config["default"]
        for flag, old, new in (
            ("--lora_r", before["r"], now.r),
            ("--lora_alpha", before["lora_alpha"], now.lora_alpha),
            ("--use_dora", bool(before.get("use_dora")), bool(now.use_dora)),
            ("--vision_lora_r", _pattern(before.get("rank_pattern")), _pattern(now.rank_pattern)),
            ("--vision_lora_alpha", _pattern(before.get("alpha_pattern")), _pattern(now.alpha_pattern)),
        ):
            if old != new:
                raise ValueError(f"{resume} was trained with {flag} {old}, now it is {new}: go on with {old}")
        if BaseRecord.read(resume).fingerprint != self.base.fingerprint:
            raise ValueError(
                f"{resume} was trained on another base than {self.base.model} (its weights differ)"
            )

    def save(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """state: gathered tensors under the model's own names, where the model itself holds only shards."""
        with without_zero_init():
            if self.kind == "adapter":
                save_adapter(self.model, self.processor, folder, base=self.base, state=state)
            elif self.kind == "projector":
                save_projector(self.model, folder / PROJECTOR_FILE, state)
            else:
                save_model(self.model, self.processor, folder, state=state)

    def restore(self, folder: Path) -> None:
        """Raises: ValueError when the folder does not fit the model."""
        if self.kind == "adapter":
            load_adapter_state(self.model, folder)
        elif self.kind == "projector":
            load_projector(self.model, folder / PROJECTOR_FILE)
        else:
            _, state, _ = read_checkpoint(folder)
            take(self.model, state, folder)

    def open_staging(self, run: Path, name: str, *, owner: bool) -> Path:
        """Temporary folder beside the final one; the owner (one process per file system) creates it empty."""
        staging = run / f"{STAGING}{name}"
        if owner:
            shutil.rmtree(staging, ignore_errors=True)  # left by a save that was killed
            staging.mkdir(parents=True)
        return staging

    def publish(self, staging: Path, final: Path) -> None:
        """Give a fully written folder its name. Until then the previous save is the newest one."""
        for file in staging.rglob("*"):
            _flush(file)
        if final.exists():  # saved again after resuming from an earlier step
            remove(final)
        staging.rename(final)
        _flush(final.parent)

    def rotate(self, run: Path, limit: int | None, best: str | None) -> None:
        """Delete the oldest checkpoints above `limit`, never the best one."""
        if limit is not None and limit > 0:
            for old in checkpoints(run)[:-limit]:
                if best is None or old != Path(best):
                    remove(old)


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Models are made whole inside, also under ZeRO-3; DeepSpeed partitions the one that trains when it takes it over.

    transformers would partition every model it makes from the moment it is made: weights that are still being read
    and resampled, and even the empty model that a save by one process compares its keys with; the others would
    then be waited for in vain.
    """
    from transformers.integrations import deepspeed as integration

    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config


def save_projector(model: nn.Module, file: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """LLaVA's names for the projector, in a safetensors file."""
    found: State = {}
    for key, tensor in (state or model.state_dict()).items():
        name = rename(key, CANONICAL) or ""
        if name.startswith("multi_modal_projector."):
            found[rename(name, LLAVA, backwards=True) or name] = of_tensor(tensor)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{STAGING}{file.name}")
    write_file(unfinished, found)
    unfinished.replace(file)


def load_projector(model: nn.Module, file: Path) -> None:
    """Replace the projector's weights. Raises: ValueError when the file is no projector of this size."""
    if not file.is_file():
        raise ValueError(f"{file}: no such projector file")
    take(model, from_projector(open_file(file), str(file)), file, part="multi_modal_projector.")


def take(model: nn.Module, state: State, where: Path, part: str = "") -> None:
    """Copy a canonical table into the running model; `part` bounds it to keys with that prefix.

    Raises: ValueError when a tensor is missing, left over, or of another shape.
    """
    target = {rename(key, CANONICAL) or key: tensor for key, tensor in model.state_dict().items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in target.items() if key.startswith(part)}
    assert_same_keys(state, wanted, str(where))
    with torch.no_grad():
        for key in wanted:
            target[key].copy_(state[key].read())


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def resume_point(args: TrainingArguments) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means (True: the newest complete one), or None to begin.

    Raises: ValueError when the run folder holds an earlier run that was neither resumed nor given up.
    """
    run = Path(args.output_dir)
    found = checkpoints(run)
    wanted = str(args.resume_from_checkpoint or "")
    if wanted.lower() == "true":
        if not found:
            args.notes.append(f"{run} holds no checkpoint yet: starting from the beginning")
        return found[-1] if found else None
    if wanted and wanted.lower() != "false":
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint {wanted}: no checkpoint of a run there")
        return Path(wanted)
    if found and not args.overwrite_output_dir:
        raise ValueError(
            f"{run} holds {found[-1].name} of an earlier run: add --resume_from_checkpoint True, "
            "--overwrite_output_dir True (deletes it), or choose another --output_dir"
        )
    if args.process_index == 0:
        for old in found:
            remove(old)
    return None


def remove(folder: Path) -> None:
    """Delete under a hidden name, so that a kill in between leaves no half folder that looks whole."""
    hidden = folder.with_name(f"{STAGING}old-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _pattern(pattern: dict[str, int] | None) -> int:
    """The tower's rank or alpha: the one entry of PEFT's pattern, or 0 where the tower has no adapter."""
    return next(iter((pattern or {}).values()), 0)


def _refusal(run: Path) -> str | None:
    """Why the disk takes nothing more, or None: torch only says that a file ended too early."""
    try:
        with tempfile.TemporaryFile(dir=run, buffering=0) as file:
            file.write(bytes(2**20))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
