"""Any checkpoint of the family into another layout.

    python scripts/convert_checkpoint.py --source X --target Y --format hf|llava|gguf|peft [--dtype float16] [--verify]

One tensor is in memory at a time. Adapters come out merged into their base, but for `--format peft`. A conversion that
was killed goes on where it was when the command is given again. `--verify` reads the result back and compares every
tensor, the token ids of a text, and the logits of a probe.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from geochat.errors import stop
from geochat.model.base import OnBase
from geochat.model.build import stored_dtype
from geochat.model.canonical import instantiate
from geochat.model.checkpoint import write_checkpoint
from geochat.model.export import TABLES, write_llava
from geochat.model.export_adapter import write_adapter
from geochat.model.export_gguf import write_gguf
from geochat.model.formats.gguf_file import is_gguf
from geochat.model.formats.xtuner import is_training_checkpoint
from geochat.model.open import Opened, open_adapter, open_model, open_training_checkpoint, recognise
from geochat.model.probe import largest_gap, probe_logits
from geochat.model.weights import State, resume_key

WRITERS: dict[str, Any] = {"hf": write_checkpoint, "llava": write_llava, "gguf": write_gguf}
FORMATS = (*WRITERS, "peft")
_TEXT = "USER: Wo liegt der Hafen? ASSISTANT: {<12><34><56><78>|<9>}  « naïve » 港 "


@dataclass(frozen=True)
class Source:
    """What to convert, and what its files do not say."""

    path: Path
    base: Path | None = None
    vision_tower: Path | None = None
    image_size: int | None = None
    llm_alpha: float | None = None
    tower_alpha: float | None = None
    allow_pickle: bool = False
    """The last three are for XTuner's training checkpoints; see `geochat.model.formats.xtuner`."""

    def on_base(self) -> OnBase:
        """The adapter beside its base."""
        places: dict[str, Any] = {
            "base": self.base,
            "vision_tower": self.vision_tower,
            "image_size": self.image_size,
        }
        if is_training_checkpoint(self.path):
            return open_training_checkpoint(
                self.path,
                **places,
                llm_alpha=self.llm_alpha,
                tower_alpha=self.tower_alpha,
                trusted=self.allow_pickle,
            )
        if recognise(self.path) not in ("adapter", "xtuner"):
            raise ValueError(f"{self.path}: is no adapter; --format peft takes adapters only")
        return open_adapter(self.path, **places)

    def open(self) -> Opened:
        """The whole model, adapters merged when they are read."""
        if is_training_checkpoint(self.path):
            return self.on_base().merged()
        return open_model(
            self.path, base=self.base, vision_tower=self.vision_tower, image_size=self.image_size
        )


