"""Which groups of documents are held out, and which are in a sample: whole groups, in the order of a hash.

All of it works on columns with an entry per group, so that ten million groups take seconds and a few hundred megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.data.engine.keys import GIVEN
from cognica_poe.errors import UserError

Column = NDArray[Any]
VALIDATION = GIVEN.index("val")
_WINDOW = 65_536  # groups looked at together


@dataclass(frozen=True)
class Groups:
    """Groups by columns ``[groups]``, and what their documents hold of each source."""

    size: Column
    """int64: bytes of text."""
    main: Column
    """Number of the source that a group holds most of, the first of several."""
    validation: Column
    """uint64: the hash in whose order groups are held out; different for every group."""
    sample: Column
    """uint64: the hash in whose order groups are sampled."""
    given: Column
    """What their files' names say, as in ``keys.GIVEN``."""
    of_document: Column
    """int64 [documents]: the group of each."""
    source: Column
    """[documents]: its source."""
    bytes: Column
    """[documents]: its bytes of text."""


def find_groups(validation: Column, sample: Column, given: Column, source: Column, size: Column) -> Groups:
    """Groups of documents whose columns are given, all ``[documents]``."""
    names, first, of_document = np.unique(validation, return_index=True, return_inverse=True)
    count = int(source.max()) + 1 if len(source) else 1
    pairs, of_pair = np.unique(of_document * count + source, return_inverse=True)
    held = np.bincount(of_pair, weights=size, minlength=len(pairs))
    order = np.lexsort((pairs % count, -held, pairs // count))
    _, leading = np.unique(pairs[order] // count, return_index=True)
    return Groups(
        size=np.bincount(of_document, weights=size, minlength=len(names)).astype(np.int64),
        main=(pairs[order] % count)[leading],
        validation=names,
        sample=sample[first],
        given=given[first],
        of_document=of_document,
        source=source,
        bytes=size,
    )


def assign_splits(
    groups: Groups, fraction: float, min_bytes: int, max_bytes: int | None, wanted: Column | None = None
) -> Column:
    """int8 [groups]: 0 in the training split, 1 in the validation split, -1 in none.

    As the names of files say where one says validation, else by hash, ``fraction`` of every source and at least
    ``min_bytes`` in all. Beyond ``max_bytes`` (of what is not given as validation) a sample is kept by hash, the same
    part of every source; ``wanted``, float [sources], names the bytes of each instead. Raises UserError for too little
    text.
    """
    pool = groups.given != VALIDATION
    if wanted is not None:
        pool = choose_groups(groups, pool, wanted / 1.1, groups.sample)
    elif max_bytes is not None:
        mine = pool[groups.of_document]
        totals = np.bincount(groups.source[mine], weights=groups.bytes[mine], minlength=_sources(groups))
        if totals.sum() > max_bytes:
            pool = choose_groups(groups, pool, max_bytes / 1.1 * totals / totals.sum(), groups.sample)
    split = np.where(pool, 0, -1).astype(np.int8)
    if (groups.given == 0).all():
        split[choose_validation(groups, pool, fraction, min_bytes)] = 1
        return split
    split[groups.given == VALIDATION] = 1
    if not pool.any() or not (groups.given == VALIDATION).any():
        raise UserError("too little text: the training or the validation files hold no text of their own")
    return split


def choose_groups(groups: Groups, pool: Column, wanted: Column, by: Column) -> Column:
    """bool [groups]: those of ``pool``, in the order of the hash ``by``, until each source has about its bytes.

    ``wanted`` float [sources]. A group counts for the source that it holds most of. One that would overshoot the wish
    by more than a tenth is passed over, so that no single large text takes it all.
    """
    chosen = np.zeros(len(groups.size), dtype=bool)
    for source, bytes_ in enumerate(wanted):
        members = np.flatnonzero(pool & (groups.main == source))
        members = members[np.argsort(by[members], kind="stable")]
        chosen[members[_take(groups.size[members], 1.1 * float(bytes_))]] = True
    return chosen


def choose_validation(groups: Groups, pool: Column, fraction: float, min_bytes: int) -> Column:
    """bool [groups]: those held out of ``pool``. Raises UserError if that would take more than half of the text."""
    totals = np.bincount(groups.main[pool], weights=groups.size[pool], minlength=_sources(groups))
    total = int(totals.sum())
    target = max(fraction * total, min_bytes)
    refusal = UserError(
        f"too little text for a validation split: {total:,} bytes in {int(pool.sum())} separate documents, "
        f"{target:,.0f} bytes of validation wanted; add text, or lower val_min_bytes / val_fraction"
    )
    if target > total / 2 or pool.sum() < 2:
        raise refusal
    chosen = choose_groups(groups, pool, target * totals / total, groups.validation)
    held = int(groups.size[chosen].sum())
    left = np.flatnonzero(pool & ~chosen)
    for group in left[np.argsort(groups.validation[left], kind="stable")]:
        if held >= min_bytes and held:
            break
        size = int(groups.size[group])
        if held + size <= total / 2:
            chosen[group] = True
            held += size
    if held < min_bytes or not chosen.any():
        raise refusal
    return chosen


def _sources(groups: Groups) -> int:
    return int(groups.source.max()) + 1 if len(groups.source) else 1


def _take(sizes: Column, room: float) -> Column:
    """Places of the entries that fit, one after the other, into what the ones before them have left of ``room``."""
    taken = [np.empty(0, np.int64)]
    at = 0
    while at < len(sizes):
        window = sizes[at : at + _WINDOW]
        fitting = np.flatnonzero(window <= room)
        if not len(fitting):
            at += len(window)
            continue
        first = int(fitting[0])  # all before it are too large
        run = np.cumsum(window[first:])
        count = int(np.searchsorted(run, room, side="right"))
        taken.append(np.arange(at + first, at + first + count))
        room -= float(run[count - 1])
        at += first + count
    return np.concatenate(taken)
