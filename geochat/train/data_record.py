"""What a run draws its samples from, kept with every checkpoint: a resumed run must find the same at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geochat.data.mixture import Source
from geochat.eval.files import write_json
from geochat.model.weights import read_json
from geochat.train.arguments import DataArguments, TrainingArguments

RECORD = "data.json"

Record = dict[str, Any]


def data_record(sources: Sequence[Source], data_args: DataArguments, args: TrainingArguments) -> Record:
    """The files by their content, how they are drawn from, and the flags that decide on the order of samples.

    Images are not looked into, only their folders' names are kept.
    """
    order: Record = {
        "--data_seed": args.order_seed,
        "--global_batch_size": args.samples_per_step,
        "--group_by_modality_length": args.group_by_modality_length,
        "--share_image_prefix": args.share_image_prefix,
        "--val_share": data_args.val_share,
        "--dataloader_drop_last": args.dataloader_drop_last,
    }
    if args.share_image_prefix:  # the samples of an image are brought together in a micro-batch
        order["--per_device_train_batch_size"] = args.per_device_train_batch_size
    return {"datasets": [_dataset(source) for source in sources], "order": order}


def _dataset(source: Source) -> Record:
    return {
        "path": str(source.path),
        "sha256": source.digest(),
        "image folder": str(source.image_folder.resolve()) if source.image_folder else None,
        "weight": source.weight,
    }


def write_record(folder: Path, record: Record) -> None:
    write_json(folder / RECORD, record)


def compare_data(checkpoint: Path, now: Record, *, allow_changed: bool) -> list[str]:
    """What a user should know before the run goes on.

    Raises: ValueError, unless `allow_changed`, naming what has changed since the checkpoint was saved.
    """
    if not (checkpoint / RECORD).exists():
        return [f"{checkpoint} holds no {RECORD}: whether its data are the same was not looked at"]
    change = _change(read_json(checkpoint / RECORD), now, checkpoint)
    if change is None:
        return []
    if not allow_changed:
        raise ValueError(
            f"{change}: the run would not see the samples that it has not seen yet; put it back, or go on all the "
            "same with --allow_changed_data True"
        )
    return [f"{change}; goes on all the same, at the place where it would be with the data as they are now"]


def _change(before: Record, now: Record, checkpoint: Path) -> str | None:
    """The first difference, in words."""
    if len(before["datasets"]) != len(now["datasets"]):
        return f"{checkpoint} was trained on {len(before['datasets'])} datasets, now there are {len(now['datasets'])}"
    for old, new in zip(before["datasets"], now["datasets"], strict=True):
        if old["sha256"] != new["sha256"]:
            if old["path"] == new["path"]:
                return f"{new['path']} has changed since {checkpoint} was saved"
            return f"{new['path']} is not what {checkpoint} was trained on ({old['path']})"
        for key in ("image folder", "weight"):
            if old[key] != new[key]:
                return f"{new['path']}: its {key} was {old[key]} when {checkpoint} was saved, now it is {new[key]}"
    old, new = before["order"], now["order"]
    for flag in {**old, **new}:
        if old.get(flag) != new.get(flag):
            return f"{checkpoint} was trained with {flag} {old.get(flag)}, now it is {new.get(flag)}"
    return None
