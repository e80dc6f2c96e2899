"""A summary says what a loop over the manifest's rows says, and its table, files and pictures say the same."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import data_sets
import pyarrow as pa
from data_sets import CLASSES, RECIPE, make_tree, stored
from PIL import Image

import captum_dtd.dataset as dataset
from captum_dtd.cli import main
from captum_dtd.dataset import explain_dataset, summarize
from captum_dtd.dataset.plots import _confusion, write_plots
from captum_dtd.dataset.summary import Confusion, Group

TREE = {f"{name}/{number}.avi": 8 + number for name in CLASSES for number in range(3)}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dataset.Relevance:
    """Nine videos, one that cannot be read, and one of a class that the model does not have; no maps."""
    data_sets.install_model(tmp_path, monkeypatch)
    make_tree(tmp_path / "root", {**TREE, "unheard of/a.avi": 5})
    (tmp_path / "root" / "bend" / "broken.avi").touch()
    explain_dataset("root", "out", RECIPE, decoders=0, maps=(), batch_clips=4, shard_clips=8)
    return dataset.open("out")


def with_columns(store: dataset.Relevance, **columns: list[Any]) -> dataset.Relevance:
    """The store as if its manifest's explained rows said so."""
    for name, values in columns.items():
        rows = iter(values)
        ok = store.table["status"].to_pylist()
        place = store.table.column_names.index(name)
        column = pa.array(
            [next(rows) if status == "ok" else None for status in ok], store.table.schema.field(name).type
        )
        store.table = store.table.set_column(place, name, column)
    return store


def explained(store: dataset.Relevance) -> list[dict[str, Any]]:
    return [row for row in store.table.to_pylist() if row["status"] == "ok"]


def share(row: dict[str, Any]) -> float:
    moves, looks = sum(row["temporal_masses"]), sum(row["spatial_masses"])
    return moves / (moves + looks)


