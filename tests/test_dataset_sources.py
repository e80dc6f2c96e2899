"""Which videos a data set has, their order and their classes; nothing is decoded here."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from captum_dtd.dataset import Entry, find_videos
from captum_dtd.dataset.sources import escaped
from captum_dtd.recipe import class_index

UCF = ("ApplyEyeMakeup", "Hammering", "HammerThrow", "HandstandPushups", "JumpingJack", "JumpRope")
"""Out of order by bytes, as four of UCF-101's classes are."""


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    root = touch(
        tmp_path / "UCF-101",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "HammerThrow/v_HammerThrow_g01_c02.avi",
        "HammerThrow/v_HammerThrow_g01_c01.avi",
        "Hammering/v_Hammering_g01_c01.avi",
        "JumpRope/v_JumpRope_g01_c01.avi",
        "JumpingJack/v_JumpingJack_g01_c01.avi",
    )
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    index = b"".join(b"%d %s\r\n" % (n, c.encode()) for n, c in enumerate(UCF, 1))
    (lists / "classInd.txt").write_bytes(codecs.BOM_UTF8 + index)  # as Windows' editors save it
    (lists / "trainlist01.txt").write_text(
        "HammerThrow/v_HammerThrow_g01_c02.avi 3\nJumpRope/v_JumpRope_g01_c01.avi 6\n"
    )
    (lists / "testlist01.txt").write_text(
        "\ufeffHandstandPushups/v_HandStandPushups_g01_c01.avi\n\nHammerThrow/gone.avi\n", encoding="utf-8"
    )
    return root


def test_ucf101_with_its_lists_beside_it(ucf: Path) -> None:
    source = find_videos(ucf)
    assert source.classes == UCF
    assert [entry.path.decode() for entry in source.entries] == [
        "HammerThrow/v_HammerThrow_g01_c01.avi",
        "HammerThrow/v_HammerThrow_g01_c02.avi",
        "Hammering/v_Hammering_g01_c01.avi",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "JumpRope/v_JumpRope_g01_c01.avi",
        "JumpingJack/v_JumpingJack_g01_c01.avi",
    ]
    assert all(entry.label == entry.path.decode().split("/")[0] for entry in source.entries)


def test_lists_choose_videos_and_keep_their_order(ucf: Path) -> None:
    """A listed video that is missing stays, for its row to say so; the class is the folder's, not the file name's."""
    source = find_videos(ucf, ["testlist01.txt", "trainlist01.txt"])
    assert [(entry.path.decode(), entry.label) for entry in source.entries] == [
        ("HandstandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups"),
        ("HammerThrow/gone.avi", "HammerThrow"),
        ("HammerThrow/v_HammerThrow_g01_c02.avi", "HammerThrow"),
        ("JumpRope/v_JumpRope_g01_c01.avi", "JumpRope"),
    ]
    mine = ucf.parent / "mine.txt"
    mine.write_bytes(b"JumpRope/a name 7.avi 6\nJumpRope/\xff.avi\n")
    entries = find_videos(ucf, [str(mine)]).entries
    assert entries == (Entry(b"JumpRope/a name 7.avi", "JumpRope"), Entry(b"JumpRope/\xff.avi", "JumpRope"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("HammerThrow/a.avi 2", r"line 2: class 2, but classInd.txt gives the folder HammerThrow number 3"),
        ("Hammer/a.avi", r"line 2: the folder Hammer is no class"),
        ("../a.avi", r"line 2: \.\./a\.avi leaves"),
        ("/etc/passwd", r"line 2: /etc/passwd leaves"),
    ],
)
def test_lists_that_make_no_sense(ucf: Path, line: str, message: str) -> None:
    (ucf / "bad.txt").write_text(f"JumpRope/v_JumpRope_g01_c01.avi\n{line}\n")
    with pytest.raises(ValueError, match=message):
        find_videos(ucf, ["bad.txt"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("1 a\n1 b\n", "line 2"), ("a\n", "line 1"), ("1 a\n3 b\n", "must run from 1"), ("", "must run from 1")],
)
def test_class_numbers_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a/v.avi")
    (tmp_path / "classInd.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_videos(tmp_path)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "root",
        *("walk/b.MP4", "walk/a.webm", "walk/deep/er/c.avi", "jack/z.mkv"),
        *("jack/notes.txt", "jack/.hidden.avi", ".git/x.avi", "loose.avi"),
    )
    (root / "empty").mkdir()
    (root / "jack" / "again").symlink_to(root, target_is_directory=True)
    (root / "walk" / "deep" / "up").symlink_to(root / "walk", target_is_directory=True)
    (root / "walk" / "itself").symlink_to("itself")
    (tmp_path / "elsewhere").mkdir()
    touch(tmp_path / "elsewhere", "y.avi")
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    source = find_videos(root)
    assert [entry.path for entry in source.entries] == [
        b"jack/z.mkv",
        b"linked/y.avi",
        b"walk/a.webm",
        b"walk/b.MP4",
        b"walk/deep/er/c.avi",
    ]
    assert [entry.label for entry in source.entries] == ["jack", "linked", "walk", "walk", "walk"]
    assert source.classes == ("jack", "linked", "walk")
    assert source.passed_over == 3


