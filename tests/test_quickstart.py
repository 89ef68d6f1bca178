"""The quickstart script itself, with few scenes: every step runs and leaves what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quickstart_leaves_what_it_promises(tmp_path):
    out = tmp_path / "run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = {"OUT": str(out), "TRAIN": "32", "TEST": "3", "GEOCHAT_VENV": "none", "PATH": path}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh")],
        env=os.environ | small,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "largest logit gap" in done.stdout.lower()
    for name in (
        "report/index.html",
        "adapter/loss.png",
        "adapter/adapter_config.json",
        "merged/config.json",
        "answer.png",
    ):
        assert (out / name).stat().st_size > 0, name
    for model in ("base", "merged"):
        scores = json.loads((out / f"scores-{model}" / "scores.json").read_text())
        assert scores
    assert str(out / "report" / "index.html") in done.stdout
