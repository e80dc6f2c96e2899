"""The same store from a Ray cluster, whatever dies there: a real one, of two machines that are this one."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")
pytest.importorskip("ray", reason="Ray is not installed")

import data_sets
import killing
import ray
from data_sets import OPTIONS, RECIPE, make_tree, same, stored
from ray.cluster_utils import Cluster

from captum_dtd.cli import main
from captum_dtd.dataset import engine_ray, explain_dataset
from captum_dtd.dataset.job import Job
from captum_dtd.dataset.store import Store, read_clips, read_configuration
from captum_dtd.dataset.work import plan

SETTINGS: dict[str, Any] = {"batch_clips": 1, "shard_clips": 3, "internal_batch_size": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_sets.install_model(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines of one core each; this process is connected to them."""
    machine = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        cluster.add_node(**machine)
        cluster.connect()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def workers(cluster: Cluster, kind: str) -> list[int]:
    """The cluster's processes that hold an actor of a kind."""
    found = []
    for node in cluster.list_all_nodes():
        raylet = node.all_processes["raylet"][0].process.pid
        for thread in Path(f"/proc/{raylet}/task").iterdir():
            for child in (thread / "children").read_text().split():
                if kind.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def ended(cluster: Cluster, kind: str) -> bool:
    """Whether none of these processes is left within a minute."""
    end = time.monotonic() + 60
    while workers(cluster, kind) and time.monotonic() < end:
        time.sleep(0.1)
    return not workers(cluster, kind)


@pytest.mark.parametrize("target", ["top1", pytest.param("video", marks=pytest.mark.slow)])
def test_either_engine_goes_on_and_a_killed_worker_changes_nothing(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Begun here until the disk is full, continued on the cluster until it is full again, and ended here."""
    make_tree(folder / "root", killing.MANY)
    explain_dataset("root", "whole", RECIPE, decoders=0, target=target, **SETTINGS)
    shards = -(-len(stored(Path("whole"))[0]) // SETTINGS["shard_clips"])
    committed: list[int] = []
    full_after = [2, shards - 2]
    killed: list[int] = []
    commit = Store.commit

    def watched(self: Store, shard: int, rows: list[Any]) -> None:
        if len(committed) in full_after:
            raise OSError("the disk is full")
        commit(self, shard, rows)
        committed.append(shard)
        if len(committed) == 5:
            killed.append(workers(cluster, "_Explaining")[0])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Store, "commit", watched)
    with pytest.raises(OSError, match="the disk is full"):
        explain_dataset("root", "out", RECIPE, decoders=0, target=target, **SETTINGS)
    assert committed == [0, 1]
    full_after.remove(2)
    with pytest.raises(OSError, match="the disk is full"):
        explain_dataset("root", "out", RECIPE, engine="ray", target=target, **SETTINGS)
    assert killed
    assert len(committed) == len(set(committed)) == shards - 2
    assert ended(cluster, "MapWorker")
    full_after.clear()
    assert explain_dataset("root", "out", RECIPE, decoders=0, target=target, **SETTINGS).failed == 0
    assert sorted(committed) == list(range(shards))
    assert same(Path("out"), Path("whole"))


def test_what_takes_its_process_down_again_and_again(cluster: Cluster, folder: Path) -> None:
    """A video that does so to its decoder is a row with the error; anything that does so to the model ends the run."""
    make_tree(folder / "root", killing.FEW)
    explain_dataset("root", "out", RECIPE, decoders=0, **{**SETTINGS, "batch_clips": 3})
    configuration, clips = read_configuration(Path("out")), read_clips(Path("out"))
    assert configuration is not None
    job = Job("root", Path("out"), configuration, clips, configuration.recipe)
    (work, _) = plan(clips, range(len(clips)), configuration)
    bad = work.batches[0][-1]
    assert bad.path != work.batches[0][0].path
    machine = engine_ray._Cluster("cpu", explainers=1, decoders=1, cores=1, threads=1)

    def result(actor: type[Any], given: object, deaths: dict[tuple[str, int], int], job: Job = job) -> Any:
        counter = engine_ray._begin_counting()
        for what, count in deaths.items():
            assert ray.get([counter.begin.remote(what) for _ in range(count)]) == list(range(1, count + 1))
        process = actor(job, machine, counter, os.getcwd())
        return pickle.loads(process({"item": pickle.dumps(given)})["item"])

    for deaths in (1, 2):
        pixels = result(engine_ray._Decoding, (work, None), {("decode", bad.row): deaths})
        _, rows, *_ = result(engine_ray._Explaining, pixels, {("explain", 0): 2})
        errors = {row.clip.row: row.columns["error"] for row in rows}
        lost = "the process that decoded this video died, twice" if deaths == 2 else None
        assert errors == {**dict.fromkeys(range(3)), bad.row: lost}
    failure = result(engine_ray._Explaining, pixels, {("explain", 0): 3})
    assert "RuntimeError: the process that explains bend/a.avi@0 and those after it died 3 times" in failure.text
    other = Job("root", Path("out"), replace(configuration, weights_digest="another"), clips, configuration.recipe)
    assert "are not those where the run was started" in result(engine_ray._Explaining, pixels, {}, other).text
    elsewhere = Job("nowhere", Path("out"), configuration, clips, configuration.recipe)
    assert (
        "there is no folder nowhere on this machine" in result(engine_ray._Decoding, (work, None), {}, elsewhere).text
    )


def test_what_a_cluster_cannot_do_is_told(
    cluster: Cluster, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(folder / "root", {"bend/a.avi": 4})
    command = ["dataset", "root", *OPTIONS, "--engine", "ray", "-o", "out"]
    for options, message in (
        (["--device", "cuda"], "the Ray cluster has no GPU"),
        (["--device", "cuda:0", "cuda:1"], "the device is cpu or cuda, not cuda:0 cuda:1"),
        (["--decoders", "0"], "there must be at least 1 decoder, not 0"),
    ):
        assert main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "captum_dtd.dataset.engine_ray")
    assert main(command) == 2
    assert "pip install 'captum_dtd[ray]'" in capsys.readouterr().err
    assert not Path("out").exists()
