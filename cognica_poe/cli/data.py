"""The commands about text: ``data build``, ``data pack``, ``data which-docs`` and ``tokenizer train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cognica_poe.cli.arguments import DataFolder, Flag, MixName, RunFolder
from cognica_poe.cli.output import as_dicts, print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import DataRecipe


def build_data(
    mix: MixName,
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

    manifest = build(
        mix, out, val_fraction=val_fraction, val_min_bytes=val_min_bytes, max_bytes=max_bytes, seed=seed, log=log
    )
    rows = [[name, total.documents, total.bytes] for name, total in manifest.splits.items()]
    print_table(f"data in {out}", ["split", "documents", "bytes"], rows)


def pack_rows(data: DataFolder, tokenizer: Path, out: Path, row_len: int = 2049, epoch: int = 0) -> None:
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

    packed = pack(data, load_tokenizer(tokenizer), out, row_len=row_len, epoch=epoch, verify=True, log=log)
    facts = [[key, value] for key, value in dataclasses.asdict(packed).items()]
    print_table(f"rows in {out}", ["fact", "value"], facts)


def which_docs(run: RunFolder, step: int, json: Flag = False) -> None:
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
    print_table(f"documents of step {step}", columns, [[getattr(piece, c) for c in columns] for piece in pieces])


def train_tokenizer(
    data: DataFolder, out: Path, vocab_size: int = 32_768, max_bytes: int = DataRecipe.tokenizer_bytes
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
    from cognica_poe.files import require_apart

    require_apart(out, data)
    texts, made_from = (d.text for d in read_documents(data, "train")), {"data": load_manifest(data).sha256}
    train_tokenizer(texts, vocab_size, out, max_bytes=max_bytes, made_from=made_from, log=log)
    print(out)
