"""The commands about mixes of Hub datasets: ``data mix show`` and ``data mix pin``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

from cognica_poe.cli.arguments import Flag, MixName
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Range

Size = Annotated[int | None, Range(1, 2**50)]


def show_mix(mix: MixName, tokens: Size = None, bytes: Size = None, json: Flag = False) -> None:
    """Show the sources of a mix: datasets, revisions, files, languages, licences, and the text to read of each.

    Args:
        mix: frontier_v1, or a mix file.
        tokens: Size of the whole in tokens; shares are of tokens.
        bytes: Size of the whole in bytes of text.
        json: Print one JSON document.
    """
    from cognica_poe.data.mixes import byte_shares, find_mix

    chosen = find_mix(mix)
    sizes = _sizes(chosen, tokens, bytes, "data mix show")
    if json:
        described = dataclasses.asdict(chosen)
        for source in described["sources"]:
            source["bytes"] = sizes and sizes[source["name"]]
        return print_json(described)
    rows = []
    for source in chosen.sources:
        share, pinned = f"{100 * source.share:.1f} %", sum(file.size for file in source.pinned)
        files = f"{len(source.pinned)} of {_in_words(pinned)}" if source.pinned else source.files
        size = _in_words(sizes[source.name]) if sizes else f"{100 * byte_shares(chosen)[source.name]:.1f} %"
        revision = (source.revision or "not pinned")[:12]
        languages = ", ".join(source.languages)
        rows.append([source.name, source.dataset, revision, files, languages, source.licence, share, size])
    columns = ["source", "dataset", "revision", "files", "languages", "licence", "of tokens", "of bytes"]
    print_table(f"mix {chosen.name}", columns, rows)


def pin_mix(mix: MixName, out: Path, tokens: Size = None, bytes: Size = None, report: Path | None = None) -> None:
    """Write a mix to a file that names commit, files, sizes and sha256 of every source, as the Hub has them now.

    A source whose revision is given keeps it. With a size only as many files are named as hold that much text, and
    `data build` takes that size. HF_ENDPOINT=file:FOLDER reads a mirror instead of the Hub.

    Args:
        mix: frontier_v1, or a mix file.
        out: File to make, ending in .json.
        tokens: Size of the whole in tokens; shares are of tokens.
        bytes: Size of the whole in bytes of text.
        report: `tokenizer report --json` of data of this mix, for bytes per token as measured.
    """
    from cognica_poe.data.mixes import find_mix, save_mix
    from cognica_poe.data.sources.pinning import pin
    from cognica_poe.data.tokens import with_measured

    if out.suffix != ".json" or os.path.lexists(out):
        raise UserError(f"data mix pin: --out {out} must be a new file that ends in .json")
    chosen = find_mix(mix)
    if report is not None:
        chosen = with_measured(chosen, report)
    sizes = _sizes(chosen, tokens, bytes, "data mix pin")
    pinned = pin(chosen, sizes, log)
    save_mix(dataclasses.replace(pinned, bytes=sum(sizes.values()) if sizes else None), out)
    print(out)


def _in_words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _sizes(mix: object, tokens: int | None, max_bytes: int | None, command: str) -> dict[str, int] | None:
    """Bytes of text by source; None where no size is known."""
    from cognica_poe.data.mixes import Mix, text_sizes

    assert isinstance(mix, Mix)
    if tokens is not None and max_bytes is not None:
        raise UserError(f"{command}: --tokens and --bytes are two sizes of one thing: give one")
    if tokens is None and max_bytes is None and mix.bytes is None:
        return None
    return text_sizes(mix, tokens=tokens, max_bytes=max_bytes)
