"""What videos there are: a UCF-101 tree, a folder for each class, or a table of clips. Nothing is opened here."""

from __future__ import annotations

import codecs
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

__all__ = ["Entry", "Source", "escaped", "find_videos"]

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".ogv", ".ts", ".webm", ".wmv"),
)
"""Of the files in a tree of folders, those with these endings are videos; a list or a table may name any file."""

_CLASS_INDEX = "classInd.txt"
_LONGEST_REASON = 200
_LIST_FOLDERS = (".", "ucfTrainTestlist", "../ucfTrainTestlist")


@dataclass(frozen=True)
class Entry:
    """One video to explain, or one clip of it.

    Attributes:
        path: the file's name as the system stores it, relative to the source's folder.
        label: its class, by name or, in a table, by index; None if unknown.
        start: seconds at which its only clip begins; None for clips at a stride over the whole video.
        target: what the table's target column says, by name or by index; None if none was asked for.
    """

    path: bytes
    label: str | None = None
    start: float | None = None
    target: str | None = None


@dataclass(frozen=True)
class Source:
    """All videos of a data set, in an order that depends on names alone.

    Attributes:
        folder: what paths are relative to.
        entries: the videos.
        classes: class names in the order of their indices; None if the source is a table, which has no order of its own.
        passed_over: how many files of the folder were no videos by their endings, or in no class's folder.
    """

    folder: Path
    entries: tuple[Entry, ...]
    classes: tuple[str, ...] | None
    passed_over: int = 0


def find_videos(root: str | os.PathLike[str], lists: Sequence[str] = (), target_column: str | None = None) -> Source:
    """List the videos of a data set.

    Args:
        root: a folder with a subfolder for each class, or a table, CSV or parquet, with the columns path, start (seconds)
            and label, of which only path is needed; its paths are relative to the table. A folder is a UCF-101 tree if
            ``classInd.txt`` lies in it, in ``ucfTrainTestlist`` inside or beside it, or beside a list: that gives the
            order of the classes. Otherwise classes are ordered by name, or where all of their names are numbers, by these.
            Where no such folder has a video, those in the folder itself are taken; they have no class.
        lists: files such as ``testlist01.txt`` that name the videos to take, a path and perhaps a class number in each
            line; looked for where ``classInd.txt`` is, or a path. None takes every video of the tree.
        target_column: a column of the table that says which class to explain.

    Raises:
        ValueError: there is nothing to explain, or a list or table cannot be understood; the message names file and line.
        OSError: a file or folder cannot be read.

    Example::

        source = find_videos("UCF-101", ["testlist01.txt"])
        source.entries[0]                                      # Entry(path=b'ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi', ...
    """
    if not os.fspath(root):
        raise ValueError("root is empty; name the data set's folder, or a table of its videos")
    root = Path(root)
    if root.is_file():
        if lists:
            raise ValueError(f"--list goes with a tree of folders, but {root} is a table")
        return _table(root, target_column)
    if target_column is not None:
        raise ValueError(f"--target column:{target_column} needs a table, CSV or parquet, but {root} is a folder")
    if not root.is_dir():
        raise ValueError(f"there is no folder or table {root}")
    files = [_list_file(root, name) for name in lists]
    classes = _find_class_index(root, files)
    if files and classes is None:
        raise ValueError(f"lists need class numbers, but there is no {_CLASS_INDEX} in {root} or beside {files[0]}")
    if files:
        entries, passed_over = [entry for file in files for entry in _listed(file, classes or ())], 0
        if twice := next((path for path, count in Counter(entry.path for entry in entries).items() if count > 1), None):
            raise ValueError(f"the lists name {escaped(twice)} twice, and its clips would count twice: name it once")
    else:
        entries, passed_over = _tree(root, classes)
        found = dict.fromkeys(entry.label for entry in entries if entry.label is not None)
        classes = classes or tuple(sorted(found, key=int) if all(map(str.isdecimal, found)) else found)
    if not entries:
        what = "the lists name no video" if files else f"neither {root} nor a folder in it has a video"
        raise ValueError(f"nothing to explain: {what}")
    return Source(root, tuple(entries), classes, passed_over)


