"""The commands about text: ``data mix``, ``build``, ``pack`` and ``which-docs``, and ``tokenizer train``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, TypeAlias

from cognica_poe.cli.arguments import DataFolder, Flag, MixName, Natural, Positive, RunFolder
from cognica_poe.cli.output import as_dicts, print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.locks import hold_run_of
from cognica_poe.recipe.fields import LONGEST_CONTEXT, DataRecipe, Range
from cognica_poe.recipe.rules import LARGEST_VOCABULARY

RowLength: TypeAlias = Annotated[int, Range(4, LONGEST_CONTEXT + 1)]
Vocabulary: TypeAlias = Annotated[int, Range(266, LARGEST_VOCABULARY)]


def build_data(
    mix: MixName,
    out: Path,
    val_fraction: Annotated[float, Range(0, 0.5)] = DataRecipe.val_fraction,
    val_min_bytes: Positive = DataRecipe.val_min_bytes,
    max_bytes: Annotated[int | None, Range(1)] = DataRecipe.max_bytes,
    seed: Natural = DataRecipe.seed,
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

    with hold_run_of(out):
        manifest = build(
            mix, out, val_fraction=val_fraction, val_min_bytes=val_min_bytes, max_bytes=max_bytes, seed=seed, log=log
        )
    rows = [[name, total.documents, total.bytes] for name, total in manifest.splits.items()]
    print_table(f"data in {out}", ["split", "documents", "bytes"], rows)


def write_mix(mix: MixName, out: Path) -> None:
    """Write a mix to a file, to fill in the revisions of its datasets, or change its shares, and build it.

    Args:
        mix: frontier_v1, or a mix file.
        out: File to make, ending in .json.
    """
    from cognica_poe.data.mixes import find_mix, save_mix, unpinned

    chosen = find_mix(mix)
    if out.suffix != ".json" or os.path.lexists(out):
        raise UserError(f"data mix: --out {out} must be a new file that ends in .json")
    save_mix(chosen, out)
    print(out)
    if missing := unpinned(chosen):
        log(f'fill in "revision" (commit of the dataset, 40 hex digits) of: {", ".join(missing)}')


def pack_rows(data: DataFolder, tokenizer: Path, out: Path, row_len: RowLength = 2049, epoch: Natural = 0) -> None:
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

    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith(("rows-", ".")))
        if others:
            raise UserError(f"{out} holds {others[0]}, so it is no folder of packed rows: choose another --out")
    with hold_run_of(out):
        packed = pack(data, load_tokenizer(tokenizer), out, row_len=row_len, epoch=epoch, verify=True, log=log)
    facts = [[key, value] for key, value in dataclasses.asdict(packed).items()]
    print_table(f"rows in {out}", ["fact", "value"], facts)


def which_docs(run: RunFolder, step: Natural, json: Flag = False) -> None:
    """List the documents that an optimiser step of a run reads (0-based).

    Epochs that the run has not packed yet are packed into RUN/rows, where it will look for them.

    Args:
        run: Run folder.
        step: Optimiser step, counted from 0.
        json: Print one JSON document.
    """
    from cognica_poe import pipeline

    recipe = pipeline.read_recipe(run)
    if step >= recipe.training.steps:
        raise UserError(
            f"data which-docs: --step is {step}; {run} has {recipe.training.steps} steps, the last one is "
            f"{recipe.training.steps - 1}"
        )
    pieces = pipeline.open_rows(run, recipe, log).documents(step, recipe.training.batch_rows)
    if json:
        return print_json(as_dicts(pieces))
    columns = ["row", "epoch", "source", "origin", "start", "tokens", "case"]
    print_table(f"documents of step {step}", columns, [[getattr(piece, c) for c in columns] for piece in pieces])


def train_tokenizer(
    data: DataFolder, out: Path, vocab_size: Vocabulary = 32_768, max_bytes: Positive = DataRecipe.tokenizer_bytes
) -> None:
    """Train the byte-level BPE tokenizer on a data folder.

    Args:
        data: Data folder (`cognica-poe data build`).
        out: Tokenizer folder to make.
        vocab_size: Tokens, 9 specials included.
        max_bytes: Train on at most this much text.
    """
    from cognica_poe.data.manifest import load_manifest, read_documents
    from cognica_poe.data.tokenizer import train_tokenizer
    from cognica_poe.files import require_apart, require_replaceable

    require_apart(out, data)
    require_replaceable(out, "tokenizer")
    texts, made_from = (d.text for d in read_documents(data, "train")), {"data": load_manifest(data).sha256}
    with hold_run_of(out):
        train_tokenizer(texts, vocab_size, out, max_bytes=max_bytes, made_from=made_from, log=log)
    print(out)
