"""Published files that the tests of scoring read; skipped where they are not at hand."""

from __future__ import annotations

from pathlib import Path

import pytest


def below(assets: Path, name: str) -> Path:
    folder = assets / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no published files in {folder}")
    return folder


@pytest.fixture(scope="session")
def published(assets: Path) -> Path:
    """Answers of the released GeoChat-7B to GeoChat-Bench."""
    return below(assets, "geochat_bench_answers")


@pytest.fixture(scope="session")
def rsvqa_samples(assets: Path) -> Path:
    """Folder with `rsvqa_lr` and `rsvqa_hr`, some questions of each in the published layout."""
    return below(assets, "rsvqa_lr").parent