def escaped(name: bytes | str) -> str:
    """A file or class name as printable text: what is not printable UTF-8, and the backslash, becomes an escape sequence.

    Example:
        >>> print(escaped(b"a b.avi"), escaped(b"new\\nline \\xff.avi"))
        a b.avi new\\nline \\xff.avi
    """
    text = _text_of(name) if isinstance(name, bytes) else name
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character.isprintable() and character != "\\":
        return character
    return character.encode("unicode_escape").decode("ascii")


def _tree(root: Path, classes: Sequence[str] | None) -> tuple[list[Entry], int]:
    """The videos below each class's folder, or without any those in ``root`` itself; and how many other files there are."""
    entries: list[Entry] = []
    loose: list[Entry] = []
    passed_over = 0
    top = os.fsencode(root)
    for folder in _scan(top):
        if folder.name.startswith(b"."):
            continue
        if not _is_folder(folder):
            if _is_video(folder.name):
                loose.append(Entry(folder.name))
            else:
                passed_over += folder.name != _CLASS_INDEX.encode()
            continue
        label = _text_of(folder.name)
        if classes is not None and label not in classes:
            if any(_is_video(path) for path in _files(folder.path, (os.path.realpath(top),))):
                raise ValueError(f"the folder {escaped(label)} of {root} is no class of its {_CLASS_INDEX}")
            continue
        for path in _files(folder.path, (os.path.realpath(top),)):
            if _is_video(path):
                entries.append(Entry(os.path.relpath(path, top), label))
            else:
                passed_over += 1
    return (entries, passed_over + len(loose)) if entries else (loose, passed_over)


