"""``python -m benchmarks.gap train|one|report``: train the arms on a folder of text, and say what they show."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from benchmarks.gap.arms import ARMS, MILLION, RELATIVES, TOKENS_PER_STEP, TUNING_TOKENS, Job, steps_of
from cognica_poe.errors import UserError

RESULTS = Path(__file__).parent / "results"


def train(
    text: Path,
    work: Path,
    arms: tuple[str, ...] = tuple(ARMS),
    tokens: int = 20 * MILLION,
    seeds: tuple[int, ...] = (0, 1),
    rates: tuple[float, ...] = (),
    results: Path = RESULTS,
    workers: int = 2,
) -> None:
    """Train every arm with every seed and every rate, and keep the results as they come.

    Args:
        text: Folder of parquet, jsonl or text; its own validation split is what is measured on.
        work: Where runs live; call again to go on.
        arms: Which arms.
        tokens: Of every training.
        seeds: Of initial weights and order of data.
        rates: Factors of the learning rates of matrices and heads; none: for every arm, or its nearest relative, the
            best of those tried on 5M tokens.
        results: Where results are kept.
        workers: Trainings at a time, one thread each.
    """
    from benchmarks.gap.report import choose_rates, load_results
    from benchmarks.gap.training import train_all

    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"unknown arm {', '.join(unknown)}: arms are {', '.join(ARMS)}")
    results.mkdir(parents=True, exist_ok=True)
    tried = {} if rates else choose_rates(load_results(results), steps_of(TUNING_TOKENS) * TOKENS_PER_STEP)
    if missing := [arm for arm in arms if not rates and RELATIVES.get(arm, arm) not in tried]:
        raise UserError(
            f"no rates were tried for {', '.join(missing)}; try some first with --tokens {TUNING_TOKENS} "
            "--seeds 0 --rates 0.5 1 2"
        )
    jobs = [
        Job(arm, tokens, seed, rate)
        for seed in seeds
        for arm in arms
        for rate in rates or (tried[RELATIVES.get(arm, arm)],)
    ]
    train_all(jobs, work, str(text), results, workers)


def one(
    text: str,
    work: Path,
    arm: str,
    tokens: int,
    seed: int = 0,
    rate: float = 1.0,
) -> None:
    """Train and measure one arm in this process."""
    from benchmarks.gap.training import train as train_job

    print(train_job(Job(arm, tokens, seed, rate), work, text))


def report(
    tokens: int = 20 * MILLION,
    results: Path = RESULTS,
    out: Path = RESULTS.parent / "results.json",
    plots: Path | None = None,
) -> None:
    """Gate, gaps with their intervals, and the verdict of every arm; also as JSON, and drawn.

    Args:
        tokens: Budget that is reported.
        results: Where results are kept.
        out: The file to write.
        plots: Folder to draw into, gap.svg and drafts.svg.
    """
    from benchmarks.gap.plots import write_plots
    from benchmarks.gap.report import write_summary
    from cognica_poe.cli.output import print_table

    found = write_summary(results, steps_of(tokens) * TOKENS_PER_STEP, out)
    if gate := found["gate"]:
        passed = "passes" if gate["passed"] else "does not pass"
        print(f"gate {passed}: {gate['shallow_bpb']:.4f} against {gate['full_bpb']:.4f} BPB, {_percent(gate)}")
    else:
        print("gate: C0 and C2 have no results yet")
    rows = [
        [
            row["name"],
            row["about"],
            row["seeds"],
            f"{row['bpb']:.4f}",
            _percent({"relative": row["pool_gap"], **row}),
            f"{row['stage0_bpb']:.4f}",
            "-" if row["acceptance"] is None else f"{row['acceptance']:.3f}",
            "-" if row["agreement"] is None else f"{row['agreement']:.3f}",
            "-" if row["depth_yield"] is None else f"{row['depth_yield']:.2f}",
            row["verdict"],
        ]
        for row in found["arms"]
    ]
    columns = ["arm", "", "seeds", "BPB", "gap to C1", "stage 0", "acceptance", "agreement", "R", "verdict"]
    if plots is not None:
        write_plots(found, plots)
    print_table(f"arms at {found['tokens'] / MILLION:.1f}M tokens", columns, rows)


def _percent(gap: dict[str, float]) -> str:
    return f"{100 * gap['relative']:+.2f} % [{100 * gap['low']:+.2f}, {100 * gap['high']:+.2f}]"


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"train": train, "one": one, "report": report})
    except UserError as error:
        print(f"benchmarks.gap: {error}", file=sys.stderr)
        sys.exit(2)
