"""Runs a function on several ranks: real processes, gloo on the loopback, one thread each, a file as meeting point."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cognica_poe.training.parallel.ranks import Ranks

# A server that has imported torch once forks every rank: starting one takes milliseconds instead of seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tests.conftest", "cognica_poe.training.trainer"])


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """``function(ranks, *args)`` on ``world`` ranks; returns the results in rank order.

    Args:
        world: number of processes.
        function: importable (module-level) function; its first argument is the rank's ``Ranks``.
        args: picklable arguments.
        timeout: seconds after which every process is killed.

    Raises:
        AssertionError: a rank raised, died or hung; the message holds the traceback of the first rank that raised.
    """
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        processes = start_ranks(world, folder, function, *args)
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.01)
            if any(p.exitcode for p in processes):  # its peers wait for a dead rank in vain
                deadline = min(deadline, time.monotonic() + 5.0)
        hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        failures = sorted(Path(folder).glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
        if failures:
            raise AssertionError(f"{failures[0].name.replace('error-', 'rank ')}: {failures[0].read_text()}")
        results = [Path(folder) / f"result-{rank}" for rank in range(world)]
        if not all(file.is_file() for file in results):
            raise AssertionError(f"ranks {hung} hung, exit codes {[p.exitcode for p in processes]}")
        return [pickle.loads(file.read_bytes()) for file in results]


def start_ranks(world: int, folder: str | Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The processes of ``run_ranks``, under way; ``folder``, empty, is where they meet and leave results."""
    processes = [_CONTEXT.Process(target=_enter, args=(r, world, str(folder), function, args)) for r in range(world)]
    for process in processes:
        process.start()
    return processes


def _enter(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        result = function(Ranks(rank, world), *args)
        partial = Path(folder) / f"partial-{rank}"
        partial.write_bytes(pickle.dumps(result))
        partial.rename(Path(folder) / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