def check_group(group: dataset.Group, rows: list[dict[str, Any]]) -> None:
    """Compare with a loop over the rows that it stands for."""
    assert group.clips == len(rows)
    assert group.videos == len({row["path_bytes"] for row in rows})
    shares = sorted(share(row) for row in rows)
    assert group.temporal_share == pytest.approx(sum(shares) / len(shares))
    assert group.quantiles == pytest.approx(np.quantile(shares, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())
    moves, looks = ([sum(row[f"{part}_sums"]) for row in rows] for part in ("temporal", "spatial"))
    assert group.net == pytest.approx(sum(moves) / sum(abs(m + s) for m, s in zip(moves, looks, strict=True)))
    assert (group.temporal_sum, group.spatial_sum) == pytest.approx((sum(moves), sum(looks)))
    for part in ("temporal", "spatial"):
        assert getattr(group, f"{part}_mass") == pytest.approx(sum(row[f"{part}_mass"] for row in rows))
        profiles = [[value / sum(row[f"{part}_masses"]) for value in row[f"{part}_masses"]] for row in rows]
        expected = [sum(values) / len(rows) for values in zip(*profiles, strict=True)]
        assert getattr(group, f"{part}_frames") == pytest.approx(expected)
        assert sum(getattr(group, f"{part}_frames")) == pytest.approx(1)


def test_numbers_are_those_of_a_loop_over_the_rows(store: dataset.Relevance) -> None:
    generator = np.random.default_rng(1)
    count = len(explained(store))
    predictions = generator.integers(0, 3, count).tolist()
    store = with_columns(store, prediction=predictions, target=predictions)
    rows = explained(store)
    summary = summarize(store, top=3)

    assert (summary.clips, summary.failed, summary.target) == (len(rows) + 1, 1, "top1")
    check_group(summary.overall, rows)
    assert sorted(group.name for group in summary.classes) == sorted(CLASSES)
    shares = [group.temporal_share for group in summary.classes]
    assert shares == sorted(shares, reverse=True)
    for group in summary.classes:
        assert group.index is not None and group.name == CLASSES[group.index]
        check_group(group, [row for row in rows if row["target"] == group.index])
        taken = [
            row["label"] == group.name
            for row in rows
            if row["prediction"] == group.index and row["label_index"] is not None
        ]
        assert group.precision == pytest.approx(sum(taken) / len(taken))
        such = [row["prediction"] == group.index for row in rows if row["label"] == group.name]
        assert group.recall == pytest.approx(sum(such) / len(such))
    known = [row for row in rows if row["label_index"] is not None]
    assert len(known) == count - 1
    right = sum(row["prediction"] == row["label_index"] for row in known) / len(known)
    assert summary.overall.precision == summary.overall.recall == pytest.approx(right)

    pairs = Counter((row["label"], CLASSES[row["prediction"]]) for row in known)
    assert {(pair.label, pair.prediction): pair.clips for pair in summary.confusion} == pairs
    assert [pair.clips for pair in summary.confusion] == sorted(pairs.values(), reverse=True)
    for pair in summary.confusion:
        of = [
            share(row) for row in known if (row["label"], CLASSES[row["prediction"]]) == (pair.label, pair.prediction)
        ]
        assert pair.temporal_share == pytest.approx(sum(of) / len(of))

    ordered = sorted(rows, key=share)
    assert [clip.row for clip in summary.most_spatial] == [row["row"] for row in ordered[:3]]
    assert [clip.row for clip in summary.most_temporal] == [row["row"] for row in ordered[:-4:-1]]
    for clip in (*summary.most_spatial, *summary.most_temporal):
        (row,) = (row for row in rows if row["row"] == clip.row)
        assert (clip.id, clip.label, clip.explained) == (row["id"], row["label"], CLASSES[row["target"]])
        assert (clip.score, clip.temporal_share) == pytest.approx((row["score"], share(row)))


def test_what_has_no_relevance_or_no_label_is_not_counted_as_if_it_had(store: dataset.Relevance) -> None:
    count = len(explained(store))
    nothing = [[0.0] * data_sets.FRAMES] * count
    names = [f"{part}_{kind}" for part in ("spatial", "temporal") for kind in ("masses", "sums")]
    store = with_columns(store, **dict.fromkeys(names, nothing), label_index=[None] * count)
    summary = summarize(store)
    assert math.isnan(summary.overall.temporal_share) and math.isnan(summary.overall.net)
    assert (summary.overall.precision, summary.overall.recall) == (None, None)
    assert summary.most_temporal == summary.most_spatial == summary.confusion == ()
    assert "most driven" not in str(summary), "there is nothing to list"
    assert set(summary.overall.spatial_frames) == {0.0}
    assert "nan" in str(summary)
    assert summary.to_dict()["overall"]["temporal_share"] is None


def test_net_is_of_scores_of_both_signs(store: dataset.Relevance) -> None:
    rows = explained(store)
    names = ("spatial_sums", "temporal_sums")
    turned = {name: [[(-1) ** n * value for value in row[name]] for n, row in enumerate(rows)] for name in names}
    store = with_columns(store, **turned)
    check_group(summarize(store).overall, explained(store))


def test_what_is_too_long_for_a_line_is_shortened_and_said(store: dataset.Relevance) -> None:
    """Frames share bars where they are many; confusions are counted beyond the most frequent."""
    summary = summarize(store)
    many = tuple(Confusion(f"a{n}", f"b{n}", 1, 0.5) for n in range(13))
    frames = tuple(range(1, 65))
    long = replace(
        summary, confusion=many, overall=replace(summary.overall, spatial_frames=frames, temporal_frames=frames)
    )
    (line,) = (line for line in str(long).splitlines() if line.startswith("all "))
    assert [len(bars) for bars in line.split()[-2:]] == [16, 16]
    assert str(long).endswith("\n... and 3 pairs more")
    assert "pairs more" not in str(replace(summary, confusion=many[:10]))


def test_the_command_prints_and_writes_the_same(store: dataset.Relevance, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(store, top=2)
    capsys.readouterr()
    assert main(["summary", "out", "--top", "2", "--csv", "a.csv", "--json", "a.json", "--plots", "plots"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{summary.overall.clips} clips of 10 videos explained for the target top1, 1 failed\n")
    for clip in (*summary.most_temporal, *summary.most_spatial):
        assert f"{clip.temporal_share:.1%}  {clip.id}" in out
    (line,) = (line for line in out.splitlines() if line.startswith("all "))
    assert f"{summary.overall.temporal_share:.1%}" in line and f"{summary.overall.net:+.1%}" in line
    bars = line.split()[-2:]
    assert [len(text) for text in bars] == [data_sets.FRAMES] * 2 and all(max(text) == "█" for text in bars)

    assert json.loads(Path("a.json").read_text()) == summary.to_dict()
    with open("a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    groups = (*summary.classes, summary.overall)
    assert [line["class"] for line in lines] == [group.name for group in groups]
    for line, group in zip(lines, groups, strict=True):
        assert float(line["temporal_share"]) == group.temporal_share
        assert float(line["share_p75"]) == group.quantiles.p75
        assert [float(line[f"temporal_frame_{number}"]) for number in range(1, data_sets.FRAMES + 1)] == list(
            group.temporal_frames
        )
    assert sorted(path.name for path in Path("plots").iterdir()) == [
        "confusion.png",
        "frames.png",
        "temporal_share.png",
    ]
    for path in Path("plots").iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 10


def test_plots_draw_names_of_classes_as_they_are(store: dataset.Relevance) -> None:
    summary = summarize(store)
    summary = replace(
        summary,
        classes=tuple(replace(group, name=rf"{group.name}$\low$") for group in summary.classes),
        confusion=tuple(replace(pair, label=rf"{pair.label}$\low$") for pair in summary.confusion),
    )
    assert len(write_plots(summary, "plots")) == 3  # matplotlib knows no formula \low


def test_plots_of_clips_without_relevance(store: dataset.Relevance) -> None:
    """Of a model whose last weights are zero, say."""
    summary = summarize(store)

    def empty(group: Group) -> Group:
        frames = tuple(0.0 for _ in group.spatial_frames)
        return replace(group, temporal_share=math.nan, spatial_frames=frames, temporal_frames=frames)

    nothing = replace(summary, overall=empty(summary.overall), classes=tuple(map(empty, summary.classes)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(write_plots(nothing, "plots")) == 3


def test_classes_of_one_name_are_drawn_as_one(store: dataset.Relevance) -> None:
    summary = summarize(store)
    alike = replace(summary, confusion=tuple(replace(pair, label="a", prediction="b") for pair in summary.confusion))
    figure = _confusion(alike)
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert drawn == [str(sum(pair.clips for pair in summary.confusion))]


def test_an_unfinished_store_and_what_cannot_be_summarized(
    store: dataset.Relevance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = stored(Path("out"))
    manifest = tmp_path / "out" / "manifest" / "all.parquet"
    first = store.table.filter(pa.compute.equal(store.table["shard"], 0))
    pa.parquet.write_table(first, manifest)
    assert len(first) < len(rows)
    assert f"{len(rows) - len(first)} not there yet" in str(summarize(dataset.open("out")))
    pa.parquet.write_table(first.slice(0, 0), manifest)
    for options, message in (
        (["out"], "out has no clip that was explained"),
        (["root"], "root is no store"),
        (["nowhere"], "nowhere is no store"),
    ):
        assert main(["summary", *options, "--json", "a.json"]) == 2
        assert message in capsys.readouterr().err
    pa.parquet.write_table(first, manifest)
    assert main(["summary", "out", "--top", "-1", "--json", "a.json"]) == 2
    assert "top must be at least 0, not -1" in capsys.readouterr().err
    assert not Path("a.json").exists()
