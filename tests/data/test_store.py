"""The instruction file store: any valid JSON, named faults, the index, several processes."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geochat.data import scan as scanner
from geochat.data.store import InstructionStore, index_paths

tricky = st.text(alphabet=st.sampled_from(list('ab\\"{}[],:\n\té船🛰/ ')), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | tricky
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(tricky, inner, max_size=4),
    max_leaves=6,
)
layouts = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, None, 0, 1, 4]),
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")]),
    }
)


def read(path: Path) -> list:
    content = path.read_bytes()
    return [json.loads(content[start:end]) for start, end in scanner.scan(path).tolist()]


@given(
    rows=st.lists(values, max_size=8),
    layout=layouts,
    around=st.tuples(st.sampled_from(["", " \n", "\ufeff"]), st.sampled_from(["", "\n", " \r\n"])),
    block=st.sampled_from([64, 128, 1 << 16]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_array_gives_its_elements(tmp_path: Path, monkeypatch, rows, layout, around, block):
    monkeypatch.setattr(scanner, "BLOCK", block)
    path = tmp_path / "rows.json"
    path.write_text(around[0] + json.dumps(rows, **layout) + around[1], encoding="utf-8", newline="")
    assert read(path) == rows


@given(
    rows=st.lists(st.dictionaries(tricky, values, min_size=1), min_size=1, max_size=6),
    ending=st.sampled_from(["", "\n", "\r\n", "\n\n \n"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_lines(tmp_path: Path, monkeypatch, rows, ending):
    monkeypatch.setattr(scanner, "BLOCK", 64)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + ending, encoding="utf-8", newline=""
    )
    assert read(path) == rows


@pytest.mark.parametrize("backslashes", [*range(10), 62, 63, 64, 65, 127, 128, 129, 130, 200])
@pytest.mark.parametrize("shift", [0, 1, 30, 61])
def test_runs_of_backslashes_across_words_and_blocks(
    tmp_path: Path, monkeypatch, backslashes: int, shift: int
):
    monkeypatch.setattr(scanner, "BLOCK", 64)
    path = tmp_path / "rows.json"
    rows = [{"a": "x" * shift + "\\" * backslashes, "b": '"}{'}, {"c": "\\" * backslashes + '"'}, {"d": 1}]
    path.write_text(json.dumps(rows))
    assert read(path) == rows


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_array_is_refused_or_its_row_is(tmp_path: Path, data):
    rows = data.draw(st.lists(st.dictionaries(tricky, values, max_size=3), min_size=1, max_size=5))
    text = json.dumps(rows)
    place = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:place] + data.draw(st.sampled_from(["", "{", '"', "]", ",", "\\"])) + text[place + 1 :]
    path = tmp_path / "rows.json"
    path.write_text(damaged)
    for index in index_paths(path):
        index.unlink(missing_ok=True)
    try:
        expected = json.loads(damaged)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert list(InstructionStore(path)) == expected
    elif expected is None and damaged.strip().startswith("["):
        with pytest.raises(ValueError, match=r"rows\.json"):
            list(InstructionStore(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("hello", "expected [ (JSON) or { (JSON Lines)"),
        ('[{"a": 1}, {"a": 2', "row 1: the file breaks off before the closing ]"),
        ('[{"a": 1}, {"a: 2}, {"b": "c"}]', "row 1: the file breaks off"),
        ('[{"a": "x}, {"b": 1}, {"c": "}"}]', "row 0: not valid JSON"),
        ('[{"a": 1} {"b": 2}]', "row 1: a missing comma at byte 10"),
        ('[{"a": 1},, {"b": 2}]', "row 1: a comma too many at byte 10"),
        ('[,{"a": 1}]', "a comma too many at byte 1"),
        ('[1, {"a": 1}, "x",]', "row 3: a comma too many at byte 18"),
        ('[{"a": 1}]{', "stands behind the closing ]"),
    ],
)
def test_a_broken_file_names_the_row(tmp_path: Path, text: str, message: str):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="train") as caught:
        InstructionStore(path)
    assert message in str(caught.value)


def test_a_broken_row_is_named_when_it_is_read(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": 1}\n\n{"a: 2}\n{"a": 3}\n')
    store = InstructionStore(path)
    assert len(store) == 3
    assert store[2] == {"a": 3}
    with pytest.raises(ValueError, match=r"train\.jsonl:row 1: not valid JSON"):
        store[1]


def test_rows_that_are_not_utf8_are_named(tmp_path: Path):
    path = tmp_path / "train.json"
    path.write_bytes(b'[{"a": "\xff"}, {"a": 1}]')
    store = InstructionStore(path)
    with pytest.raises(ValueError, match="row 0: not valid JSON"):
        store[0]
    assert store[1] == {"a": 1}


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_a_path_that_is_no_file(tmp_path: Path, path: str):
    with pytest.raises(ValueError, match="cannot be opened"):
        InstructionStore(tmp_path / path)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"id": i, "text": "x" * (i % 50)} for i in range(3000)]))
    return path


def test_the_sequence(train: Path):
    store = InstructionStore(train)
    assert len(store) == 3000
    assert store[-1]["id"] == 2999
    assert [row["id"] for row in store] == list(range(3000))
    assert store.where(17) == f"{train}:row 17"
    for row in (3000, -3001):
        with pytest.raises(IndexError):
            store[row]


def test_the_index_is_written_once_and_mapped(train: Path, monkeypatch):
    InstructionStore(train)
    assert index_paths(train)[0].exists()
    assert [path.name for path in train.parent.iterdir() if path.name.endswith(".tmp")] == []
    monkeypatch.setattr("geochat.data.store.scan", lambda path: pytest.fail("scanned again"))
    assert len(InstructionStore(train)) == 3000


@pytest.mark.parametrize("change", ["longer", "same size", "index cut", "index emptied"])
def test_a_stale_or_damaged_index_is_rebuilt(train: Path, change: str):
    InstructionStore(train)
    index = index_paths(train)[0]
    if change == "longer":
        train.write_text(json.dumps([{"id": 0}, {"id": 1}]))
    elif change == "same size":
        train.write_text(train.read_text().replace('"id": 5,', '"id": 7,'))
        os.utime(train, ns=(1, 1))
    else:
        index.write_bytes(index.read_bytes()[: 1000 if change == "index cut" else 0])
    assert list(InstructionStore(train)) == json.loads(train.read_text())


def test_a_folder_that_cannot_be_written_uses_the_cache(train: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index_paths(train)[0].mkdir()  # stands in the way, as a read-only folder does
    assert len(InstructionStore(train)) == 3000
    assert index_paths(train)[1].exists()
    monkeypatch.setattr("geochat.data.store.scan", lambda path: pytest.fail("scanned again"))
    assert len(InstructionStore(train)) == 3000


def test_without_any_place_for_the_index(train: Path, tmp_path: Path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    index_paths(train)[0].mkdir()
    assert len(InstructionStore(train)) == 3000


def test_a_pickled_store_opens_the_file_again(train: Path):
    store = pickle.loads(pickle.dumps(InstructionStore(train)))
    assert store[5]["id"] == 5


def test_forked_workers_read_side_by_side(train: Path):
    store = InstructionStore(train)
    store[0]
    children = []
    for worker in range(4):
        child = os.fork()
        if child == 0:
            right = all(store[row]["id"] == row for _ in range(3) for row in range(worker, 3000, 4))
            os._exit(0 if right else 1)
        children.append(child)
    assert all(store[row]["id"] == row for row in range(3000))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
