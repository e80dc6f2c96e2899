"""Whole data sets: every clip of every video explained, in a store that survives kills and holds maps and a table.

Needs the ``dataset`` extra: pyarrow, zarr (and so Python 3.11), and PyAV.
"""

from __future__ import annotations

try:
    import pyarrow  # noqa: F401
    import zarr
except ImportError as error:
    raise ImportError("data sets need pyarrow and zarr, Python 3.11: pip install 'captum_dtd[dataset]'") from error
if int(zarr.__version__.partition(".")[0]) < 3:
    raise ImportError(f"data sets need zarr 3, not {zarr.__version__}: pip install --upgrade 'captum_dtd[dataset]'")

from captum_dtd.dataset.configuration import Configuration
from captum_dtd.dataset.export import Exported, export_mp4, export_safetensors, export_webdataset
from captum_dtd.dataset.plots import write_plots
from captum_dtd.dataset.reader import Maps, Relevance
from captum_dtd.dataset.reader import open_store as open
from captum_dtd.dataset.run import Outcome, explain_dataset
from captum_dtd.dataset.sources import Entry, Source, find_videos
from captum_dtd.dataset.store import StoreError
from captum_dtd.dataset.summary import Summary, summarize

__all__ = [
    "Configuration",
    "Entry",
    "Exported",
    "Maps",
    "Outcome",
    "Relevance",
    "Source",
    "StoreError",
    "Summary",
    "explain_dataset",
    "export_mp4",
    "export_safetensors",
    "export_webdataset",
    "find_videos",
    "open",
    "summarize",
    "write_plots",
]
