"""The commands of the command line, one function each; docstrings and field comments are their help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from cognica_poe.cli.bench import COMMANDS as BENCH_COMMANDS
from cognica_poe.cli.output import as_dicts, figures, print_json, print_records, table
from cognica_poe.cli.plan import PlanArguments, plan
from cognica_poe.cli.progress import log
from cognica_poe.cli.run import RunArguments, TrainArguments, run, train
from cognica_poe.errors import UserError
from cognica_poe.files import require_apart, require_replaceable
from cognica_poe.recipe.fields import DataRecipe, Recipe
from cognica_poe.recipe.named import find_recipe
from cognica_poe.recipe.rules import check
from cognica_poe.serving.generation import GenerationOptions, generate, load_model
from cognica_poe.serving.server import serve

Positional = tyro.conf.Positional


def params(recipe: Positional[str], json: bool = False) -> None:
    """Exact parameter counts by group, built on the meta device.

    Args:
        recipe: Name of a recipe, or path of a recipe.json.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.planning.parameters import count_parameters

    counts = count_parameters(check(find_recipe(recipe)))
    if json:
        return print_json(counts)
    rows = [[group, count, f"{100 * count / counts['total']:.1f} %"] for group, count in counts["groups"].items()]
    table(f"parameters of {recipe}", ["group", "parameters", "share"], [*rows, ["total", counts["total"], "100.0 %"]])


def analyze(run: Positional[Path], step: tuple[int, ...] = (), json: bool = False) -> None:
    """Measure checkpoints of a run; records land in RUN/analysis.

    Args:
        run: Run folder.
        step: Steps to measure; every checkpoint when omitted.
        json: Print the records as one JSON document.
    """
    from cognica_poe import pipeline

    recipe = pipeline.read_recipe(run)
    records = []
    for number in pipeline.checkpoint_steps(run, step):
        records.append(
            pipeline.analyze_step(run, recipe, pipeline.checkpoint_model(run, recipe, number, log), number, log)
        )
    if json:
        return print_json([record.model_dump(mode="json") for record in records])
    print_records(records)


def calibrate(checkpoint: Positional[Path], text: Path, tokens: int = 131_072, json: bool = False) -> None:
    """WAND p99 bounds of a release folder on text of your own.

    Args:
        checkpoint: Release folder.
        text: Folder or file of parquet, jsonl or text to calibrate on.
        tokens: Positions to calibrate on.
        json: Print one JSON document instead of a table.
    """
    import tempfile

    from cognica_poe.analysis.validation import validation_slice
    from cognica_poe.analysis.wand import calibrate as calibrate_bounds
    from cognica_poe.data.build import build
    from cognica_poe.data.manifest import read_documents
    from cognica_poe.data.tokenizer import load_tokenizer

    model, _ = load_model(str(checkpoint))
    if model.config.num_stages < 2 or model.config.poe_mode == "none":
        raise UserError(f"{checkpoint} has one prediction path: there is nothing to exit from")
    with tempfile.TemporaryDirectory() as folder:
        build(str(text), Path(folder) / "data", val_fraction=0.0, val_min_bytes=1, log=log)
        texts = [d.text for split in ("train", "val") for d in read_documents(Path(folder) / "data", split)]
    part = validation_slice(texts, 8 * tokens)
    result = calibrate_bounds(model, load_tokenizer(checkpoint), part.texts, tokens=tokens, log=log)
    if json:
        return print_json(dataclasses.asdict(result))
    rows = [[f"{k} -> {k + 1}", bound] for k, bound in enumerate(result.bounds)]
    table(f"WAND p99 bounds on {result.positions:,} positions", ["transition", "bound (nats)"], rows)
    print(f"agreement with the full pool at safety {result.safety}: {result.agreement:.4f}")


def export(run: Positional[Path], step: int, out: Path | None = None) -> None:
    """Write the release folder of a measured step.

    Args:
        run: Run folder.
        step: A step with a checkpoint and a record.
        out: Where to; RUN/release/step-N when omitted.
    """
    from cognica_poe import pipeline

    recipe = pipeline.read_recipe(run)
    out = out or run / "release" / f"step-{step}"
    for part in [*run.iterdir(), run / "release" / "hub"]:  # of a run, only RUN/release takes further folders
        if part != run / "release":
            require_apart(out, part)
    require_replaceable(out, "release")
    print(pipeline.export_step(run, recipe, pipeline.checkpoint_model(run, recipe, step, log), step, log, out))


def publish(run: Positional[Path], to: str, replace: bool = False, json: bool = False) -> None:
    """Publish every release folder of a run, one revision per step.

    Args:
        run: Run folder.
        to: org/name on the Hub (token from HF_TOKEN), or file:FOLDER for a local Hub cache folder.
        replace: Allow a step to be published again with other content.
        json: Print one JSON document.
    """
    from cognica_poe import pipeline
    from cognica_poe.release.publish.revisions import publish as publish_folders

    recipe = pipeline.read_recipe(run)
    folders = sorted((run / "release").glob("step-*"))
    repo_id = recipe.release.repo_id if to.startswith("file:") else None
    done = publish_folders(folders, to, repo_id, replace=replace, log=log)
    if json:
        return print_json(dataclasses.asdict(done))
    rows = [[f"step-{step}", commit] for step, commit in done.revisions.items()]
    table(f"{done.repo_id} at {done.where}", ["revision", "commit"], [*rows, ["main", done.main]])