def test_folders_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", *(f"{number}/v.avi" for number in range(12)), "readme.txt")
    source = find_videos(root)
    assert source.classes == tuple(map(str, range(12)))
    assert source.passed_over == 1
    assert find_videos(touch(root, "x/v.avi")).classes == ("0", "1", "10", "11", *map(str, range(2, 10)), "x")


def test_a_folder_that_is_no_class_of_the_index(tmp_path: Path) -> None:
    touch(tmp_path, "walk/a.avi", "run/b.avi", "lists/readme.txt")
    (tmp_path / "classInd.txt").write_text("1 walk\n")
    with pytest.raises(ValueError, match="the folder run"):
        find_videos(tmp_path)


def test_a_table_in_csv_with_any_bytes_in_its_paths(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b'path,label,start,note,aim\n"a ""b"",\nc.avi",walk,1.5,x,3\nd\xff.avi,,,y,jack\n/abs/e.avi,7,0,z,0\n'
    )
    source = find_videos(tmp_path / "t.csv", target_column="aim")
    assert source.folder == tmp_path
    assert source.classes is None
    assert source.entries == (
        Entry(b'a "b",\nc.avi', "walk", 1.5, "3"),
        Entry(b"d\xff.avi", None, None, "jack"),
        Entry(b"/abs/e.avi", "7", 0.0, "0"),
    )


def test_names_with_newlines_in_a_table_of_megabytes(tmp_path: Path) -> None:
    """However the table is cut into blocks to be read."""
    names = [f"new\nline {'x' * 60} {number}.avi" for number in range(40_000)]
    (tmp_path / "t.csv").write_text("path\n" + "".join(f'"{name}"\n' for name in names))
    assert [entry.path.decode() for entry in find_videos(tmp_path / "t.csv").entries] == names


def test_a_table_in_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"path": ["a.avi"], "label": [3], "start": pa.array([None], pa.float64())}), tmp_path / "t.parquet"
    )
    assert find_videos(tmp_path / "t.parquet").entries == (Entry(b"a.avi", "3"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", "no column path; its columns are file, label"),
        ("path;label\na;b\n", "no column path; its columns are path;label"),
        ("path, start\na.avi,1\n", "has the column ' start' with blanks in its name"),
        ("path,path\na.avi,b.avi\n", "has the column 'path' twice"),
        ("path,start\na.avi,nan\n", "row 1: start must be seconds from 0 on, not nan"),
        ("path,start\na.avi,NA\n", "cannot be read as a table"),
        ("path,start\na.avi,-1\n", "row 1: start must be seconds from 0 on, not -1"),
        ("path,start\na.avi,soon\n", "cannot be read as a table"),
        ("path,label\n,walk\n", "row 1: there is no path"),
        ("path,label\n", "no rows"),
        ("", "cannot be read as a table"),
    ],
)
def test_tables_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_videos(tmp_path / "t.csv")


def test_tables_in_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path\nb\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"t\.csv cannot be read as a table"):
        find_videos(tmp_path / "t.csv")


def test_numbers_of_a_column_with_gaps_are_whole(tmp_path: Path) -> None:
    """As pandas writes them."""
    pq.write_table(pa.table({"path": ["a", "b", "c"], "label": [1.0, None, float("nan")]}), tmp_path / "t.parquet")
    assert [entry.label for entry in find_videos(tmp_path / "t.parquet").entries] == ["1", None, None]
    assert (class_index("4.0", None, 5), class_index("1.0", ["a", "1.0"], 2), class_index("1.0", ["a", "b"], 2)) == (
        4,
        1,
        1,
    )


