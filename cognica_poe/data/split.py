"""Which documents train and which validate: whole groups by hash, and what training text is too close to the latter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from cognica_poe.data.documents import unit_hash
from cognica_poe.errors import UserError

_LONG_LINE = 40  # characters; shorter lines are common to unrelated texts
_FEWEST_LINES = 3
_OVERLAP = 0.5


def choose_groups(groups: Mapping[str, Counter[str]], wanted: Mapping[str, float], seed: int, purpose: str) -> set[str]:
    """Groups in hash order until each source has about its ``wanted`` bytes.

    ``groups`` maps a group to its bytes by source; a group counts for the source that it holds most of. A group that
    would overshoot the wish by more than a tenth is passed over, so that no single large file takes it all.
    """
    by_source: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
    for key, sizes in groups.items():
        main = max(sorted(sizes), key=lambda name: sizes[name])
        by_source[main].append((unit_hash(seed, purpose, key), key, sizes.total()))
    chosen = set()
    for source, members in by_source.items():
        left = 1.1 * wanted.get(source, 0.0)
        for _, key, size in sorted(members):
            if size <= left:
                chosen.add(key)
                left -= size
    return chosen


def choose_validation(groups: Mapping[str, Counter[str]], fraction: float, min_bytes: int, seed: int) -> set[str]:
    """Groups held out: ``fraction`` of every source's bytes, at least ``min_bytes`` in all.

    Raises UserError if that would take more than half of the text.
    """
    by_source: Counter[str] = Counter()
    for sizes in groups.values():
        by_source[max(sorted(sizes), key=lambda name: sizes[name])] += sizes.total()
    total = by_source.total()
    target = max(fraction * total, min_bytes)
    refusal = UserError(
        f"too little text for a validation split: {total:,} bytes in {len(groups)} separate documents, "
        f"{target:,.0f} bytes of validation wanted; add text, or lower val_min_bytes / val_fraction"
    )
    if target > total / 2 or len(groups) < 2:
        raise refusal
    chosen = choose_groups(groups, {s: target * size / total for s, size in by_source.items()}, seed, "validation")
    held = sum(groups[key].total() for key in chosen)
    for key in sorted(groups.keys() - chosen, key=lambda key: unit_hash(seed, "validation", key)):
        size = groups[key].total()
        if (held < min_bytes or not chosen) and held + size <= total / 2:
            chosen.add(key)
            held += size
    if held < min_bytes or not chosen:
        raise refusal
    return chosen


def assign_splits(
    groups: Mapping[str, Counter[str]],
    given: Mapping[str, str],
    *,
    fraction: float,
    min_bytes: int,
    seed: int,
    max_bytes: int | None = None,
) -> dict[str, str]:
    """Group to ``train`` or ``val``: as ``given`` where file names say so, else by ``choose_validation``.

    ``groups`` maps a group to its bytes by source. Beyond ``max_bytes`` (of what is not given as validation) a sample
    is kept by hash, the same part of every source; groups outside it are absent from the result. Raises UserError for
    too little text.
    """
    pool = {key: sizes for key, sizes in groups.items() if given.get(key) != "val"}
    if max_bytes is not None:
        by_source: Counter[str] = Counter()
        for sizes in pool.values():
            by_source.update(sizes)
        if by_source.total() > max_bytes:
            wanted = {name: max_bytes / 1.1 * size / by_source.total() for name, size in by_source.items()}
            kept = choose_groups(pool, wanted, seed, "sample")
            pool = {key: pool[key] for key in kept}
    if given:
        if not pool or "val" not in given.values():
            raise UserError("too little text: the training or the validation files hold no text of their own")
        return {key: "val" for key, split in given.items() if split == "val"} | dict.fromkeys(pool, "train")
    held = choose_validation(pool, fraction, min_bytes, seed)
    return {key: "val" if key in held else "train" for key in pool}


class NearDuplicates:
    """Finds texts that repeat a validation document: half of either's long lines are shared.

    Memory is that of the validation split alone, so training text of any size can be streamed past it.
    """

    def __init__(self, validation: Iterable[str]) -> None:
        """Index the long lines of the ``validation`` texts."""
        self._documents: list[int] = []
        self._where: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(validation):
            lines = _long_lines(text)
            self._documents.append(len(lines))
            for line in lines:
                self._where[line].append(number)

    def __contains__(self, text: str) -> bool:
        lines = _long_lines(text)
        shared = [line for line in lines if line in self._where]
        if len(shared) < _FEWEST_LINES:
            return False
        if len(shared) >= _OVERLAP * len(lines):
            return True
        hits = Counter(number for line in shared for number in self._where[line])
        return any(
            count >= _FEWEST_LINES and count >= _OVERLAP * self._documents[number] for number, count in hits.items()
        )


def _long_lines(text: str) -> set[str]:
    return {stripped for line in text.split("\n") if len(stripped := line.strip()) >= _LONG_LINE}
