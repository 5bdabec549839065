"""The commands about tokenizers: ``tokenizer train`` and ``tokenizer report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from cognica_poe.cli.arguments import DataFolder, Flag, Positive
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.locks import hold_run_of
from cognica_poe.recipe.fields import DataRecipe, Range
from cognica_poe.recipe.rules import LARGEST_VOCABULARY

Vocabulary: TypeAlias = Annotated[int, Range(266, LARGEST_VOCABULARY)]
_PLOTS = (".png", ".svg", ".pdf")


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


def report(
    data: DataFolder,
    tokenizer: Path,
    split: Literal["train", "val"] = "train",
    max_bytes: Positive = 50_000_000,
    threads: Annotated[int, Range(1, 256)] = 1,
    plot: Path | None = None,
    json: Flag = False,
) -> None:
    """Measure a tokenizer on a data folder, by source and language: bytes per token, tokens per word, round trips.

    Args:
        data: Data folder.
        tokenizer: Tokenizer folder.
        split: Split to read.
        max_bytes: Read about this much text, a sample of the split by hash.
        threads: Threads that encode; the figures are the same from any number.
        plot: Draw the figures into this file too, .png, .svg or .pdf.
        json: Print one JSON document.
    """
    from cognica_poe.data import tokens
    from cognica_poe.data.manifest import read_documents
    from cognica_poe.data.tokenizer import load_tokenizer

    if plot is not None and (plot.suffix not in _PLOTS or not plot.absolute().parent.is_dir() or plot.is_dir()):
        raise UserError(f"tokenizer report: --plot {plot} must be a file in a folder, ending in {', '.join(_PLOTS)}")
    loaded = load_tokenizer(tokenizer)
    tallies = tokens.measure(read_documents(data, split), loaded, max_bytes, threads)
    found = tokens.summary(tallies, loaded)
    if plot is not None:
        tokens.plot(found, plot)
    if json:
        return print_json(found)
    rows = [
        [
            row["source"],
            row["language"],
            row["documents"],
            row["tokens"],
            f"{100 * row['share_of_tokens']:.2f} %",
            row["bytes_per_token"],
            row["fertility"],
            f"{100 * row['byte_tokens']:.2f} %",
            row["tokens_used"],
            row["changed"],
        ]
        for row in found["rows"]
    ]
    columns = ["source", "language", "documents", "tokens", "share", "bytes/token", "tokens/word", "single bytes"]
    print_table(f"tokens of {data}, {split}", [*columns, "tokens used", "changed"], rows)
    print(f"{len(found['unused']):,} of {found['vocab_size']:,} tokens occur nowhere in it")
