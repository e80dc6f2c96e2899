"""Names of classes: in a file, and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from captum_dtd.recipe import class_index, read_classes

NAMES = ("bend", "jack", "walk")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"bend\njack\nwalk", NAMES),
        (b"\xef\xbb\xbfbend\r\njack\r\n\r\nwalk\r\n", NAMES),
        (b"1 bend\n2 jack\n3 walk\n", NAMES),
        (b"0 bend\n1 jack\n2 walk\n", NAMES),
        (b"2 jack\n3 walk\n1 bend\n", NAMES),
        (b"\xef\xbb\xbf1 bend\r\n2  jack \r\n3\twalk\r\n", NAMES),
        (b"10 m run\n50 m run\n100 m run\n", ("10 m run", "50 m run", "100 m run")),
        (b"1 bend\n1 jack\n", ("1 bend", "1 jack")),
        (b"1 bend\njack\n", ("1 bend", "jack")),
        (b"2 jack\n3 walk\n", ("2 jack", "3 walk")),
    ],
)
def test_classes_of_a_file(tmp_path: Path, text: bytes, names: tuple[str, ...]) -> None:
    (tmp_path / "classes.txt").write_bytes(text)
    assert read_classes(tmp_path / "classes.txt") == names


@pytest.mark.parametrize(("text", "message"), [(b"\n \n", "has no names"), (b"\xff\xfe\x00", "is not a text file")])
def test_files_without_classes(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.txt")


def test_a_class_is_found_by_its_name_or_its_index() -> None:
    names = ["Walk", "jack", "walk", "crane", "crane", "7"]
    assert [class_index(text, names, 6) for text in ("Walk", "walk", "JACK", "7", "3")] == [0, 2, 1, 5, 3]
    with pytest.raises(ValueError, match="--target WALK: classes 0, 2 are called so; give an index"):
        class_index("WALK", names, 6)
    with pytest.raises(ValueError, match="label crane: classes 3, 4 are called so"):
        class_index("crane", names, 6, "label")
    with pytest.raises(ValueError, match="--target 6 is out of range: the model has classes 0 to 5"):
        class_index("6", names, 6)
    with pytest.raises(ValueError, match="did you mean: jack"):
        class_index("jakc", names, 6)
