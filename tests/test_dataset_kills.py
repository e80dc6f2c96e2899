"""Nothing is lost: runs that are killed, at every call that changes the disk and at random, on full disks, and two at once."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import data_sets
import halves
import killing
from data_sets import OPTIONS, make_tree, same, stored

from captum_dtd.cli import main
from captum_dtd.dataset.processes import Processes
from captum_dtd.dataset.store import running_alone

COMMAND = ["dataset", "root", *OPTIONS, "--batch-clips", "2", "--shard-clips", "2", "-o"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_sets.install_model(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def whole(folder: Path) -> Path:
    """The store of a run that nothing happens to."""
    make_tree(folder / "root", killing.MANY)
    assert main([*COMMAND, "whole", "--decoders", "0"]) == 0
    return folder / "whole"


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "captum_dtd.cli", *COMMAND, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run: subprocess.Popen[str]) -> None:
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output


def workers(pid: int) -> list[int]:
    """Processes that a process has started to work for it."""
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in started if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def parts(out: Path) -> int:
    return len(list((out / "manifest").glob("part-*.parquet")))


def killing_runs(folder: Path, *when: str) -> list[Any]:
    """What `killing` prints."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, killing.__file__, str(folder), *when],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_kill(kill: dict[str, Any], clips: int, what: object) -> None:
    """The run after the kill did what was not committed, and no more, and all is there."""
    assert kill["again"] == 0, what
    assert kill["new"] == clips - kill["committed"], what
    assert kill["same"], what
    assert kill["left"] == [], what


