"""Copy a model folder in float16: half the size, and exact enough for a model that was trained in float32.

python scripts/nano/keep.py SOURCE TARGET
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from geochat.model.checkpoint import load, save_model


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    model, processor = load(source, dtype=torch.float16)
    save_model(model, processor, target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters in float16")


if __name__ == "__main__":
    main()
