"""Texts of local files for a single use, without a data folder to keep."""

from __future__ import annotations

from collections.abc import Callable

from cognica_poe.data.build import build
from cognica_poe.data.manifest import read_documents
from cognica_poe.leftovers import scratch_folder


def collect_texts(source: str, log: Callable[[str], None]) -> list[str]:
    """Every document of ``source``, collected and filtered as ``data build`` does; nothing is held out.

    Raises UserError as :func:`cognica_poe.data.build.build`.
    """
    with scratch_folder() as folder:
        data = folder / "data"
        build(source, data, val_fraction=0.0, val_min_bytes=1, log=log)
        return [document.text for split in ("train", "val") for document in read_documents(data, split)]
