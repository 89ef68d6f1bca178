"""Every command, module, script, flag, link and path that the documentation names exists."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
SHELL = {"bash", "sh", "shell", "console"}
WRITTEN_BY_A_RUN = ("playground/runs", "playground/data")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found, language, start, lines = [], None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and language is None:
            language, start, lines = fence[1], number, []
        elif fence:
            found.append(Block(page.relative_to(ROOT).as_posix(), start, language or "", "\n".join(lines)))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: the code block of line {start} is not closed"
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(place, words) of every command in every shell block; continuation lines joined, prompts dropped."""
    found = []
    for block in (block for page in PAGES for block in blocks(page) if block.language in SHELL):
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.strip() and not line.lstrip().startswith("#"):
                for part in re.split(r"\s(?:&&|\||;)\s", line):
                    found.append((f"{block.page}:{block.line}", shlex.split(part, comments=True)))
    return found


@cache
def help_of(module_or_script: str, command: str = "") -> str:
    """What `--help` prints, after a command if there is one. Run in this process: starting another one costs ten
    seconds of imports."""
    printed, words = io.StringIO(), [*command.split(), "--help"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module_or_script, *words])
        if module_or_script.endswith(".py"):  # as `python script.py` does
            patch.syspath_prepend(str((ROOT / module_or_script).parent))
        with pytest.raises(SystemExit) as end:
            run(module_or_script, words)
    assert end.value.code in (0, None), f"{module_or_script} {command} --help ends with {end.value.code}"
    return printed.getvalue()


def run(module_or_script: str, words: list[str]) -> None:
    if module_or_script.endswith(".py"):
        runpy.run_path(str(ROOT / module_or_script), run_name="__main__")
    else:
        importlib.import_module(module_or_script).main(words)


def unknown_flags(words: list[str], text: str) -> list[str]:
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))
    used = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    return [flag for flag in used if flag not in known]


def split_launcher(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Leading NAME=value words, and the rest without a launcher such as `torchrun --nproc_per_node 4`."""
    variables = {}
    while words and (match := re.match(r"([A-Z][A-Z0-9_]*)=(.*)", words[0])):
        variables[match[1]] = match[2]
        words = words[1:]
    if words and words[0] in {"nohup", "nice", "time", "exec"}:
        words = words[1:]
    if words and words[0] in {"torchrun", "deepspeed"}:
        start = next((i for i, word in enumerate(words) if word in {"-m", "--module"}), None)
        words = ["python", *words[start:]] if start else words
    return variables, words


@pytest.mark.parametrize(
    ("place", "words"), commands(), ids=lambda value: value if isinstance(value, str) else None
)
def test_command_exists(place: str, words: list[str]) -> None:
    variables, words = split_launcher(words)
    if not words:
        return
    name = Path(words[0]).name
    if name.startswith("python") and len(words) > 1:
        if words[1] in {"-m", "--module"} and words[2].startswith("geochat"):
            assert importlib.util.find_spec(words[2]), f"{place}: no module {words[2]}"
            takes_command = "COMMAND" in help_of(words[2])
            command = words[3] if takes_command and words[3:] and not words[3].startswith("-") else ""
            wrong = unknown_flags(words[3:], help_of(words[2], command))
            assert not wrong, f"{place}: unknown {wrong}"
        elif words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{place}: no script {words[1]}"
            assert not (wrong := unknown_flags(words[2:], help_of(words[1]))), f"{place}: unknown {wrong}"
    elif name in {"bash", "sh", "source"} and len(words) > 1:
        if words[1].startswith(".venv/"):
            return  # made by scripts/venv.sh, elsewhere with GEOCHAT_VENV
        script = ROOT / words[1]
        assert script.is_file(), f"{place}: no script {words[1]}"
        text = script.read_text(encoding="utf-8")
        if "launch.sh" in text:
            text += (ROOT / "scripts" / "launch.sh").read_text(encoding="utf-8")
        if "geochat.train.train" in text:
            wrong = unknown_flags(words[2:], help_of("geochat.train.train"))
            assert not wrong, f"{place}: {words[1]} does not take {wrong}"
        unread = [
            name for name in variables if name not in text and not name.startswith(("CUDA_", "OMP_", "HF_"))
        ]
        assert not unread, f"{place}: {words[1]} does not read {unread}"
    elif name == "pip" and (extras := re.search(r"\[([\w,]+)\]", " ".join(words))):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras[1].split(",")) <= set(known), f"{place}: unknown extra in {extras[0]}"


def python_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_python_example_compiles_and_its_names_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "geochat":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), (
                    f"{block.page}:{block.line}: no {node.module}.{alias.name}"
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), f"{block.page}:{block.line}: no {alias.name}"


def data_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in {"json", "toml"}]


@pytest.mark.parametrize("block", data_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_data_example_is_what_the_package_reads(block: Block) -> None:
    from geochat.data.sample import Sample
    from geochat.eval.benchmark import Benchmark

    if block.language == "json":
        record = json.loads(block.text)
        if "conversations" in record:
            Sample.from_record(record)
    else:
        table = tomllib.loads(block.text)
        if "name" in table:
            Benchmark.parse(table, ROOT, block.page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: broken link {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: no heading for {target}"
    for path in re.findall(r"`((?:scripts|docs|geochat|tests|benchmarks|playground)/[\w./-]*)`", text):
        if not path.startswith(WRITTEN_BY_A_RUN):
            assert (ROOT / path).exists(), f"{page.name}: no {path}"
    for module in re.findall(r"`(?:python -m )?(geochat\.[a-z_.]+)`", text):
        assert exists_as_name(module), f"{page.name}: no {module}"


def anchors(page: Path) -> set[str]:
    """The names that headings get on the usual forges."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def exists_as_name(dotted: str) -> bool:
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:
        pass
    module, _, name = dotted.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def test_the_documentation_is_not_empty() -> None:
    assert len(PAGES) >= 8
    assert len(commands()) >= 20
