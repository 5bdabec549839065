"""What a training run costs before it starts: memory per rank, traffic per step, step time and days.

Everything is computed from the recipe's own model, built on the meta device, and from the layout that the trainer uses:
ZeRO-2 with replicas in the compute dtype, fp32 masters, gradients and optimiser state in shards. Every figure carries
its formula. Symbols: ``P`` parameters, ``Pm`` those of Muon, ``Pa`` those of AdamW, ``S = 4 Pm + 8 Pa`` bytes of
optimiser state, ``N`` ranks, ``c`` bytes of the compute dtype, ``m`` micro-batches per step, ``R`` tokens of a
micro-batch, ``D I V T`` width, MLP width, vocabulary and context, ``qd`` and ``kd`` query and key width, ``L`` layers
whose activations live at once. Shards count every tensor's rows rounded up to a multiple of ``N``.

Memory, optimiser state and floating-point operations are compared with measurement by the tests; the step time rests
on the share of the peak that forward and backward reach (``mfu``), which is an assumption until it is measured.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch

from cognica_poe.errors import UserError
from cognica_poe.planning.cluster import Cluster, Gpu, check_world, find_gpu
from cognica_poe.planning.costs import Costs, Figure
from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.optim.schedule import Schedule
from cognica_poe.training.parallel.reduction import IN_FLIGHT

GIB = 2**30
CONTEXT_BYTES = 2 * GIB
"""Set aside for the driver's context and the collectives' buffers (assumed)."""
USABLE = 0.95
"""Share of a device's memory that a plan may fill; the rest is left to fragmentation (assumed)."""


@dataclass(frozen=True)
class Plan:
    """Figures of one recipe on one cluster."""

    recipe: str
    cluster: Cluster
    grad_sync: str
    nodes: int
    micro_rows: int
    micro_batches: int
    totals: list[Figure]
    memory: list[Figure]
    """Bytes per rank, the parts of the peak."""
    usable_bytes: float
    """What a rank's parts may fill."""
    fits: bool
    layouts: list[Figure]
    """Bytes per rank of parameters, gradients and optimiser state under other layouts, for comparison."""
    traffic: list[Figure]
    """Bytes that each rank sends per step."""
    time: list[Figure]
    """Seconds per step by part; the last is the whole step."""
    days: float
    notes: list[str]