def convert(
    source: Source,
    target: Path | str,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Opened:
    """Write `target` in one of the `FORMATS`; returns what was read, as `open_model` does.

    Raises ValueError: unreadable source, target that is the source or cannot be written.
    """
    target = Path(target)
    own = source.path.parent if is_gguf(source.path) and source.path.is_file() else source.path
    if target.exists() and target.samefile(own):
        raise ValueError(f"{target}: is the source itself; name another folder for the result")
    if layout == "peft":
        beside = source.on_base()
        rounded = replace(beside, adapter=beside.adapter.to(dtype))
        write_adapter(target, rounded)
        return rounded.merged()
    config, state, processor = source.open()
    for part in {entry.file.parent for entry in state.values() if entry.file is not None}:
        if target.exists() and target.samefile(part):
            raise ValueError(f"{target}: is read by the conversion; name another folder for the result")
    dtype = dtype or stored_dtype(config)
    key = resume_key(state, [source.path, source.base, source.vision_tower], layout, dtype, source)
    WRITERS[layout](target, config, state, processor, dtype=dtype, resume=key, progress=progress)
    return config, state, processor


def verify(
    source: Opened, target: Path, dtype: torch.dtype | None, *, probe: bool = True, cut: bool = False
) -> str:
    """What was found equal when `target` is read back. Raises ValueError that names what differs.

    dtype: to which the target was rounded; None: not at all. probe: run both models, one after the other.
    cut: whether the layout holds only the tokenizer's own rows of the vocabulary.
    """
    config, state, processor = source
    again = open_model(target, image_size=config.vision_config.image_size)
    wrong = differences(state, again[1], dtype or torch.float32, processor.own_tokens if cut else None)
    if wrong:
        raise ValueError(f"{target}: {len(wrong)} tensors differ from the source ({', '.join(wrong[:3])})")
    ours, theirs = (p.tokenizer(_TEXT).input_ids for p in (processor, again[2]))
    if ours != theirs:
        raise ValueError(f"{target}: its tokenizer makes other ids ({ours[:8]}…, {theirs[:8]}…)")
    found = f"all {len(state)} tensors equal to the source, token ids too"
    if not probe:
        return found
    answers: list[list[torch.Tensor]] = []
    for name, (model_config, table, own) in (("source", source), (str(target), again)):
        model = instantiate(model_config, table, name, dtype=dtype or torch.float32)
        answers.append(probe_logits(model, own))
        del model
    gap = largest_gap(answers[0], answers[1], processor.own_tokens)
    if not gap <= 1e-5:
        raise ValueError(
            f"{target}: a logit differs from the source's by {gap:.3g} though the tensors are equal"
        )
    return f"{found}; largest logit gap {gap:.3g}"


def differences(source: State, target: State, dtype: torch.dtype, rows: int | None = None) -> list[str]:
    """Keys whose values differ between two canonical tables once rounded to `dtype`; rows that only one of two
    vocabularies has are left out, and those from `rows` on, which a layout does not hold."""
    found = sorted(source.keys() ^ target.keys())
    for key in source.keys() & target.keys():
        ours, theirs = source[key].to(dtype).read(), target[key].to(dtype).read()
        known = min(len(ours), len(theirs), rows if rows and key in TABLES else len(ours))
        if ours.shape[1:] != theirs.shape[1:] or not torch.equal(ours[:known], theirs[:known]):
            found.append(key)
    return found


def parser() -> argparse.ArgumentParser:
    """Flags of `scripts/convert_checkpoint.py`."""
    flags = argparse.ArgumentParser(
        prog="python scripts/convert_checkpoint.py", description=__doc__.splitlines()[0]
    )
    add = flags.add_argument
    add("--source", type=Path, required=True, help="checkpoint folder of any layout, adapter, or iter_N.pth")
    add("--target", type=Path, required=True, help="folder to write")
    add(
        "--format", choices=list(FORMATS), default="hf",
        help="hf: for transformers, vLLM and geochat; llava: the original layout, for SGLang and older programs; "
        "gguf: two files for llama.cpp; peft: an adapter as an adapter, for geochat and PEFT",
    )  # fmt: skip
    add("--model-base", type=Path, help="base of an adapter, where not where the adapter says")
    add("--vision-tower", type=Path, help="CLIP folder of a model that does not hold its tower")
    add("--image-size", type=int, help="resample the position table to this resolution")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    add("--verify", action="store_true", help="read the result back: compare tensors, token ids and logits")
    add("--no-probe", action="store_true", help="with --verify: no logits (loads no whole model)")
    add(
        "--allow-pickle",
        action="store_true",
        help="unpickle all of an iter_N.pth; the file can then run code",
    )
    add("--lora-alpha", type=float, help="of an iter_N.pth's language model (default: half of its rank)")
    add("--vision-lora-alpha", type=float, help="of an iter_N.pth's tower (default: a quarter of its rank)")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Command line of `scripts/convert_checkpoint.py`."""
    args = parser().parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    source = Source(
        args.source, args.model_base, args.vision_tower, args.image_size,
        args.lora_alpha, args.vision_lora_alpha, args.allow_pickle,
    )  # fmt: skip
    try:
        opened = convert(source, args.target, args.format, dtype=dtype)
        config = opened[0]
        print(f"{args.target}: {args.format}, {_size(args.target)}, {config.vision_config.image_size} px")
        dtype = None if args.format == "peft" else dtype or stored_dtype(config)
        if args.verify:
            cut = args.format in ("llava", "gguf")
            print(f"verified: {verify(opened, args.target, dtype, probe=not args.no_probe, cut=cut)}")
    except ValueError as error:
        stop(error)
    return 0


def _size(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e9:.3g} GB"


if __name__ == "__main__":
    raise SystemExit(main())
