"""Any checkpoint of the family into another layout.

    python scripts/convert_checkpoint.py --source X --target Y --format hf|llava [--dtype float16] [--verify]

One tensor is in memory at a time. Adapters come out merged into their base. `--verify` reads the result back and compares
every tensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from geochat.errors import stop
from geochat.model.build import stored_dtype
from geochat.model.checkpoint import write_checkpoint
from geochat.model.export import write_llava
from geochat.model.open import Opened, open_model
from geochat.model.weights import Entry, State

WRITERS = {"hf": write_checkpoint, "llava": write_llava}


def convert(
    source: Path | str,
    target: Path | str,
    layout: str,
    *,
    base: Path | str | None = None,
    vision_tower: Path | str | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Opened:
    """Write `target` in the layout "hf" (canonical) or "llava"; returns what was read, as `open_model` does.

    Raises ValueError: unreadable source, target that is the source or cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the source itself; name another folder for the result")
    config, state, processor = open_model(source, base=base, vision_tower=vision_tower, image_size=image_size)
    dtype = dtype or stored_dtype(config)
    with tqdm(total=len(state), desc=str(target), unit="tensor", disable=not progress, leave=False) as bar:
        WRITERS[layout](target, config, _counted(state, bar), processor, dtype=dtype)
    return config, state, processor


def differences(source: State, target: State, dtype: torch.dtype) -> list[str]:
    """Keys whose values differ between two canonical tables once rounded to `dtype`; rows that only one of two
    vocabularies has are left out."""
    found = sorted(source.keys() ^ target.keys())
    for key in source.keys() & target.keys():
        ours, theirs = source[key].to(dtype).read(), target[key].to(dtype).read()
        rows = min(len(ours), len(theirs))
        if ours.shape[1:] != theirs.shape[1:] or not torch.equal(ours[:rows], theirs[:rows]):
            found.append(key)
    return found


def _counted(state: State, bar: tqdm) -> State:
    def counted(entry: Entry) -> Entry:
        def step(tensor: torch.Tensor) -> torch.Tensor:
            bar.update()
            return tensor

        return entry.map(step)

    return {key: counted(entry) for key, entry in state.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line of `scripts/convert_checkpoint.py`."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_checkpoint.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="checkpoint folder of any layout, or adapter"
    )
    parser.add_argument("--target", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--format", choices=list(WRITERS), default="hf",
        help="hf: for transformers, vLLM and geochat; llava: the original layout, for SGLang and older programs",
    )  # fmt: skip
    parser.add_argument(
        "--model-base", type=Path, help="base of an adapter, where not where the adapter says"
    )
    parser.add_argument(
        "--vision-tower", type=Path, help="CLIP folder of a model that does not hold its tower"
    )
    parser.add_argument("--image-size", type=int, help="resample the position table to this resolution")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare every tensor")
    args = parser.parse_args(argv)
    try:
        config, state, _ = convert(
            args.source,
            args.target,
            args.format,
            base=args.model_base,
            vision_tower=args.vision_tower,
            image_size=args.image_size,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
        )
        size = config.vision_config.image_size
        dtype = getattr(torch, args.dtype) if args.dtype else stored_dtype(config)
        total = sum(entry.to(dtype).nbytes for entry in state.values())
        print(
            f"{args.target}: {len(state)} tensors, {total / 1e9:.3g} GB in {dtype}, {size} px ({args.format})"
        )
        if args.verify:
            wrong = differences(state, open_model(args.target, image_size=size)[1], dtype)
            if wrong:
                raise ValueError(
                    f"{args.target}: {len(wrong)} tensors differ from the source ({', '.join(wrong[:3])})"
                )
            print(f"verified: all {len(state)} tensors equal to the source")
    except ValueError as error:
        stop(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
