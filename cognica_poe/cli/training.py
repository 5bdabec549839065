"""The commands about a recipe: ``run`` for the whole life of a model, ``train`` alone, ``params`` and ``plan``."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cognica_poe.cli.arguments import Flag, RecipeFields, RecipeName
from cognica_poe.cli.output import as_dicts, print_json, print_records, print_samples, print_table
from cognica_poe.cli.progress import TrainingProgress, log
from cognica_poe.errors import UserError
from cognica_poe.locks import hold
from cognica_poe.planning.cluster import Cluster
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.named import find_recipe
from cognica_poe.recipe.rules import check_run

if TYPE_CHECKING:
    from cognica_poe.planning.costs import Figure
    from cognica_poe.planning.plan import Plan

SAMPLE_PROMPT = "Return a list of the"


def run(
    recipe: RecipeName,
    settings: RecipeFields,
    out: Path,
    resume: Flag = False,
    init_from: Path | None = None,
    publish_to: str | None = None,
    json: Flag = False,
) -> None:
    """Whole life of a model: data, tokenizer, training, a measured release per step, report, sample text.

    Every field of the recipe is an option.

    Args:
        recipe: Name of a recipe, or path of a recipe.json.
        settings: The recipe.
        out: Run folder.
        resume: Go on with an interrupted run.
        init_from: Start from the weights and the tokenizer of a release folder, or of RUN/checkpoints/step-N.
        publish_to: org/name on the Hub, or file:FOLDER: each released step is measured, exported and published when it
            is made, by another process, while training goes on.
        json: Print one JSON document instead of tables.
    """
    from cognica_poe import pipeline
    from cognica_poe.analysis.record import load_records
    from cognica_poe.following import followed
    from cognica_poe.planning.fit import fit_micro_rows
    from cognica_poe.release.loading import load
    from cognica_poe.serving.generation import generate_samples
    from cognica_poe.training.parallel.ranks import announced_world

    if announced_world() > 1:
        raise UserError("run is for one process: under torchrun use `train`, then `analyze`, `export` and `publish`")
    check_run(settings)
    settings = fit_micro_rows(settings, 1, log)
    with hold(out, log=log), TrainingProgress(settings.training.steps) as progress:
        steps = pipeline.run_recipe(
            settings,
            out,
            resume=resume,
            log=log,
            progress=progress,
            init_from=init_from,
            beside=followed(out, publish_to, log) if publish_to else None,
        )
    samples = generate_samples(*load(out / "release" / f"step-{steps[-1]}"), SAMPLE_PROMPT)
    records = load_records(out / "analysis")
    if json:
        record = records[-1].model_dump(mode="json")
        return print_json({"run": str(out), "steps": steps, "record": record, "samples": as_dicts(samples)})
    print_records(records)
    print_samples(samples)
    print(f"\nrun folder        {out}")
    print(f"report            {out / 'report' / 'index.html'}")
    print(f"records           {out / 'analysis'}/step-N.json for N in {', '.join(map(str, steps))}")
    print(f"releases          {out / 'release'}/step-N")
    hub = out / "release" / "hub"
    print(f'local Hub cache   AutoModelForCausalLM.from_pretrained("{settings.release.repo_id}",')
    print(f'                      revision="step-{steps[-1]}", cache_dir="{hub}",')
    print("                      local_files_only=True, trust_remote_code=True)")


def train(
    recipe: RecipeName,
    settings: RecipeFields,
    out: Path,
    resume: Flag = False,
    init_from: Path | None = None,
    publish_to: str | None = None,
    json: Flag = False,
) -> None:
    """Train only, on one process or, under torchrun, on many; checkpoints land in OUT/checkpoints.

    Every field of the recipe is an option.

    Args:
        recipe: Name of a recipe, or path of a recipe.json.
        settings: The recipe.
        out: Run folder.
        resume: Go on with an interrupted run.
        init_from: Start from the weights and the tokenizer of a release folder, or of RUN/checkpoints/step-N.
        publish_to: org/name on the Hub, or file:FOLDER: each released step is measured, exported and published when it
            is made, by another process, while training goes on.
        json: Print one JSON document instead of text.
    """
    from cognica_poe import pipeline
    from cognica_poe.following import followed
    from cognica_poe.planning.fit import fit_micro_rows
    from cognica_poe.training.parallel.ranks import join_ranks
    from cognica_poe.training.trainer import Trainer

    check_run(settings)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(join_ranks())
        resume = resume or ranks.restarts > 0
        settings = ranks.on_first(lambda: fit_micro_rows(settings, ranks.world, log))
        ranks.on_first(lambda: stack.enter_context(hold(out, log=log)))
        ranks.patiently().on_first(lambda: pipeline.prepare(settings, out, log, resume, init_from))
        say = log if ranks.is_first else lambda line: None
        rows, measured = pipeline.open_rows(out, settings, say), pipeline.validation_of(out, settings, ranks, say)
        to = publish_to if ranks.is_first else None
        with followed(out, to, log), TrainingProgress(settings.training.steps) as progress:
            trainer = Trainer(
                settings, out, rows, resume=resume, log=log, progress=progress, ranks=ranks, validation=measured
            )
            trainer.train()
        if not ranks.is_first:
            return
    steps = pipeline.checkpoint_steps(out, ())
    if json:
        return print_json({"run": str(out), "checkpoints": steps})
    print(f"trained {settings.name} to step {trainer.step}; checkpoints of steps {', '.join(map(str, steps))}")
    print(f"next: cognica-poe analyze {out}")


def params(recipe: RecipeName, json: Flag = False) -> None:
    """Exact parameter counts by group, built on the meta device.

    Args:
        recipe: Name of a recipe, or path of a recipe.json.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.planning.parameters import count_parameters

    counts = count_parameters(check_run(find_recipe(recipe)))
    if json:
        return print_json(counts)
    rows = [[group, count, f"{100 * count / counts['total']:.1f} %"] for group, count in counts["groups"].items()]
    total = ["total", counts["total"], "100.0 %"]
    print_table(f"parameters of {recipe}", ["group", "parameters", "share"], [*rows, total])


