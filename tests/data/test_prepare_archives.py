"""Unpacking published archives: parts, CRCs, resuming after a real kill, names that are refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from geochat.data.prepare import main, safety
from geochat.data.prepare.parts import JoinedFile, next_name
from geochat.data.prepare.safety import only_writer, safe_path

INNER = "share/softwares/someone/final_images/"


def noise(seed: int, size: int = 5000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def picture(seed: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def zipped(files: dict[str, bytes], force_zip64: bool = False) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            with archive.open(name, "w", force_zip64=force_zip64) as member:
                member.write(content)
    return file.getvalue()


def cut_up(content: bytes, folder: Path, count: int = 4) -> list[Path]:
    """`split`: parts of one size, the last one shorter."""
    size = -(-len(content) // count)
    parts = [folder / f"images_parta{letter}" for letter in "abcdefgh"[:count]]
    for number, part in enumerate(parts):
        part.write_bytes(content[number * size : (number + 1) * size])
    return parts


FILES = {f"{INNER}{number:05d}.png": noise(number) for number in range(12)}


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return cut_up(zipped(FILES), tmp_path)


def instruct(parts: list[Path], output: Path, *more: str) -> list[str]:
    return ["geochat-instruct", *map(str, parts), "--output", str(output), "--quiet", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# ---------------------------------------------------------------- the parts as one file


@given(
    st.lists(st.binary(max_size=7), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 45), st.integers(0, 20)), max_size=8),
)
def test_parts_read_like_one_file(tmp_path_factory, pieces: list[bytes], reads: list[tuple[int, int]]):
    folder = tmp_path_factory.mktemp("joined")
    names = [folder / f"x{number}" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        name.write_bytes(piece)
    whole = BytesIO(b"".join(pieces))
    with JoinedFile(names) as joined, io.BufferedReader(joined, 4) as file:
        for at, count in reads:
            assert file.seek(at) == whole.seek(at)
            assert file.read(count) == whole.read(count)
        assert file.seek(0, os.SEEK_END) == whole.seek(0, os.SEEK_END)


def test_the_name_that_follows():
    assert next_name(Path("images_partaz")) == "images_partba"


# ---------------------------------------------------------------- GeoChat_Instruct


@pytest.mark.parametrize("zip64", [False, True])
def test_parts_become_one_folder(tmp_path: Path, monkeypatch, zip64: bool, capsys):
    if zip64:  # as an archive above 4 GB has it: zip64 members, and zip64 records at the end
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
    clutter = {"__MACOSX/share/._00000.png": b"x", f"{INNER}.DS_Store": b"y"}
    content = zipped(FILES | clutter, force_zip64=zip64)
    assert (b"PK\x06\x06" in content) == zip64
    parts = cut_up(content, tmp_path)
    assert main(instruct(parts[::-1], tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == {Path(name).name: content for name, content in FILES.items()}
    assert "files unpacked: 12; left out: 2" in capsys.readouterr().out


def test_a_second_run_writes_nothing_and_mends_what_is_wrong(parts, tmp_path: Path, capsys):
    out = tmp_path / "out"
    main(instruct(parts, out))
    before = (out / "00003.png").stat().st_mtime_ns
    (out / "00005.png").write_bytes(b"short")
    (out / "00006.png").write_bytes(noise(99))  # the right size, other content
    capsys.readouterr()
    main(instruct(parts, out))
    assert (
        "unpacked: 1; there already: 11; replaced, since the content differed: 1" in capsys.readouterr().out
    )
    assert (out / "00006.png").read_bytes() == noise(99)
    main(instruct(parts, out, "--recheck"))
    assert "unpacked: 1; there already: 11" in capsys.readouterr().out
    assert (out / "00003.png").stat().st_mtime_ns == before
    assert contents(out) == {Path(name).name: content for name, content in FILES.items()}


SLOWLY = """
import sys, time
from geochat.data.prepare import main, unzip
unzip.BLOCK = 4096
update = unzip.tqdm.update
unzip.tqdm.update = lambda bar, n: (time.sleep(0.002), update(bar, n))
main(sys.argv[1:])
"""


def test_a_killed_run_leaves_whole_files_and_is_resumed(tmp_path: Path, capsys):
    files = {f"{INNER}{number:05d}.png": noise(number, 150_000) for number in range(20)}
    parts, out = cut_up(zipped(files), tmp_path), tmp_path / "out"
    run = subprocess.Popen([sys.executable, "-c", SLOWLY, *instruct(parts, out)])
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.png"))) < 4 or not list(out.glob(".*.partial")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    left = {name: content for name, content in contents(out).items() if name.endswith(".png")}
    assert 4 <= len(left) < 20
    assert all(content == files[INNER + name] for name, content in left.items())
    assert main(instruct(parts, out)) == 0
    assert f"unpacked: {20 - len(left)}; there already: {len(left)}" in capsys.readouterr().out
    assert contents(out) == {Path(name).name: content for name, content in files.items()}


def test_damage_is_named_with_its_part_and_the_rest_is_unpacked(parts, tmp_path: Path, refused):
    content = bytearray(parts[1].read_bytes())
    content[len(content) // 2] ^= 1
    parts[1].write_bytes(content)
    line = refused(main, instruct(parts, tmp_path / "out"))
    assert "1 of 12 files are damaged" in line
    assert "Bad CRC-32" in line
    assert "Download images_partab again and repeat" in line
    assert len(contents(tmp_path / "out")) == 11


def drop(parts: list[Path], number: int) -> list[Path]:
    return [part for part in parts if part != parts[number]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda parts: drop(parts, 1), "images_partab is missing: after it comes images_partac"),
        (lambda parts: drop(parts, 0), "images_partaa is missing"),
        (lambda parts: drop(parts, 3), "images_partad follows it and is missing"),
        (lambda parts: parts[1:2], "images_partaa is missing"),
        (lambda parts: [*parts, parts[0]], "images_partaa is given twice"),
        (lambda parts: [*parts, parts[0].with_name("images_partag")], "images_partag: no such file"),
        (lambda parts: [parts[0].parent], ": a folder; name the parts"),
    ],
)
def test_missing_parts_are_named(parts, tmp_path: Path, refused, given: Callable, message: str):
    assert message in refused(main, instruct(given(parts), tmp_path / "out"))
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize(("number", "name"), [(1, "images_partab"), (3, "images_partad")])
def test_parts_that_are_cut_off_are_named(parts, tmp_path: Path, refused, number: int, name: str):
    whole = parts[number].read_bytes()
    parts[number].write_bytes(whole[:-40])
    line = refused(main, instruct(parts, tmp_path / "out"))
    assert f"{name} has {len(whole) - 40:,} bytes" in line or f"{name}: the list of files" in line


@pytest.mark.parametrize("name", ["images_partaa", "train2017.zip"])
def test_what_is_no_archive_is_named(tmp_path: Path, refused, name: str):
    page = tmp_path / name
    page.write_bytes(b"<html>Not found</html>")
    assert "not a zip archive; is it a web page" in refused(main, instruct([page], tmp_path / "out"))


def test_a_whole_archive_may_have_any_name(tmp_path: Path):
    for name in ("images.zip", "images"):  # the second ends in two letters, as a part does
        (tmp_path / name).write_bytes(zipped(FILES))
        main(instruct([tmp_path / name], tmp_path / f"out-{name}"))
        assert len(contents(tmp_path / f"out-{name}")) == 12


def link_member() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("link.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../escape.png", "leaves the folder"),
        ("a/../../escape.png", "leaves the folder"),
        ("..\\escape.png", "leaves the folder"),
        ("/etc/escape.png", "absolute"),
        ("C:\\escape.png", "absolute"),
        ("a\nb.png", "control characters"),
        (link_member(), "is a link"),
    ],
)
def test_unsafe_members_are_refused_before_anything_is_written(tmp_path: Path, refused, name, message: str):
    file = tmp_path / "images_partaa"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("good.png", b"good")
        archive.writestr(name, b"evil")
    assert message in refused(main, instruct([file], tmp_path / "deep" / "out"))
    assert not contents(tmp_path / "deep")
    assert not (tmp_path / "escape.png").exists()


def test_same_name_twice(tmp_path: Path, refused, capsys):
    file = tmp_path / "images_partaa"
    file.write_bytes(zipped({"a/1.png": b"one", "b/1.png": b"one", "b/2.png": b"two"}))
    main(instruct([file], tmp_path / "out"))
    assert "unpacked: 2; twice in the archive: 1" in capsys.readouterr().out
    file.write_bytes(zipped({"a/1.png": b"one", "b/1.png": b"other"}))
    line = refused(main, instruct([file], tmp_path / "out2"))
    assert "a/1.png and b/1.png differ and would both become 1.png" in line
    assert not contents(tmp_path / "out2")


def test_no_room_is_said_first(parts, tmp_path: Path, refused, monkeypatch):
    usage = type(safety.shutil.disk_usage(tmp_path))(10, 9, 1)
    monkeypatch.setattr(safety.shutil, "disk_usage", lambda _: usage)
    line = refused(main, instruct(parts, tmp_path / "out"))
    assert "98,304 bytes are needed and 1 bytes are free" in line  # twelve files of two blocks
    assert not contents(tmp_path / "out")


def test_two_runs_do_not_write_into_one_folder(parts, tmp_path: Path, refused):
    with only_writer(tmp_path / "out"):
        assert "another run is writing there" in refused(main, instruct(parts, tmp_path / "out"))


def test_the_instruction_file_is_checked_at_the_end(tmp_path: Path, refused, capsys):
    file, listing = tmp_path / "images_partaa", tmp_path / "list.json"
    file.write_bytes(zipped({f"{INNER}a.png": picture(0)}))
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": name, "image": name, "conversations": turns} for name in ("a.png", "b.png")]
    listing.write_text(json.dumps(rows))
    assert main(instruct([file], tmp_path / "out", "--annotations", str(listing))) == 1
    assert "images missing: 1\n  row 1:" in capsys.readouterr().out
    # A wrong name is said before the unpacking, not hours later.
    assert "cannot be opened" in refused(
        main, instruct([file], tmp_path / "out2", "--annotations", str(tmp_path / "gone.json"))
    )
    assert not (tmp_path / "out2").exists()


@given(st.text("aC:/\\. \n\x00é", max_size=12))
def test_safe_names_stay_inside(name: str):
    try:
        path = safe_path(name)
    except ValueError:
        return
    base = Path("/base/folder")
    assert Path(os.path.normpath(base / path)).is_relative_to(base)


# ---------------------------------------------------------------- VHM


def shard(path: Path, files: dict[str, bytes], odd: tarfile.TarInfo | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
        if odd is not None:
            tar.addfile(odd, BytesIO(bytes(odd.size)))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shard(tmp_path / "vhm/crowdai/crowdai-000000.tar", {"1.png": picture(1), "sub/2.png": picture(2)})
    shard(tmp_path / "vhm/crowdai/crowdai-000001.tar", {"3.png": picture(3), "1.png": picture(1)})
    shard(tmp_path / "vhm/fmow-small/fmow-small-000000.tar", {"1.png": picture(9)})
    return tmp_path / "vhm"


def vhm(shards: Path, output: Path, *more: str) -> list[str]:
    return ["vhm", str(shards), "--output", str(output), "--quiet", *more]


def test_shards_go_to_their_data_sets(shards: Path, tmp_path: Path, capsys):
    listing = tmp_path / "list_sft.json"
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    wanted = [("crowdAI", "1.png"), ("crowdAI", "sub/2.png"), ("fmow-small", "1.png")]
    listing.write_text(
        json.dumps([{"source_dataset": d, "image": i, "conversations": turns} for d, i in wanted])
    )
    check = ("--annotations", str(listing))
    assert main(vhm(shards, tmp_path / "base", *check)) == 1
    out = capsys.readouterr().out
    assert "no folder crowdAI for 2 images of the list; crowdai is there: --map crowdai=crowdAI" in out
    assert "3 rows, 2 with problems" in out
    assert main(vhm(shards, tmp_path / "base2", "--map", "crowdai=crowdAI", *check)) == 0
    out = capsys.readouterr().out
    assert "crowdAI: files unpacked: 3; twice in the archive: 1" in out
    assert "3 rows, 0 with problems" in out
    assert contents(tmp_path / "base2") == {
        "crowdAI/1.png": picture(1),
        "crowdAI/sub/2.png": picture(2),
        "crowdAI/3.png": picture(3),
        "fmow-small/1.png": picture(9),
    }


def test_shards_are_resumed_and_rechecked(shards: Path, tmp_path: Path, capsys):
    main(vhm(shards, tmp_path / "base"))
    good = contents(tmp_path / "base")
    target = tmp_path / "base/crowdai/3.png"
    target.write_bytes(bytes(len(picture(3))))
    (tmp_path / "base/crowdai/sub/2.png").unlink()
    capsys.readouterr()
    main(vhm(shards, tmp_path / "base"))
    assert "crowdai: files unpacked: 1; there already: 2" in capsys.readouterr().out
    assert contents(tmp_path / "base") != good
    main(vhm(shards, tmp_path / "base", "--recheck"))
    assert contents(tmp_path / "base") == good


def test_leading_folders_are_left_out(tmp_path: Path):
    shard(tmp_path / "vhm/a-000000.tar", {"./x/y/1.png": b"1", "top.txt": b"2"})
    main(vhm(tmp_path / "vhm", tmp_path / "base", "--strip-components", "1"))
    assert contents(tmp_path / "base") == {"a/y/1.png": b"1"}


def odd_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (odd_member("../x.png", tarfile.REGTYPE), "leaves the folder"),
        (odd_member("/x.png", tarfile.REGTYPE), "absolute"),
        (odd_member("x.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (odd_member("x.png", tarfile.LNKTYPE, "1.png"), "is a link"),
        (odd_member("x.png", tarfile.FIFOTYPE), "no ordinary file"),
    ],
)
def test_unsafe_members_of_a_tar_are_refused(tmp_path: Path, refused, odd: tarfile.TarInfo, message: str):
    file = shard(tmp_path / "vhm/a-000000.tar", {"1.png": b"1"}, odd)
    line = refused(main, vhm(tmp_path / "vhm", tmp_path / "base"))
    assert message in line
    assert str(file) in line
    assert set(contents(tmp_path / "base")) <= {"a/1.png"}


@pytest.mark.parametrize("where", ["data", "end", "header", "mark"])
def test_damaged_shards_are_named_and_the_others_unpacked(shards: Path, tmp_path: Path, refused, where: str):
    file = shards / "crowdai/crowdai-000001.tar"
    content = bytearray(file.read_bytes())
    second = 512 + -(-len(picture(3)) // 512) * 512
    end = second + 512 + -(-len(picture(1)) // 512) * 512
    if where == "header":
        content[second + 3] ^= 255
    else:
        del content[{"data": end - 500, "end": end, "mark": end + 100}[where] :]
    file.write_bytes(content)
    line = refused(main, vhm(shards, tmp_path / "base"))
    assert f"damaged: {file}" in line
    assert {"crowdai/1.png", "crowdai/sub/2.png", "fmow-small/1.png"} <= set(contents(tmp_path / "base"))


def test_shards_that_disagree_are_named(shards: Path, tmp_path: Path, refused):
    shard(shards / "crowdai/crowdai-000002.tar", {"1.png": picture(7)})
    line = refused(main, vhm(shards, tmp_path / "base"))
    assert "crowdai-000000.tar and" in line
    assert "crowdai-000002.tar hold different files named 1.png" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--map", "crowdAI=x"], "no shard of that name; there are crowdai, fmow-small"),
        (["--map", "crowdai"], "expected SHARDS=FOLDER"),
        (["--map", "crowdai=../x"], "expected SHARDS=FOLDER"),
    ],
)
def test_wrong_maps(shards: Path, tmp_path: Path, refused, more: list[str], message: str):
    assert message in refused(main, vhm(shards, tmp_path / "base", *more))


def test_what_is_no_tar(tmp_path: Path, refused):
    (tmp_path / "a-000000.tar").write_bytes(zlib.compress(b"x" * 9999))
    assert "not an uncompressed tar" in refused(main, vhm(tmp_path, tmp_path / "base"))
    assert "no such file" in refused(main, vhm(tmp_path / "gone.tar", tmp_path / "base"))


# ---------------------------------------------------------------- LLaVA's mix665k


@pytest.fixture
def mix(tmp_path: Path) -> list[str]:
    archives = {
        "coco": {"train2017/1.jpg": picture(1), "val2017/2.jpg": picture(2)},
        "gqa": {"images/1.jpg": picture(3)},
        "ocr-vqa": {"somewhere/111.jpg": picture(4), "somewhere/222.gif": picture(5, "GIF")},
        "textvqa": {"train_images/1.jpg": picture(6)},
        "vg": {"VG_100K/1.jpg": picture(7)},
    }
    words = ["mix665k", "--output", str(tmp_path / "data"), "--quiet"]
    for flag, files in archives.items():
        (tmp_path / f"{flag}.zip").write_bytes(zipped(files))
        words += [f"--{flag}", str(tmp_path / f"{flag}.zip")]
    (tmp_path / "vg2.zip").write_bytes(zipped({"VG_100K_2/1.jpg": picture(8)}))
    return [*words, str(tmp_path / "vg2.zip")]


WANTED = [
    "coco/train2017/1.jpg",
    "gqa/images/1.jpg",
    "ocr_vqa/images/111.jpg",
    "textvqa/train_images/1.jpg",
    "vg/VG_100K/1.jpg",
    "vg/VG_100K_2/1.jpg",
]


def test_archives_go_to_the_folders_of_the_list(mix: list[str], tmp_path: Path):
    assert main(mix) == 0
    assert set(contents(tmp_path / "data")) == {*WANTED, "ocr_vqa/images/222.gif"}


def test_missing_images_are_counted_by_folder_and_suffixes_mended(mix: list[str], tmp_path: Path, capsys):
    listing = tmp_path / "mix.json"
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    names = [*WANTED, "ocr_vqa/images/222.jpg", "ocr_vqa/images/333.jpg", "gqa/images/9.jpg"]
    rows = [{"id": name, "image": name, "conversations": turns} for name in names]
    rows.append({"id": "text", "conversations": [turns[0] | {"value": "q"}, turns[1]]})
    listing.write_text(json.dumps(rows))
    check = ["--annotations", str(listing), "--missing", str(tmp_path / "missing.json")]
    assert main([*mix, *check]) == 1
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert table["ocr_vqa/images"] == ["3", "1", "1"]
    assert table["gqa/images"] == ["2", "1", "0"]
    assert table["coco/train2017"] == ["1", "0", "0"]
    assert json.loads((tmp_path / "missing.json").read_text()) == [
        "ocr_vqa/images/333.jpg",
        "gqa/images/9.jpg",
    ]
    assert main([*mix, *check, "--mend"]) == 1
    mended = tmp_path / "data/ocr_vqa/images/222.jpg"
    assert mended.read_bytes() == picture(5, "GIF")
    assert "images that got the name of the list: 1" in capsys.readouterr().out
    (tmp_path / "data/ocr_vqa/images/333.jpg").write_bytes(picture(4))
    (tmp_path / "data/gqa/images/9.jpg").write_bytes(picture(4))
    assert (
        main(["mix665k", "--output", str(tmp_path / "data"), "--quiet", "--annotations", str(listing)]) == 0
    )


def test_wrong_archives_and_flags(mix: list[str], tmp_path: Path, refused):
    wrong = ["mix665k", "--output", str(tmp_path / "out"), "--quiet", "--coco", str(tmp_path / "gqa.zip")]
    assert "holds nothing for coco/; expected train2017.zip" in refused(main, wrong)
    assert "need the list: --annotations" in refused(main, [*mix, "--mend"])