class Planner:
    """The formulas, for one recipe on one cluster. Raises UserError for a cluster that cannot run the recipe.

    ``gpu``, where given, stands for the device that the cluster names.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster, gpu: Gpu | None = None):
        self.recipe, self.cluster, self.gpu = recipe, cluster, gpu or find_gpu(cluster.gpu)
        self.ranks = recipe.training.ranks
        self.N, self.nodes = cluster.gpus, check_world(recipe, cluster)
        self.usable = USABLE * self.gpu.memory_gib * GIB
        self.rank_rows = recipe.training.batch_rows // self.N
        self.costs = Costs(recipe)
        self.c = self._compute_bytes()
        self.P = self.costs.parameters
        self.padded_matrices = sum(map(self._padded, self.costs.matrices))
        self.padded_others = sum(map(self._padded, self.costs.others))
        self.padded = self.padded_matrices + self.padded_others
        self.every = self.ranks.grad_sync == "every_microbatch"

    def _compute_bytes(self) -> int:
        """As training chooses: bf16 where it is at least 1.2 times faster, unless the recipe says otherwise."""
        choice = self.recipe.training.compute_dtype
        if choice != "auto":
            return 4 if choice == "float32" else 2
        return 2 if self.gpu.bf16_tflops > 1.2 * self.gpu.fp32_tflops else 4

    def _padded(self, shape: tuple[int, ...]) -> int:
        return math.ceil(shape[0] / self.N) * self.N * math.prod(shape[1:])

    # ---- memory ---------------------------------------------------------------------------------------------------

    def memory(self, rows: int) -> list[Figure]:
        """Bytes per rank at the peak of a step, by part."""
        N, P, matrices = self.N, self.P, self.costs.matrices
        whole = not self.every and self.rank_rows > rows
        stack = max(math.ceil(matrices.count(shape) / N) * math.prod(shape) for shape in set(matrices))
        in_flight = IN_FLIGHT * getattr(torch, self.ranks.reduce_dtype).itemsize if N > 1 else 0
        state = 4 * self.padded_matrices + 8 * self.padded_others
        return [
            Figure("replicas of the weights", self.c * P, "c P"),
            Figure("fp32 masters", 4 * self.padded / N, "4 P / N"),
            Figure("gradients", 4 * P if whole else 4 * self.padded / N, "4 P" if whole else "4 P / N"),
            Figure("optimiser state", state / N, "S / N"),
            Figure(
                "gradients under way", (4 + in_flight) * max(self.costs.buckets()), "(4 + 2 x dtype) x largest bucket"
            ),
            Figure("Newton-Schulz workspace", 3 * self.costs.muon_bytes * stack, "3 x its dtype x largest owned stack"),
            *self.costs.activations(rows, self.c),
            Figure("context and buffers", CONTEXT_BYTES, "assumed"),
        ]

    def layouts(self) -> list[Figure]:
        """Parameters, gradients and optimiser state per rank under the usual layouts, without activations."""
        P, N = self.P, self.N
        S = 4 * self.costs.muon_parameters + 8 * self.costs.adamw_parameters
        return [
            Figure("DDP", 8 * P + S, "8 P + S"),
            Figure("ZeRO-1", 8 * P + S / N, "8 P + S / N"),
            Figure("ZeRO-2 fp32", 4 * P + (4 * P + S) / N, "4 P + (4 P + S) / N"),
            Figure("ZeRO-2, bf16 replicas, fp32 masters", 2 * P + (8 * P + S) / N, "2 P + (4 P + 4 P + S) / N"),
            Figure("ZeRO-3", (8 * P + S) / N, "(8 P + S) / N, + one layer"),
        ]

    def fits(self, rows: int) -> bool:
        """Whether a micro-batch of ``rows`` rows stays below the usable memory."""
        return sum(figure.value for figure in self.memory(rows)) <= self.usable

    def choose_micro_rows(self) -> int:
        """The given micro-batch, or the largest divisor of a rank's rows that fits, up to the recipe's."""
        wanted = self.cluster.micro_rows or self.recipe.training.micro_rows
        divisors = [rows for rows in range(1, min(wanted, self.rank_rows) + 1) if self.rank_rows % rows == 0]
        if self.cluster.micro_rows is None:
            return max((rows for rows in divisors if self.fits(rows)), default=1)
        if self.rank_rows % wanted:
            raise UserError(
                f"plan: --micro-rows {wanted} does not divide the {self.rank_rows} rows of a rank; use {divisors[-1]}"
            )
        return wanted

    # ---- traffic and time -----------------------------------------------------------------------------------------

    def traffic(self, micro_batches: int) -> list[Figure]:
        """Bytes that each rank sends per step; a ring sends ``(N - 1) / N`` of a tensor."""
        part = (self.N - 1) / self.N
        size = getattr(torch, self.ranks.reduce_dtype).itemsize
        rounds, times = (micro_batches, f"m {size} P") if self.every else (1, f"{size} P")
        return [
            Figure("reduce-scatter of gradients", size * self.padded * part * rounds, f"{times} (N - 1) / N"),
            Figure("all-gather of weights", self.c * self.padded * part, "c P (N - 1) / N"),
            Figure(
                "all-to-all of Muon, both ways", 8 * self.padded_matrices / self.N * part, "2 x 4 Pm / N (N - 1) / N"
            ),
        ]

    def _seconds(self, traffic: Figure) -> float:
        """A ring crosses each node's link once; an all-to-all sends what leaves a node over that node's link."""
        per_node = self.N // self.nodes
        if self.nodes == 1:
            return traffic.value / (self.gpu.link_gbyte * 1e9)
        crossing = traffic.value
        if traffic.name.startswith("all-to-all"):
            crossing *= per_node * (self.N - per_node) / (self.N - 1)
        return crossing / (self.cluster.network_gbit * 1e9 / 8)

    def owner_flops(self) -> float:
        """Newton-Schulz work of the busiest owner: longest first, each to the least loaded."""
        owners = [0.0] * self.N
        for cost in sorted(self.costs.newton_schulz_flops(), reverse=True):
            heapq.heapreplace(owners, owners[0] + cost)
        return max(owners)

    def time(self, micro_batches: int) -> list[Figure]:
        """Seconds of a step by part; communication counts where it outlasts what it overlaps with."""
        batch_tokens = self.recipe.training.batch_rows * self.costs.config.max_position_embeddings
        flops = (self.costs.flops_per_token() + self.costs.recomputed_flops_per_token()) * batch_tokens / self.N
        compute = flops / (self._peak(self.c) * self.cluster.mfu)
        muon = self.owner_flops() / (self._peak(self.costs.muon_bytes) * self.cluster.mfu)
        scatter, gather, exchange = map(self._seconds, self.traffic(micro_batches))
        rounds = micro_batches if self.every else 1
        backward = 2 / 3 * compute / micro_batches
        exposed_scatter = rounds * max(0.0, scatter / rounds - backward)
        exposed_gather = max(0.0, gather - backward / 2)
        parts = [
            Figure("forward and backward", compute, "FLOP per token x tokens / (N x peak x mfu)"),
            Figure("reduce-scatter beyond backward", exposed_scatter, "bytes / link - 2/3 of a micro-batch, per round"),
            Figure("all-gather beyond forward", exposed_gather, "bytes / link - 1/3 of a micro-batch"),
            Figure("Newton-Schulz", muon, "FLOP of the busiest owner / (peak of its dtype x mfu)"),
            Figure("all-to-all of Muon", exchange, "bytes leaving a node / link"),
        ]
        return [*parts, Figure("step", sum(figure.value for figure in parts), "sum")]

    def _peak(self, dtype_bytes: int) -> float:
        return 1e12 * (self.gpu.bf16_tflops if dtype_bytes == 2 else self.gpu.fp32_tflops)

    # ---- the whole ------------------------------------------------------------------------------------------------

    def totals(self) -> list[Figure]:
        """Size of the run, independent of the cluster."""
        training, release = self.recipe.training, self.recipe.released_steps()
        batch_tokens = training.batch_rows * self.costs.config.max_position_embeddings
        tokens = batch_tokens * training.steps
        checkpoint = 4 * self.P + self.costs.state_bytes()
        kept = len(release) + training.keep_checkpoints
        return [
            Figure("parameters", self.P, "P"),
            Figure("tokens per step", batch_tokens, "batch rows x T"),
            Figure("steps", training.steps, "recipe"),
            Figure("tokens", tokens, "tokens per step x steps"),
            Figure("tokens per parameter", tokens / self.P, "tokens / P"),
            Figure("warm-down from step", Schedule(training.schedule, training.steps).warmdown_start, "schedule"),
            Figure("FLOP per token", self.costs.flops_per_token(), "6 (Pm + heads V D) + 12 qd x sum of windows"),
            Figure("Newton-Schulz FLOP per step", sum(self.costs.newton_schulz_flops()), "5 (4 m^2 n + 2 m^3) each"),
            Figure("bytes of a checkpoint", checkpoint, "4 P + S"),
            Figure("bytes of all kept checkpoints", kept * checkpoint, f"{kept} x (4 P + S)"),
            Figure("bytes of all releases", len(release) * 4 * self.P, f"{len(release)} x 4 P"),
        ]

    def plan(self) -> Plan:
        """All figures."""
        rows = self.choose_micro_rows()
        micro_batches = self.rank_rows // rows
        time = self.time(micro_batches)
        return Plan(
            recipe=self.recipe.name,
            cluster=self.cluster,
            grad_sync=self.ranks.grad_sync,
            nodes=self.nodes,
            micro_rows=rows,
            micro_batches=micro_batches,
            totals=self.totals(),
            memory=self.memory(rows),
            usable_bytes=self.usable,
            fits=self.fits(rows),
            layouts=self.layouts(),
            traffic=self.traffic(micro_batches),
            time=time,
            days=time[-1].value * self.recipe.training.steps / 86_400,
            notes=self._notes(rows, time),
        )

    def _notes(self, rows: int, time: list[Figure]) -> list[str]:
        compute, scatter, gather, muon = (figure.value for figure in time[:4])
        notes = []
        if not self.fits(rows):
            notes.append("does not fit: use more or larger GPUs, or fewer rows in a micro-batch")
        elif rows < min(self.recipe.training.micro_rows, self.rank_rows):
            notes.append(f"micro-batches of {rows} rows: the recipe's {self.recipe.training.micro_rows} do not fit")
        if muon > 0.03 * compute and self.costs.muon_bytes == 4 and self.gpu.bf16_tflops > self.gpu.fp32_tflops:
            notes.append("Newton-Schulz in fp32 is slow here: --training.optimizer.muon-dtype bfloat16")
        if scatter + gather > 0.1 * compute:
            hint = "--training.ranks.grad-sync last_microbatch, " if self.ranks.grad_sync == "every_microbatch" else ""
            notes.append(f"the network holds the step up: {hint}a larger batch or a faster network")
        return notes


def make_plan(recipe: Recipe, cluster: Cluster) -> Plan:
    """Plan of a checked recipe. Raises UserError for an unknown GPU or an impossible world size."""
    return Planner(recipe, cluster).plan()
