"""``cognica-poe plan``: the figures of ``plan.py`` as tables or JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import tyro

from cognica_poe.cli.output import print_json, table
from cognica_poe.planning.cluster import Cluster
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.rules import check

if TYPE_CHECKING:
    from cognica_poe.planning.costs import Figure
    from cognica_poe.planning.plan import Plan


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """A recipe on a cluster. Every field of the recipe is an option."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster()  # noqa: RUF009
    json: bool = False
    """Print one JSON document instead of tables."""


def plan(arguments: PlanArguments) -> None:
    """Memory per rank, traffic per step, step time and days of a recipe on a cluster, before it starts.

    Every figure is printed with its formula. Symbols: P parameters, Pm those of Muon, Pa those of AdamW,
    S = 4 Pm + 8 Pa bytes of optimiser state, N ranks, c bytes of the compute dtype, m micro-batches per step,
    R tokens of a micro-batch, D width, I MLP width, V vocabulary, T context, qd and kd width of queries and keys.

        memory per rank    c P + (4 P + 4 P + S) / N + activations + scratch
        sent per step      reduce-scatter m 4 P (N - 1) / N, all-gather c P (N - 1) / N, Muon 2 x 4 Pm / N (N - 1) / N
        step time          FLOP / (N x peak x mfu) + what the network needs beyond that + Newton-Schulz

    --mfu, the share of the data-sheet peak that forward and backward reach, and --network-gbit are yours to state.
    Every field of the recipe is an option: another batch or dtype is planned without editing anything.
    """
    from cognica_poe.planning.plan import make_plan

    recipe, cluster = check(arguments.recipe), arguments.cluster
    made = make_plan(recipe, cluster)
    if arguments.json:
        return print_json(dataclasses.asdict(made))
    _print(made)


def _print(made: Plan) -> None:
    from cognica_poe.planning.plan import GIB

    cluster = made.cluster
    shape = f"{made.nodes} node{'s' if made.nodes > 1 else ''} x {cluster.gpus // made.nodes} {cluster.gpu}"
    where = f"{made.recipe} on {shape}, {made.micro_batches} micro-batches of {made.micro_rows} rows"
    rows = [[figure.name, _number(figure), figure.formula] for figure in made.totals]
    table(f"run: {made.recipe}", ["total", "value", "formula"], rows)
    peak = sum(figure.value for figure in made.memory)
    verdict = "fits" if made.fits else "does not fit"
    rows = [[figure.name, f"{figure.value / GIB:,.2f}", figure.formula] for figure in made.memory]
    rows.append(["peak", f"{peak / GIB:,.2f}", f"{verdict}: {made.usable_bytes / GIB:.1f} GiB may be filled"])
    table(f"memory per rank: {where}", ["part", "GiB", "formula"], rows)
    rows = [[figure.name, f"{figure.value / GIB:,.1f}", figure.formula] for figure in made.layouts]
    table("weights, gradients and state per rank, by layout", ["layout", "GiB", "formula"], rows)
    rows = [[figure.name, f"{figure.value / 1e9:,.2f}", figure.formula] for figure in made.traffic]
    table(f"sent by each rank per step ({made.grad_sync})", ["collective", "GB", "formula"], rows)
    rows = [[figure.name, f"{figure.value:,.2f}", figure.formula] for figure in made.time]
    rows.append(["whole run", f"{made.days:,.1f} days", "step x steps / 86,400; checkpoints and analysis not counted"])
    link = f"{cluster.network_gbit:g} Gbit/s between nodes" if made.nodes > 1 else "one node"
    table(f"time at mfu {cluster.mfu:g}, {link}", ["part", "seconds", "formula"], rows)
    for note in made.notes:
        print(f"note: {note}")


def _number(figure: Figure) -> str:
    if figure.name.startswith("bytes"):
        return f"{figure.value / 1e9:,.1f} GB"
    if figure.name == "tokens":
        return f"{figure.value:,} ({int(figure.value / 1e7) / 100:,.2f}B)"
    if "FLOP" in figure.name:
        return f"{figure.value:.3e}"
    return f"{figure.value:,.2f}" if isinstance(figure.value, float) else f"{figure.value:,}"
