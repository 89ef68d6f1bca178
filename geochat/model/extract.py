"""The projector of a model as a file of its own, as the first stage of training writes it.

python scripts/extract_mm_projector.py --model-path X --output mm_projector.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from geochat.data.staged import staged
from geochat.errors import stop
from geochat.model.canonical import rename
from geochat.model.formats.llava import LLAVA
from geochat.model.open import open_model
from geochat.model.weights import State, write_file

_PROJECTOR = "multi_modal_projector."


def projector_of(state: State) -> State:
    """The projector of a canonical table under LLaVA's names, `model.mm_projector.{0,2}.{weight,bias}`."""
    return {
        str(rename(key, LLAVA, backwards=True)): entry
        for key, entry in state.items()
        if key.startswith(_PROJECTOR)
    }


def main(argv: list[str] | None = None) -> int:
    """Command line of `scripts/extract_mm_projector.py`."""
    parser = argparse.ArgumentParser(
        prog="python scripts/extract_mm_projector.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model-path", type=Path, required=True, help="model or adapter folder, any layout")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--model-base", type=Path, help="base of an adapter, where not where it says")
    parser.add_argument(
        "--vision-tower", type=Path, help="CLIP folder of a model that does not hold its tower"
    )
    args = parser.parse_args(argv)
    try:
        if args.output.suffix != ".safetensors":
            raise ValueError(f"{args.output}: pickles are read, not written; name it .safetensors")
        _, state, _ = open_model(args.model_path, base=args.model_base, vision_tower=args.vision_tower)
        try:
            with staged(args.output) as partial:
                write_file(partial, projector_of(state))
        except OSError as error:
            raise ValueError(f"{args.output}: cannot be written ({error.strerror})") from None
    except ValueError as error:
        stop(error)
    print(f"{args.output}: use it with --pretrain_mm_mlp_adapter")
    return 0
