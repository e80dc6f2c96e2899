"""Runs over a small data set that are killed: at each of their calls to the system that change the disk, or at random.

`python killing.py FOLDER` prints the calls of a run that is not killed, as a list in JSON, then an object for each kill:
how the run ended, the clips that were committed, how many clips the next run explained, and whether the store is then
that of the run that was not killed. `python killing.py FOLDER retry EVERY` does so with runs that explain what failed
before, at every so many of the calls; `python killing.py FOLDER SEED TIMES` at random moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data_sets
import pyarrow.parquet as pq
import torch

from captum_dtd.dataset import explain_dataset
from captum_dtd.recipe import Recipe

FEW = {"bend/a.avi": 9, "jack/b.avi": 13}
MANY = {f"{name}/{number}.avi": 12 + number for name in data_sets.CLASSES for number in range(5)}
SETTINGS: dict[str, Any] = {"decoders": 0, "batch_clips": 1, "shard_clips": 2, "internal_batch_size": 4}
CALLS = ("fsync", "replace", "unlink", "mkdir")
"""Of module os: all that a store's files and folders come and go by."""


def counted(videos: str, out: Path, before: Callable[[int, str], None], **options: Any) -> None:
    """Explain, and call ``before`` with the number and the name of each call about to be made in the store's folder."""
    number = 0

    def wrap(name: str) -> None:
        call = getattr(os, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal number
            subject = arguments[1] if name == "replace" else arguments[0]
            place = os.readlink(f"/proc/self/fd/{subject}") if name == "fsync" else os.fspath(subject)
            nothing = name == "mkdir" and Path(place).is_dir()
            if Path(place).absolute().is_relative_to(out.absolute()) and not nothing:
                before(number, f"{name} {Path(place).absolute().relative_to(out.absolute())}")
                number += 1
            return call(*arguments, **keywords)

        setattr(os, name, wrapped)

    for name in CALLS:
        wrap(name)
    outcome = explain_dataset(videos, out, data_sets.RECIPE, **SETTINGS, **options)
    Path(f"{out}.new").write_text(str(outcome.new))


def in_a_child(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Do it in a copy of this process, which has traced the model already; how that ended: 0, or minus a signal's number."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # makes torch's pool anew: two of autograd's threads that both find none would not
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_every_call(videos: str, begun: Path | None = None, every: int = 1, **options: Any) -> None:
    """Kill a run before each of its calls, or every so many; a run that goes on with a store that was begun, if there is one."""

    def fresh(name: str) -> Path:
        return Path(name) if begun is None else Path(shutil.copytree(begun, name))

    whole = fresh("whole")
    read, write = os.pipe()
    say = partial(print, file=os.fdopen(write, "w"), flush=True)
    assert in_a_child(lambda: counted(videos, whole, lambda _, name: say(name), **options)) == 0
    say.keywords["file"].close()
    with os.fdopen(read) as file:
        calls = file.read().splitlines()
    print(json.dumps(calls), flush=True)
    for fatal in range(0, len(calls), every):
        out = fresh(f"killed{fatal}")

        def die(number: int, _: str, fatal: int = fatal) -> None:
            if number == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        ended = in_a_child(lambda out=out, die=die: counted(videos, out, die, **options))  # type: ignore[misc]
        report(videos, out, whole, options, ended=ended)


def at_random(videos: str, seed: int, times: int) -> None:
    """Kill runs on one store, one after another, and finish copies of it."""
    begin = time.monotonic()
    whole, out = Path("whole"), Path("killed")
    assert in_a_child(lambda: counted(videos, whole, lambda *_: None)) == 0
    usual = time.monotonic() - begin
    generator = random.Random(seed)
    for number in range(times):
        after = generator.uniform(0.1, 0.5) * usual
        ended = in_a_child(lambda: counted(videos, out, lambda *_: None), after)
        copy = Path(f"copy{number}")
        shutil.copytree(out, copy) if out.exists() else None
        report(videos, copy, whole, {}, ended=ended, after=after)


def report(videos: str, out: Path, whole: Path, options: dict[str, Any], **facts: Any) -> None:
    """Let a store that a killed run left be finished, and print how that went."""
    parts = list((out / "manifest").glob("*.parquet"))
    committed = {row for part in parts for row in pq.read_table(part)["row"].to_pylist()}
    again = in_a_child(lambda: counted(videos, out, lambda *_: None, **options))
    facts |= {
        "committed": len(committed),
        "again": again,
        "new": int(Path(f"{out}.new").read_text()),
        "same": data_sets.same(out, whole),
        "left": sorted(path.name for path in out.rglob("*temporary*")),
    }
    print(json.dumps(facts), flush=True)


def at_calls_of_a_retry(every: int) -> None:
    """Kill a run that explains videos that were broken before: one could not be opened, of one some clips were missing."""
    videos = data_sets.make_tree(Path("broken"), FEW)
    good = {videos / name: (videos / name).read_bytes() for name in FEW}
    first, second = good
    first.write_bytes(b"")
    second.write_bytes(good[second][: len(good[second]) * 2 // 3])
    begun = Path("begun")
    assert in_a_child(lambda: counted(str(videos), begun, lambda *_: None, target="video")) == 0
    failed = [(row["path"], row["frame"]) for row in data_sets.stored(begun)[0] if row["status"] == "failed"]
    assert ("bend/a.avi", 0) in failed and ("jack/b.avi", 8) in failed and ("jack/b.avi", 0) not in failed, failed
    for path, data in good.items():
        path.write_bytes(data)
    at_every_call(str(videos), begun, every, target="video", retry_failed=True)


def main(folder: Path, *when: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    Recipe.load = data_sets.load_once  # type: ignore[assignment]
    # Traced here, for all children; explained only there, since the threads that autograd starts do not survive a fork.
    explainer = data_sets.load_once(data_sets.RECIPE, "cpu")
    explainer.method.method.rule_table(torch.zeros(1, 3, data_sets.FRAMES, data_sets.SIZE, data_sets.SIZE))
    if when[:1] == ("retry",):
        at_calls_of_a_retry(int(when[1]))
    elif when:
        seed, times = map(int, when)
        at_random(str(data_sets.make_tree(Path("many"), MANY)), seed, times)
    else:
        at_every_call(str(data_sets.make_tree(Path("few"), FEW)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