def plan(
    recipe: RecipeName,
    settings: RecipeFields,
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),  # noqa: B008
    pool: Path | None = None,
    control: Path | None = None,
    shallow: Path | None = None,
    json: Flag = False,
) -> None:
    """Memory per rank, traffic per step, step time and days of a recipe on a cluster, before it starts.

    Every figure is printed with its formula. Symbols: P parameters, Pm those of Muon, Pa those of AdamW,
    S = 4 Pm + 8 Pa bytes of optimiser state, N ranks, c bytes of the compute dtype, m micro-batches per step,
    R tokens of a micro-batch, D width, I MLP width, V vocabulary, T context, qd and kd width of queries and keys.

        memory per rank    c P + (4 P + 4 P + S) / N + activations + scratch
        sent per step      reduce-scatter m 4 P (N - 1) / N, all-gather c P (N - 1) / N, Muon 2 x 4 Pm / N (N - 1) / N
        step time          FLOP / (N x peak x mfu) + what the network needs beyond that + Newton-Schulz

    --mfu, the share of the data-sheet peak that forward and backward reach, and --network-gbit are yours to state.
    Every field of the recipe is an option: another batch or dtype is planned without editing anything.

    Args:
        recipe: Name of a recipe, or path of a recipe.json.
        settings: The recipe.
        cluster: Where it would run.
        pool: Measured run of a pool, beside --control: what its gap to backprop would be in this recipe's compute.
        control: Measured run of the same layers by backprop.
        shallow: Measured run of stage 0's layers alone by backprop, for the depth yield R.
        json: Print one JSON document instead of tables.
    """
    from cognica_poe.planning.plan import make_plan

    if bool(pool) != bool(control) or (shallow and not control):
        raise UserError("--pool and --control go together, and --shallow beside them: a gap has two sides")
    made, gap = make_plan(check_run(settings), cluster), _gap_of(settings, pool, control, shallow)
    if json:
        return print_json({**dataclasses.asdict(made), **({"gap": gap} if gap else {})})
    print_plan(made)
    if gap:
        from cognica_poe.release.card.gap import gap_reading, gap_rows

        here = [
            "the same gap as compute of this recipe",
            f"{gap['factor_here']:.2f}x" if gap["factor_here"] else "-",
            "",
        ]
        rows = [[*row] for row in gap_rows(gap)]
        print_table("gap to backprop, measured", ["figure", "value", "95 % interval"], [*rows, here])
        print(gap_reading(gap))


def _gap_of(settings: Recipe, pool: Path | None, control: Path | None, shallow: Path | None) -> dict[str, Any] | None:
    """The measured gap, with what it would be in the compute of a recipe; None without runs."""
    from cognica_poe.analysis.gap import compute_factor
    from cognica_poe.planning.parameters import count_parameters
    from cognica_poe.release.card.gap import gap_of_runs

    if pool is None or control is None:
        return None
    gap, training = gap_of_runs(pool, control, shallow), settings.training
    tokens = training.steps * training.batch_rows * settings.model.max_position_embeddings
    try:
        here = compute_factor(gap["relative"]["value"], count_parameters(settings)["total"], tokens)
    except ValueError:  # no model of the family is as far behind
        here = None
    return {**gap, "factor_here": here}


def print_plan(made: Plan) -> None:
    """A plan as tables, each figure with its formula."""
    from cognica_poe.planning.plan import GIB

    cluster = made.cluster
    shape = f"{made.nodes} node{'s' if made.nodes > 1 else ''} x {cluster.gpus // made.nodes} {cluster.gpu}"
    where = f"{made.recipe} on {shape}, {made.micro_batches} micro-batches of {made.micro_rows} rows"
    rows = [[figure.name, _number(figure), figure.formula] for figure in made.totals]
    print_table(f"run: {made.recipe}", ["total", "value", "formula"], rows)
    peak = sum(figure.value for figure in made.memory)
    verdict = "fits" if made.fits else "does not fit"
    rows = [[figure.name, f"{figure.value / GIB:,.2f}", figure.formula] for figure in made.memory]
    rows.append(["peak", f"{peak / GIB:,.2f}", f"{verdict}: {made.usable_bytes / GIB:.1f} GiB may be filled"])
    print_table(f"memory per rank: {where}", ["part", "GiB", "formula"], rows)
    rows = [[figure.name, f"{figure.value / GIB:,.1f}", figure.formula] for figure in made.layouts]
    print_table("weights, gradients and state per rank, by layout", ["layout", "GiB", "formula"], rows)
    rows = [[figure.name, f"{figure.value / 1e9:,.2f}", figure.formula] for figure in made.traffic]
    print_table(f"sent by each rank per step ({made.grad_sync})", ["collective", "GB", "formula"], rows)
    rows = [[figure.name, f"{figure.value:,.2f}", figure.formula] for figure in made.time]
    rows.append(["whole run", f"{made.days:,.1f} days", "step x steps / 86,400; checkpoints and analysis not counted"])
    link = f"{cluster.network_gbit:g} Gbit/s between nodes" if made.nodes > 1 else "one node"
    print_table(f"time at mfu {cluster.mfu:g}, {link}", ["part", "seconds", "formula"], rows)
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
