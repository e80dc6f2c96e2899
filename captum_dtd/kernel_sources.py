"""Which sources compiled kernels were built from: in a checkout, a pull or an edit leaves them behind. It imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["digest"]


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all C++ and CUDA files in a folder and below, in hexadecimal.

    Example:
        >>> from pathlib import Path
        >>> digest(Path("captum_dtd"))[:8]  # where there are none
        'e3b0c442'
    """
    found = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.suffix in (".cpp", ".cu", ".h")):
        found.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()