def report(runs: Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Trajectory report of one or several runs, as one self-contained page.

    Args:
        runs: Run folders.
        out: Folder or .html file; the first run's report/ when omitted.
    """
    from cognica_poe.release.report.html import write_report

    if not runs:
        raise UserError("report: pass at least one run folder")
    print(write_report(runs, out or runs[0] / "report"))


def generate_command(
    checkpoint: Positional[str],
    prompt: Positional[str],
    options: Annotated[GenerationOptions, tyro.conf.arg(name="")] = GenerationOptions(),  # noqa: B008
    revision: str | None = None,
    cache_dir: Path | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt; streams the text, then prints tokens/s, stages used and acceptance.

    Args:
        checkpoint: Release folder, or org/name with --cache-dir.
        prompt: Text to continue.
        revision: Revision within the Hub cache folder, such as step-300; main when omitted.
        cache_dir: Local Hub cache folder.
        json: Print one JSON document instead of streaming.
    """
    from transformers import TextStreamer

    model, tokenizer = load_model(checkpoint, revision, cache_dir)
    streamer = None if json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not json:
        print(prompt, end="", flush=True)
    result = generate(model, tokenizer, prompt, options, streamer)
    if json:
        return print_json(dataclasses.asdict(result))
    log(figures(result))


def data_build(
    mix: Positional[str],
    out: Path,
    val_fraction: float = DataRecipe.val_fraction,
    val_min_bytes: int = DataRecipe.val_min_bytes,
    max_bytes: int | None = DataRecipe.max_bytes,
    seed: int = DataRecipe.seed,
) -> None:
    """Collect a mix, or local files, into parquet shards with a manifest; the same as a run's with the same options.

    Args:
        mix: python-docs, frontier_v1, a mix file, or a folder or file of parquet, jsonl or text.
        out: Data folder to make.
        val_fraction: Share of the documents held out for validation.
        val_min_bytes: Hold out at least this much text.
        max_bytes: Take a sample of this many bytes of text; a mix of Hub datasets needs it.
        seed: Seed of the split.
    """
    from cognica_poe.data.build import build

    options = {"val_fraction": val_fraction, "val_min_bytes": val_min_bytes, "max_bytes": max_bytes, "seed": seed}
    manifest = build(mix, out, **options, log=log)
    rows = [[name, total.documents, total.bytes] for name, total in manifest.splits.items()]
    table(f"data in {out}", ["split", "documents", "bytes"], rows)


def data_pack(data: Positional[Path], tokenizer: Path, out: Path, row_len: int = 2049, epoch: int = 0) -> None:
    """Pack one epoch of a data folder into uint16 rows.

    Args:
        data: Data folder.
        tokenizer: Tokenizer folder.
        out: Folder for the rows.
        row_len: Context length + 1.
        epoch: Epoch to pack; it seeds order and case.
    """
    from cognica_poe.data.rows.packing import pack
    from cognica_poe.data.tokenizer import load_tokenizer

    packed = pack(data, load_tokenizer(tokenizer), out, row_len=row_len, epoch=epoch, log=log)
    table(f"rows in {out}", ["fact", "value"], [[key, value] for key, value in dataclasses.asdict(packed).items()])


def data_which_docs(run: Positional[Path], step: int, json: bool = False) -> None:
    """List the documents that an optimiser step of a run reads (0-based).

    Args:
        run: Run folder.
        step: Optimiser step, counted from 0.
        json: Print one JSON document.
    """
    from cognica_poe import pipeline

    if step < 0:
        raise UserError(f"which-docs: step is {step}; steps count from 0")
    recipe = pipeline.read_recipe(run)
    pieces = pipeline.open_rows(run, recipe, log).documents(step, recipe.training.batch_rows)
    if json:
        return print_json(as_dicts(pieces))
    columns = ["row", "epoch", "source", "origin", "start", "tokens", "case"]
    table(f"documents of step {step}", columns, [[getattr(piece, c) for c in columns] for piece in pieces])


def tokenizer_train(
    data: Positional[Path], out: Path, vocab_size: int = 32_768, max_bytes: int = DataRecipe.tokenizer_bytes
) -> None:
    """Train the byte-level BPE tokenizer on a data folder.

    Args:
        data: Data folder (`cognica-poe data build`).
        out: Tokenizer folder to make.
        vocab_size: Tokens, 9 specials included.
        max_bytes: Train on at most this much text.
    """
    from cognica_poe.data.manifest import read_documents
    from cognica_poe.data.tokenizer import train_tokenizer

    require_apart(out, data)
    train_tokenizer((d.text for d in read_documents(data, "train")), vocab_size, out, max_bytes=max_bytes, log=log)
    print(out)


COMMANDS = {
    "params": params,
    "analyze": analyze,
    "calibrate": calibrate,
    "export": export,
    "publish": publish,
    "report": report,
    "generate": generate_command,
    "serve": serve,
    "data build": data_build,
    "data pack": data_pack,
    "data which-docs": data_which_docs,
    "tokenizer train": tokenizer_train,
    **BENCH_COMMANDS,
}


@dataclasses.dataclass(frozen=True)
class RecipeCommand:
    """A command whose options are the fields of a recipe."""

    function: Callable[[Any], None]
    options: str
    """Its own options, as the usage line shows them."""
    example: str
    default: Callable[[Recipe], Any]
    """Arguments as they are when no option is given."""


RECIPE_COMMANDS = {
    "run": RecipeCommand(run, "--out DIR [--resume]", "tiny --out runs/tiny", RunArguments.of),
    "train": RecipeCommand(train, "--out DIR [--resume]", "tiny --out runs/tiny", TrainArguments.of),
    "plan": RecipeCommand(plan, "--gpus N [--gpu NAME] [--nodes N]", "3b --gpus 12 --gpu a100-80g", PlanArguments),
}
