"""Greedy answers equal those of the original LLaVA program on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from geochat.chat.engine import Chat, Request  # noqa: E402
from geochat.model.checkpoint import load  # noqa: E402


def test_answers_of_the_original_program(assets: Path) -> None:
    golden = assets / "golden"
    tower = golden / "clip-vit-tiny-patch14-336"
    model, processor = load(golden / "llava_tiny", vision_tower=tower, image_size=336, dtype=torch.float32)
    expected = json.loads((golden / "expected" / "llava" / "generation.json").read_text())
    requests = [Request.ask("Describe the image.", golden / case["image"]) for case in expected]
    answers = Chat(model, processor).answer(requests, max_new_tokens=16)
    assert [list(answer.token_ids) for answer in answers] == [case["new_ids"] for case in expected]
