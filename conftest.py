"""Doctests of what an optional package is missing for are left out; the tests say so."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("zarr") and find_spec("pyarrow") else ["captum_dtd/dataset/*"]
