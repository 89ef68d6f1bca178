"""Where benchmarks are found: those that ship with the package, and users' TOML files; a file may hold several variants.

[variants.lr]            # one more benchmark, NAME/lr: the keys above, with these instead
questions = "lr.jsonl"
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

BUILT_IN = Path(__file__).parent / "benchmarks"


def known() -> list[str]:
    """Names of the benchmarks that ship: `aid`, `vhm/presence`, …"""
    names: list[str] = []
    for path in sorted(BUILT_IN.glob("*.toml")):
        variants = _read(path).get("variants")
        names += [f"{path.stem}/{variant}" for variant in variants] if variants else [path.stem]
    return names


def find(name: str | Path) -> tuple[dict[str, Any], Path, str]:
    """A benchmark's table, the folder that its paths start at, and what to call its place in a message.

    `name` is that of a benchmark that ships, or a TOML file, or TOML_FILE/VARIANT. ValueError if there is none.
    """
    path, variant = Path(name), ""
    if path.suffix != ".toml" and path.parent.suffix == ".toml":
        path, variant = path.parent, path.name
    root = path.parent
    if path.suffix != ".toml":
        stem, _, variant = str(name).partition("/")
        path = BUILT_IN / f"{stem}.toml"
        root = Path(os.environ.get("GEOCHAT_BENCHMARKS", "playground/data/eval"))
        if not path.is_file():
            raise ValueError(f"no benchmark {str(name)!r}; known: {', '.join(known())}, or a .toml file")
    return _choose(_read(path), variant, str(path)), root, f"{path}/{variant}" if variant else str(path)


def _choose(table: dict[str, Any], variant: str, where: str) -> dict[str, Any]:
    variants = table.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(keys, dict) for keys in variants.values()):
        raise ValueError(f"{where}: variants must be tables, [variants.NAME]")
    if variant not in variants and (variant or variants):
        listed = ", ".join(f"{table.get('name')}/{one}" for one in variants) or "none"
        raise ValueError(f"{where}: there is no variant {variant!r}; its variants: {listed}")
    if variant:
        table |= {**variants[variant], "name": f"{table.get('name')}/{variant}"}
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