def test_a_kill_before_any_call_that_changes_the_disk(folder: Path) -> None:
    """And the order of these calls: maps are on the disk before the manifest names them."""
    calls, *kills = killing_runs(folder)

    clips = sum(count // data_sets.FRAMES for count in killing.FEW.values())
    shards = -(-clips // killing.SETTINGS["shard_clips"])
    maps = [f"maps.zarr/{name}/c.{{}}.0.0.0" for name in ("spatial", "temporal")]
    files = ["clips.parquet", "configuration.json", "maps.zarr/zarr.json", "manifest/all.parquet"]
    files += [f"maps.zarr/{name}/zarr.json" for name in ("spatial", "temporal")]
    files += [name.format(shard) for shard in range(shards) for name in maps]
    files += [f"manifest/part-{shard:05d}.parquet" for shard in range(shards)]
    assert {call.removeprefix("replace ") for call in calls if call.startswith("replace ")} == set(files)
    for file in files:
        place = calls.index(f"replace {file}")
        assert calls[place - 1] == f"fsync {file}.temporary"
        assert calls[place + 1] == f"fsync {Path(file).parent}"
    for made, call in enumerate(calls):
        if call.startswith("mkdir ") and call != "mkdir .":
            assert calls[made + 1] == f"fsync {Path(call.removeprefix('mkdir ')).parent}"
    assert calls.index("replace clips.parquet") < calls.index("replace configuration.json")
    for shard in range(shards):
        named = calls.index(f"replace manifest/part-{shard:05d}.parquet")
        assert all(calls.index(f"replace {name.format(shard)}") + 1 < named for name in maps)
        gathered = calls.index("replace manifest/all.parquet")
        assert named < gathered < calls.index(f"unlink manifest/part-{shard:05d}.parquet")

    assert len(kills) == len(calls)
    for call, kill in zip(calls, kills, strict=True):
        assert kill["ended"] == -signal.SIGKILL, call
        check_kill(kill, clips, call)
    committed = [kill["committed"] for kill in kills]
    assert committed == sorted(committed) and set(committed) == {0, 2, 4, 5}


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_while_what_failed_is_explained_again(folder: Path, every: int) -> None:
    """Never does a row name the maps of another."""
    calls, *kills = killing_runs(folder, "retry", str(every))
    first = calls.index("replace manifest/part-00000.parquet")
    maps = calls.index("replace maps.zarr/spatial/c.0.0.0.0")
    assert first < maps < calls.index("replace manifest/part-00000.parquet", first + 1)
    for call, kill in zip(calls[::every], kills, strict=True):
        assert kill["ended"] == -signal.SIGKILL, call
        assert kill["again"] == 0, call
        assert kill["same"], call
        assert kill["left"] == [], call


def random_seed() -> int:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed


def test_five_kills_at_random(folder: Path) -> None:
    kills = killing_runs(folder, str(random_seed()), "5")
    clips = sum(count // data_sets.FRAMES for count in killing.MANY.values())
    assert len(kills) == 5
    for kill in kills:
        print(kill)
        assert kill["ended"] in (-signal.SIGKILL, 0)  # 0: it was done already
        check_kill(kill, clips, kill)
    assert kills[0]["ended"] == -signal.SIGKILL
    committed = [kill["committed"] for kill in kills]
    assert committed == sorted(committed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_the_command_at_random(whole: Path) -> None:
    generator = random.Random(random_seed())
    begin = time.monotonic()
    finish(start("timed", "--decoders", "1"))
    usual = time.monotonic() - begin
    assert same(Path("timed"), whole)
    committed = 0
    for number in range(20):
        after = generator.uniform(0.3, 1.0) * usual
        run = start("out", "--decoders", "1")
        time.sleep(after)
        helpers = workers(run.pid) if run.poll() is None else []
        run.kill()
        run.communicate()
        print(f"run {number} killed after {after:.2f} s, {parts(Path('out'))} parts of the manifest")
        until(lambda helpers=helpers: not any(map(alive, helpers)), seconds=20)  # type: ignore[misc]
        now = len(stored(Path("out"))[0]) if Path("out/configuration.json").exists() else 0
        assert now >= committed
        committed = now
    finish(start("out", "--decoders", "1"))
    assert same(Path("out"), whole)


def test_a_killed_worker_is_replaced_and_a_second_run_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start("out", "--decoders", "1")
    until(lambda: parts(Path("out")))
    (decoder,) = workers(run.pid)
    os.kill(decoder, signal.SIGKILL)
    capsys.readouterr()
    assert main([*COMMAND, "out"]) == 2
    assert f"another run is writing to out (process {run.pid} on {socket.gethostname()})" in capsys.readouterr().err
    finish(run)
    assert same(Path("out"), whole)


@pytest.mark.slow
def test_a_killed_device_process_is_replaced(whole: Path) -> None:
    run = start("out", "--decoders", "1", "--device", "cpu", "cpu")
    until(lambda: parts(Path("out")))
    device = workers(run.pid)[0]
    helpers = workers(device)
    os.kill(device, signal.SIGKILL)
    until(lambda: not any(map(alive, helpers)), seconds=20)
    finish(run)
    assert same(Path("out"), whole)


def test_a_task_that_kills_its_process_is_given_up_and_no_other() -> None:
    with Processes(1) as processes:
        results = list(processes.map(halves.half, ((number,) for number in (2, 4, 5, 6, 8)), lambda task: -task[0]))
    assert results == [1, 2, -5, 3, 4]


def test_the_lock_goes_with_its_holder(folder: Path) -> None:
    with (
        running_alone(folder / "out"),
        pytest.raises(ValueError, match=f"process {os.getpid()} on"),
        running_alone(folder / "out"),
    ):
        pass
    with running_alone(folder / "out"):
        pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("fills a small disk, and mounting one needs rights that this process lacks (root on Linux)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_loses_nothing(whole: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "out"
    command = [*COMMAND, str(out), "--decoders", "0"]
    committed, full = [], 0
    capsys.readouterr()
    while code := main(command):
        full += 1
        assert code == 2
        error = capsys.readouterr().err
        assert "No space left on device" in error and error.count("\n") == 1
        assert not list(out.rglob("*temporary*"))
        committed.append(len(stored(out)[0]) if (out / "configuration.json").exists() else 0)
        assert full < 60
        resized = ["mount", "-o", f"remount,size={16 + 32 * full}k", str(small_disk)]
        subprocess.run(resized, check=True)
    assert full >= 4
    assert committed == sorted(committed) and committed[-1] > 0
    assert same(out, whole)
