"""The reports of `check.py` as one Markdown table, release by check; exits with 1 when a check failed.

python scripts/compat/table.py REPORT…
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = (
    "transformers", "missing / unexpected keys", "largest logit difference", "token ids", "chat prompt", "pixels",
    "processor", "token ids after its own save",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print the table, then every failure in words."""
    reports = [json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments]
    print(table(reports))
    failures = [
        f"{report['transformers']}, {row['folder']}: {failure}"
        for report in reports
        for row in report["folders"]
        for failure in row["failures"]
    ]
    folders = sorted({row["folder"] for report in reports for row in report["folders"]})
    print(f"\nFolders: {', '.join(folders)}. {'FAILED' if failures or not reports else 'PASSED'}")
    print("\n".join(failures), end="\n" if failures else "")
    return int(bool(failures) or not reports)


def table(reports: Iterable[dict[str, Any]]) -> str:
    """One row per release: sums and worst figures over its folders."""
    rows = [HEAD, ("---",) * len(HEAD), *(line(report) for report in reports)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def line(report: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one release; a check that broke off shows as "failed"."""
    folders = report["folders"]

    def total(name: str) -> int | None:
        values = [row.get(name) for row in folders]
        return sum(values) if all(isinstance(value, int) for value in values) else None

    def equal(wrong: str, of: str) -> str:
        bad, count = total(wrong), total(of)
        if bad is None or count is None:
            return "failed"
        return f"{count} of {count} equal" if not bad else f"{bad} of {count} differ"

    missing, unexpected = total("missing_keys"), total("unexpected_keys")
    logits = [row.get("logits") for row in folders]
    prompts = sum(row.get("prompt_equal") is True for row in folders)
    return (
        report["transformers"],
        "failed" if missing is None or unexpected is None else f"{missing} / {unexpected}",
        "failed" if None in logits else f"{max(logits):.2g}",
        equal("texts_wrong", "texts"),
        f"{prompts} of {len(folders)} equal",
        equal("images_wrong", "images"),
        "; ".join(sorted({row.get("processor", "failed") for row in folders})),
        equal("resaved_wrong", "texts"),
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