def _scan(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What is in a folder, by name."""
    try:
        return sorted(os.scandir(folder), key=lambda item: item.name)
    except PermissionError as error:
        raise PermissionError(
            f"the folder {escaped(folder)} may not be read: change that, or name the videos to take in a list or table"
        ) from error


def _text_of(name: bytes) -> str:
    """A name as text, whatever its bytes are; `escaped` makes it printable."""
    return name.decode("utf-8", "surrogateescape")


def _files(folder: bytes, above: tuple[bytes, ...]) -> Iterator[bytes]:
    """Files below a folder in the order of their names. Links are followed, but not into a folder that holds them.

    A folder that is named like a video is given too: it cannot be read, and then a row says so.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for item in _scan(folder):
        if item.name.startswith(b"."):
            continue
        if _is_folder(item) and not _is_video(item.name):
            yield from _files(item.path, (*above, real))
        else:
            yield item.path


def _is_folder(item: os.DirEntry[bytes]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _is_video(path: bytes) -> bool:
    return os.path.splitext(path)[1].lower() in {suffix.encode() for suffix in VIDEO_SUFFIXES}


def _list_file(root: Path, name: str) -> Path:
    for path in (*(root / folder / name for folder in _LIST_FOLDERS), Path(name)):
        if path.is_file():
            return path
    raise ValueError(f"there is no list {name} in {root}, in ucfTrainTestlist, or as a path")


def _find_class_index(root: Path, files: Sequence[Path]) -> tuple[str, ...] | None:
    """The classes of the tree's index, which lies where its lists lie; one beside the tree may be another tree's."""
    folders = {_text_of(os.fsencode(item.name)) for item in os.scandir(root)}
    for place in (*(root / folder for folder in _LIST_FOLDERS), *(file.parent for file in files)):
        if (place / _CLASS_INDEX).is_file():
            classes = _class_index(place / _CLASS_INDEX)
            if place == root or not folders.isdisjoint(classes):
                return classes
    return None


def _lines(path: Path) -> list[bytes]:
    """A file's lines, without the mark that Windows' editors put in front."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()


def _class_index(path: Path) -> tuple[str, ...]:
    """Names in the order of the numbers, which begin with 1."""
    numbered: dict[int, str] = {}
    for count, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        match = re.fullmatch(rb"\s*(\d+)\s+(.*\S)\s*", line)
        if match is None or int(match[1]) in numbered:
            raise ValueError(
                f"{path}, line {count}: expected a number of its own and a class name, got {escaped(line)}"
            )
        numbered[int(match[1])] = _text_of(match[2])
    if sorted(numbered) != list(range(1, len(numbered) + 1)) or not numbered:
        raise ValueError(f"{path}: class numbers must run from 1 to the number of classes")
    return tuple(numbered[number] for number in sorted(numbered))


def _listed(path: Path, classes: Sequence[str]) -> Iterator[Entry]:
    """A list's videos. The class is that of the folder, which need not be the one in the file's name, as in UCF-101."""
    for count, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        match = re.fullmatch(rb"(.*?)(?:\s+(\d+))?\s*", line)
        assert match is not None
        name = match[1]
        if os.path.isabs(name) or b".." in name.split(b"/"):
            raise ValueError(f"{path}, line {count}: {escaped(name)} leaves the data set's folder")
        label = _text_of(name.split(b"/")[0])
        if label not in classes:
            raise ValueError(f"{path}, line {count}: the folder {escaped(label)} is no class of {_CLASS_INDEX}")
        if match[2] is not None and classes.index(label) != int(match[2]) - 1:
            raise ValueError(
                f"{path}, line {count}: class {int(match[2])}, but {_CLASS_INDEX} gives the folder {escaped(label)} number "
                f"{classes.index(label) + 1}"
            )
        yield Entry(name, label)


def _table(path: Path, target_column: str | None) -> Source:
    if target_column in ("path", "start"):
        raise ValueError(f"--target column:{target_column}: that column says which clip it is; name another")
    columns = _columns(path, target_column)
    count = len(columns["path"])
    nothing: list[object] = [None] * count
    entries = []
    for row in range(count):
        name = columns["path"][row]
        if not name:
            raise ValueError(f"{path}, row {row + 1}: there is no path")
        start = _seconds(columns.get("start", nothing)[row])
        if start is not None and not 0 <= start < float("inf"):
            raise ValueError(f"{path}, row {row + 1}: start must be seconds from 0 on, not {columns['start'][row]}")
        entries.append(
            Entry(
                name if isinstance(name, bytes) else os.fsencode(str(name)),
                _text(columns.get("label", nothing)[row]),
                start,
                _text(columns[target_column][row]) if target_column is not None else None,
            )
        )
    if not entries:
        raise ValueError(f"nothing to explain: {path} has no rows")
    return Source(path.parent, tuple(entries), None)


def _columns(path: Path, target_column: str | None) -> Mapping[str, list[object]]:
    """The table's columns of interest as Python values.

    Raises:
        ValueError: it cannot be read, or lacks a column.
    """
    texts = {"label", target_column} - {None}
    table: pa.Table
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pyarrow.parquet.read_table(path)
        else:
            types = {"path": pa.binary(), "start": pa.float64(), **{name: pa.string() for name in texts}}
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                # "NA" and "nan" are no starts: taken for none, they would ask for the whole video.
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""]),
            )
        names = table.column_names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = escaped(" ".join(str(error).split()))
        what = "is a video" if _is_video(os.fsencode(path)) else "cannot be read as a table"
        raise ValueError(
            f"{path} {what}: name a folder, or a CSV or parquet file with a column path, and perhaps start and label "
            f"({reason[:_LONGEST_REASON]}{'...' if len(reason) > _LONGEST_REASON else ''})"
        ) from error
    if odd := next((name for name in names if names.count(name) > 1 or name != name.strip()), None):
        raise ValueError(
            f"{path} has the column {odd!r} {'twice' if names.count(odd) > 1 else 'with blanks in its name'}"
        )
    shown = ", ".join(map(escaped, names)) or "none"
    if "path" not in names:
        raise ValueError(f"{path} has no column path; its columns are {shown}")
    if target_column is not None and target_column not in names:
        raise ValueError(f"{path} has no column {target_column} to take targets from; it has {shown}")
    wanted = {"path", "start", *texts}
    return {name: table[name].to_pylist() for name in table.column_names if name in wanted}


def _seconds(value: object) -> float | None:
    """NaN where a start is no number."""
    if value is None:
        return None
    try:
        return float(str(value))
    except ValueError:
        return float("nan")


def _text(value: object) -> str | None:
    """A label or target; pandas writes the numbers of a column with gaps as floats."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return None if value is None or value == "" else str(value)
