"""RSVQA's own files and tiles, and the model that ships: from question file to scores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

from geochat.chat.engine import Chat
from geochat.chat.request import Request
from geochat.eval.files import Row, read_json, read_rows
from geochat.eval.run import main
from geochat.model.checkpoint import load

NANO = Path(__file__).resolve().parents[2] / "playground" / "nano"


@pytest.fixture
def tiles(assets: Path) -> Path:
    """The folder that holds `rsvqa_lr` and `rsvqa_hr` as published."""
    if not (assets / "data" / "rsvqa_lr").is_dir():
        pytest.skip(f"no RSVQA tiles in {assets}/data")
    return assets / "data"


@pytest.mark.parametrize("name", ["rsvqa/lr", "rsvqa/hr_phili"])
def test_real_tiles_end_to_end(
    name: str, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOCHAT_BENCHMARKS", str(tiles))
    main(["--model-path", str(NANO), "--benchmark", name, "--output", str(tmp_path), "--device", "cpu",
          "--max-new-tokens", "8"])  # fmt: skip
    answers = read_rows(tmp_path / "answers.jsonl")
    scores = read_json(tmp_path / "scores.json")
    groups = scores["tasks"][name]["strata"]["category"]
    assert sum(group["n"] for group in groups.values()) == scores["n"] == len(answers) > 100
    assert all(row["text"] is not None and row["width"] == row["height"] for row in answers)
    shown = answers if os.environ.get("GEOCHAT_ALL_TESTS") else answers[:: len(answers) // 12]
    assert alone(shown, Path(scores["image_folder"])) == [row["text"] for row in shown]


def alone(rows: list[Row], folder: Path) -> list[str]:
    """Each question by itself, with nothing kept from the one before."""
    chat = Chat(*load(NANO), prefix_bytes=0, cache_bytes=0)
    requests = [Request.ask(row["prompt"], folder / row["image"]) for row in rows]
    return [chat.answer([request], max_new_tokens=8)[0].text for request in requests]
