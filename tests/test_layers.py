"""Imports go downward only; the data floor and `import geochat` load no torch."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import geochat

PACKAGE = Path(geochat.__file__).parent
MAY_IMPORT = {
    "data": {"data"},
    "model": {"data", "model"},
    "chat": {"data", "model", "chat"},
    "eval": {"data", "model", "chat", "eval"},
    "train": {"data", "model", "chat", "eval", "train"},
    "serve": {"data", "model", "chat", "serve"},
}


def floors_imported(file: Path) -> set[str]:
    """Names right below `geochat` that the file imports, at any depth of its code."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import in full (from geochat.…)"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == "geochat" and len(part) > 1}


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_go_downward_only(floor: str) -> None:
    for file in (PACKAGE / floor).rglob("*.py"):
        above = floors_imported(file) & MAY_IMPORT.keys() - MAY_IMPORT[floor]
        assert not above, f"{file.relative_to(PACKAGE)} imports from {sorted(above)}"


def run_fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_geochat_and_data_without_torch() -> None:
    modules = [f"geochat.data.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE / "data")])]
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        f"for name in ['geochat', *{modules!r}]: importlib.import_module(name)\n"
        "import geochat; geochat.Box, geochat.parse_boxes\n"
    )
    result = run_fresh(code)
    assert result.returncode == 0, result.stderr


def test_scoring_without_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "import geochat.eval.benchmark, geochat.eval.metrics, geochat.eval.score, geochat.eval.submit\n"
    )
    result = run_fresh(code)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_found_and_a_wrong_one_is_named() -> None:
    for name in geochat.__all__:
        assert getattr(geochat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Boxes'"):
        geochat.__getattr__("Boxes")


def test_generation_and_record_keys_have_one_owner() -> None:
    """The decoding loop stands in one file: only there does a model remember keys and values, and nobody lets
    transformers generate beside it."""
    files = {
        file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8")
        for file in PACKAGE.rglob("*.py")
    }
    assert [name for name, text in files.items() if "use_cache=True" in text] == ["chat/batch.py"]
    assert not [name for name, text in files.items() if ".generate(" in text]
    assert [name for name, text in files.items() if '"conversations"' in text] == ["data/sample.py"]
