"""``python -m benchmarks.stages``: a line of ranks under local losses, delayed gradients, and a plain pipeline.

For each it prints what is counted (``benchmarks.schedules``: bytes, share of a step idle with stages of equal work and
a backward of twice a forward) beside what processes over gloo did: bytes handed to the neighbours, share of the step
spent waiting for them, tokens/s. All of a number of ranks run in turn, ``--rounds`` times, and medians are shown. With
fewer free cores than ranks the waiting is that for a core.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import tyro

from benchmarks.schedules import SCHEDULES, boundary_bytes, replay
from cognica_poe.cli.output import print_table
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import ModelRecipe, ObjectiveRecipe, OptimizerRecipe
from cognica_poe.training.build import build_model
from cognica_poe.training.parallel import delayed, stages
from cognica_poe.training.parallel.delayed import DelayedStageMuonAdamW, DelayedStageObjective
from cognica_poe.training.parallel.ranks import Pending, Ranks, join_ranks
from cognica_poe.training.parallel.stages import StageParallelMuonAdamW, StageParallelObjective

LAYERS_PER_STAGE, STAGES = 3, 4
EXITS = ObjectiveRecipe(exit_weights=(0.2, 0.2, 0.2, 1.0), gradient_delay=1)


@dataclass(frozen=True)
class Workload:
    """One schedule on a number of ranks."""

    schedule: str
    ranks: int
    width: int = 256
    length: int = 256
    rows: int = 2
    """Rows of a micro-batch."""
    micro_batches: int = 8
    steps: int = 6


class Counter:
    """Bytes that this process sends to its neighbours, and seconds that it waits for theirs."""

    def __init__(self) -> None:
        self.bytes, self.seconds, self._send = 0, 0.0, dist.isend

    def send(self, x: torch.Tensor, to: int) -> dist.Work | None:
        """``dist.isend``, counted."""
        self.bytes += x.numel() * x.element_size()
        return self._send(x, to)

    def watch(self) -> None:
        """Count what the objectives of a line send and wait for."""
        counter = self

        class Watched(Pending):
            def wait(self) -> None:
                began = time.perf_counter()
                super().wait()
                counter.seconds += time.perf_counter() - began

        dist.isend = self.send
        for module in (stages, delayed):
            module.Pending = Watched  # type: ignore[attr-defined,misc]


def model_of(work: Workload) -> ModelRecipe:
    """Stages of equal work."""
    return ModelRecipe(
        vocab_size=1024,
        hidden_size=work.width,
        intermediate_size=4 * work.width,
        num_hidden_layers=LAYERS_PER_STAGE * STAGES,
        num_attention_heads=work.width // 64,
        num_key_value_heads=work.width // 64,
        head_dim=64,
        max_position_embeddings=work.length,
        window_pattern="L",
        poe_mode="flat" if work.schedule == "flat" else "hier",
        poe_stage_layers=(LAYERS_PER_STAGE,) * STAGES,
        stage_head_rank=32,
    )


def measure(work: Workload, ranks: Ranks) -> dict[str, float]:
    """Bytes that the line sends in a step, mean share that its ranks wait, tokens/s. Medians over steps."""
    counter = Counter()
    counter.watch()
    model, optimizer = build_model(model_of(work)).train(), OptimizerRecipe()
    tokens = work.rows * work.length * work.micro_batches
    if work.schedule == "flat":
        objective = StageParallelObjective(model, torch.float32, ranks)
        update = StageParallelMuonAdamW(objective, optimizer, tokens)
    else:
        objective = DelayedStageObjective(model, torch.float32, ranks, work.micro_batches, options=EXITS)
        update = DelayedStageMuonAdamW(objective, optimizer, tokens)
    generator = torch.Generator().manual_seed(0)
    sent, waited, took = [], [], []
    for _ in range(work.steps):
        ids = torch.randint(1024, (work.micro_batches, work.rows, work.length + 1), generator=generator)
        counter.bytes, counter.seconds, began = 0, 0.0, time.perf_counter()
        for rows in ids:
            objective.backward(rows[:, :-1], rows[:, 1:], 1.0 / work.micro_batches)
        if work.schedule == "pipeline":
            objective.drain()  # nothing stays under way: a pipeline that is emptied at the end of its step
        meeting = time.perf_counter()
        dist.barrier()
        counter.seconds += time.perf_counter() - meeting
        update.step(1.0, 0.9, 1.0)
        update.zero_grad()
        took.append(time.perf_counter() - began)
        sent.append(counter.bytes)
        waited.append(counter.seconds / took[-1])
    if work.schedule == "delayed":
        objective.drain()
    everybody: list[tuple[int, float, float]] = [(0, 0.0, 0.0)] * ranks.world
    dist.all_gather_object(everybody, (sent[-1], statistics.median(waited[1:]), statistics.median(took[1:])))
    of_all, waits, seconds = zip(*everybody, strict=True)
    speed = tokens / statistics.mean(seconds)
    return {"bytes": float(sum(of_all)), "waiting": statistics.mean(waits), "tokens_per_s": speed}


def run_line(work: Workload) -> dict[str, float]:
    """``measure`` on ranks of their own. Raises UserError when one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(work.ranks)]
    command += ["-m", "benchmarks.stages", json.dumps(asdict(work))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{work.schedule} on {work.ranks} ranks failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def counted(work: Workload) -> dict[str, float]:
    """Bytes and mean share idle by the schedule alone."""
    idle = replay(work.schedule, [1.0] * work.ranks, [2.0] * work.ranks, work.micro_batches)
    sent = boundary_bytes(work.schedule, work.ranks, work.rows * work.length, work.width, work.micro_batches)
    return {"bytes": float(sent), "idle": statistics.mean(idle)}


def compare(ranks: tuple[int, ...] = (2, 4), micro_batches: int = 8, rounds: int = 3, steps: int = 6) -> None:
    """Print the table.

    Args:
        ranks: Ranks in a line, of four stages.
        micro_batches: Of a step.
        rounds: Runs of each, in turn.
        steps: Of a run; the first is left out.
    """
    for world in ranks:
        works = [Workload(kind, world, micro_batches=micro_batches, steps=steps) for kind in SCHEDULES]
        runs = [[run_line(work) for work in works] for _ in range(rounds)]
        rows = []
        for work, *found in zip(works, *runs, strict=True):
            count, middle = counted(work), {key: statistics.median(run[key] for run in found) for key in found[0]}
            rows.append(
                [
                    work.schedule,
                    f"{count['bytes'] / 2**20:.1f}",
                    f"{middle['bytes'] / 2**20:.1f}",
                    f"{count['idle']:.1%}",
                    f"{middle['waiting']:.1%}",
                    f"{middle['tokens_per_s']:.0f}",
                ]
            )
        columns = ["", "MiB counted", "MiB sent", "idle counted", "waiting", "tokens/s"]
        print_table(f"{world} ranks, {micro_batches} micro-batches per step", columns, rows)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        torch.set_num_threads(1)
        with join_ranks() as joined:
            line = json.dumps(measure(Workload(**json.loads(sys.argv[1])), joined))
            if joined.is_first:
                print(line, flush=True)
    else:
        try:
            tyro.cli(compare)
        except UserError as error:
            print(f"benchmarks.stages: {error}", file=sys.stderr)
            sys.exit(2)