def test_a_start_in_words_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a"], "start": ["soon"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="row 1: start must be seconds from 0 on, not soon"):
        find_videos(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column:start: that column says which clip it is"):
        find_videos(tmp_path / "t.parquet", target_column="start")


def test_a_video_in_place_of_a_table_is_told_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "v.avi").write_bytes(b"RIFF\x00\x1b[31m,\n,,,\n" + bytes(range(256)))
    with pytest.raises(ValueError, match=r"v\.avi is a video: name a folder, or a CSV or parquet file") as caught:
        find_videos(tmp_path / "v.avi")
    assert str(caught.value).isprintable()


def test_a_published_list_in_place_of_a_table_is_told_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "ssv2.json").write_text('[{"id": "1", "template": "Moving [something]"}]')
    with pytest.raises(ValueError, match=r"ssv2\.json.*column path"):
        find_videos(tmp_path / "ssv2.json")


def test_a_video_that_is_listed_twice_is_refused(ucf: Path) -> None:
    (ucf.parent / "ucfTrainTestlist" / "again.txt").write_text("JumpRope/v_JumpRope_g01_c01.avi\n")
    with pytest.raises(ValueError, match=r"JumpRope/v_JumpRope_g01_c01\.avi twice"):
        find_videos(ucf, ["trainlist01.txt", "again.txt"])


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "root", "jack/v.avi", "walk/v.avi")
    scandir = os.scandir

    def denied(folder: bytes) -> Any:
        if os.fsencode(folder).endswith(b"jack"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=r"the folder .*root/jack may not be read") as caught:
        find_videos(tmp_path / "root")
    assert "b'" not in str(caught.value)


def test_no_name_is_not_the_working_directory(ucf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ucf)
    with pytest.raises(ValueError, match="root is empty"):
        find_videos("")


def test_nothing_to_explain(tmp_path: Path, ucf: Path) -> None:
    (tmp_path / "empty").mkdir()
    table = tmp_path / "t.csv"
    table.write_text("path\na.avi\n")
    for arguments, message in (
        ((tmp_path / "empty",), "nothing to explain"),
        ((tmp_path / "nowhere",), "no folder or table"),
        ((ucf, ["testlist07.txt"]), "no list testlist07.txt"),
        ((table, ["testlist01.txt"]), "tree of folders"),
        ((table, (), "aim"), "no column aim"),
        ((ucf, (), "aim"), "needs a table"),
    ):
        with pytest.raises(ValueError, match=message):
            find_videos(*arguments)
    # the index beside it is another tree's
    assert find_videos(touch(tmp_path / "plain", "a/v.avi")).classes == ("a",)
    touch(tmp_path / "lists", "l.txt")
    (tmp_path / "lists" / "l.txt").write_text("a/v.avi\n")
    with pytest.raises(ValueError, match=r"no classInd\.txt"):
        find_videos(tmp_path / "plain" / "a", [str(tmp_path / "lists" / "l.txt")])


def test_the_order_is_that_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the file system gives."""
    root = touch(tmp_path / "root", *(f"{c}/{n}.avi" for c in "cab" for n in (10, 9, 1)))
    expected = [f"{c}/{n}.avi".encode() for c in "abc" for n in (1, 10, 9)]
    scandir = os.scandir
    for reverse in (False, True):
        monkeypatch.setattr(
            os, "scandir", lambda path, reverse=reverse: sorted(scandir(path), key=lambda i: i.name, reverse=reverse)
        )
        assert [entry.path for entry in find_videos(root).entries] == expected


def test_escapes_can_be_told_apart_and_printed() -> None:
    names = [b"a", b"a\\n", b"a\n", b"a\xff", b"a\\xff", "a\u202eb".encode(), "ü".encode(), b"\x00"]
    texts = [escaped(name) for name in names]
    assert len(set(texts)) == len(names)
    assert all(text.isprintable() for text in texts)
    assert texts[6] == "ü"


def test_class_zero_as_an_integer_is_no_blank(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.avi", "b.avi"], "label": [0, 1], "aim": [1, 0]}), tmp_path / "t.parquet")
    assert find_videos(tmp_path / "t.parquet", target_column="aim").entries == (
        Entry(b"a.avi", "0", None, "1"),
        Entry(b"b.avi", "1", None, "0"),
    )


@pytest.mark.parametrize("start", [float("nan"), float("inf"), -0.5])
def test_a_start_that_is_no_time_is_refused(tmp_path: Path, start: float) -> None:
    pq.write_table(pa.table({"path": ["a.avi"], "start": [start]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="row 1: start must be seconds from 0 on"):
        find_videos(tmp_path / "t.parquet")
