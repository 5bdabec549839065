"""The plan of a build: which files, or parts of files, each reading task takes, and every setting that decides bytes.

Files are put together, and large parquet files divided at their row groups, so that a task reads about a sixteenth of
the corpus, 4 to 64 MB. The order of the plan is the order of the documents: where two are the same, the first one
stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cognica_poe.data.cleaning.rules import Cleaning
from cognica_poe.data.mixes import MIXES, PYTHON_DOCS, Mix, choose_files, load_mix, require_pinned, text_sizes
from cognica_poe.data.sources.local import explicit_split, local_files
from cognica_poe.errors import UserError
from cognica_poe.files import require_apart, sha256_file

SHARD_BYTES = 256_000_000
"""UTF-8 text of a training shard, about."""
_TASK_BYTES = 4_000_000, 64_000_000
_STEP = 4  # between sizes of tasks: a file that changes a little should move no others to other tasks


@dataclass(frozen=True)
class Options:
    """Everything of a build that decides its bytes, beside what it reads."""

    val_fraction: float = 0.02
    val_min_bytes: int = 200_000
    seed: int = 0
    max_bytes: int | None = None
    shard_bytes: int = SHARD_BYTES
    cleaning: Cleaning = field(default_factory=Cleaning)

    def check(self) -> None:
        """Raise UserError for a value that no build can have."""
        if not 0 <= self.val_fraction <= 0.5 or (self.max_bytes is not None and self.max_bytes <= 0):
            raise UserError(
                f"val_fraction {self.val_fraction} must be in [0, 0.5] and max_bytes {self.max_bytes} positive"
            )
        if self.val_min_bytes < 1 or self.shard_bytes < 1:
            raise UserError(f"val_min_bytes {self.val_min_bytes} and shard_bytes {self.shard_bytes} must be at least 1")


def plan_build(given: str, out: Path, options: Options, log: Callable[[str], None]) -> dict[str, Any]:
    """What a build of ``given`` does, as JSON values. Raises UserError for what cannot be read; writes nothing.

    ``parts`` has a list for every reading task: dicts of ``kind`` (``python-docs``, ``hub``, ``file``) and what that
    kind needs: of a pinned file its ``source`` and ``file``, of a local one its ``file`` below ``root``, and of a part
    its row ``groups``, ``first_row`` and ``bytes``. ``sizes`` has the bytes of every source that a mix asks for.
    """
    options.check()
    plan: dict[str, Any] = {"kind": "build", "given": given, "options": asdict(options), "root": None, "mix": None}
    plan |= {"sizes": None, "evaluation": _evaluation(options.cleaning)}
    if given == PYTHON_DOCS:
        log("data: collecting python-docs from this Python installation")
        return plan | {"name": given, "parts": [[{"kind": PYTHON_DOCS, "split": None}]]}
    mix = load_mix(Path(given)) if given.endswith(".json") else MIXES.get(given)
    if mix is not None:
        require_pinned(mix)
        sizes = text_sizes(mix, max_bytes=options.max_bytes)
        described = replace(mix, sources=tuple(replace(source, pinned=()) for source in mix.sources))
        return plan | {"name": mix.name, "mix": asdict(described), "sizes": sizes, "parts": _hub_parts(mix, sizes)}
    path = Path(given)
    require_apart(out, path)
    parts = _local_parts(local_files(path), path, log)
    return plan | {"name": path.name, "root": str(path.absolute()), "parts": parts}


def _evaluation(cleaning: Cleaning) -> dict[str, Any] | None:
    """``root`` of the evaluation texts and ``files``, ``[name, sha256]`` each; the name is empty where the root is one.

    Raises UserError for what cannot be read.
    """
    if cleaning.evaluation_texts is None:
        return None
    root = Path(cleaning.evaluation_texts).absolute()
    files = [
        [file.relative_to(root).as_posix() if root.is_dir() else "", sha256_file(file)] for file in local_files(root)
    ]
    return {"root": str(root), "files": files}


def mix_name(given: str) -> str | None:
    """What a build calls the mix or path ``given`` in the manifest; None for a mix file that is gone since."""
    if given == PYTHON_DOCS or given in MIXES:
        return given
    if given.endswith(".json"):
        return load_mix(Path(given)).name if Path(given).is_file() else None
    return Path(given).name


def _hub_parts(mix: Mix, sizes: dict[str, int]) -> list[list[dict[str, Any]]]:
    """The parts of every task: pinned files of one source, together up to the text of a task."""
    tasks: list[list[dict[str, Any]]] = []
    for source in mix.sources:
        room, described = 0.0, asdict(replace(source, pinned=()))
        for file in choose_files(source, sizes[source.name]):
            if (size := source.text_bytes(file)) > room:
                tasks.append([])
                room = _TASK_BYTES[1]
            part = {"kind": "hub", "split": None, "source": described, "file": asdict(file), "size": int(size)}
            tasks[-1].append(part)
            room -= size
    return tasks


def _local_parts(files: list[Path], root: Path, log: Callable[[str], None]) -> list[list[dict[str, Any]]]:
    """The parts of every task, in the order of the files."""
    splits = [explicit_split(file, root) for file in files]
    given = "val" in splits  # without a validation file, files named train are parted like any other
    if set(splits) <= {"val", "test"}:
        kinds = " and ".join(name for split, name in (("val", "validation"), ("test", "test")) if split in splits)
        raise UserError(f"{root} holds {kinds} files only; add training files")
    tests = splits.count("test")
    log(f"data: reading {len(files) - tests} local files")
    if tests:
        log(f"data: {tests} files of a test split are left out")
    tasks: list[list[dict[str, Any]]] = []
    room, least, most = 0, *_TASK_BYTES
    size = sum(map(_size, files))
    task_bytes = least
    while task_bytes < most and size > 16 * task_bytes:  # enough tasks for several processes to end together
        task_bytes *= _STEP
    for file, split in zip(files, splits, strict=True):
        name = file.relative_to(root).as_posix() if root.is_dir() else None
        side = "test" if split == "test" else ((split or "train") if given else None)
        for part, size in _divided(file, task_bytes):
            alone = 4 * size > task_bytes
            if size > room or alone or not tasks:
                tasks.append([])
                room = task_bytes
            tasks[-1].append({"kind": "file", "split": side, "file": name, "size": size, **part})
            room -= task_bytes if alone else size
    return tasks


def _size(file: Path) -> int:
    """Bytes of a file, of a parquet file before compression; 0 for what is none."""
    described = _described(file)
    if described is not None:
        return sum(int(described.row_group(i).total_byte_size) for i in range(described.num_row_groups))
    return file.stat().st_size if file.is_file() else 0


def _described(file: Path) -> Any:
    """The metadata of a parquet file; None for one that cannot be read, which reading it will say, and any other."""
    if file.suffix.lower() != ".parquet" or not file.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return None


def _divided(file: Path, task_bytes: int) -> list[tuple[dict[str, Any], int]]:
    """Parts of a file with their sizes: runs of row groups of a large parquet file, else the whole."""
    size, described = _size(file), _described(file)
    if described is None or size <= task_bytes:
        return [({}, size)]
    groups = [described.row_group(i) for i in range(described.num_row_groups)]
    rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
    starts = [*map(_start, groups), file.stat().st_size]
    parts: list[tuple[dict[str, Any], int]] = []
    first = 0
    while first < len(groups):
        last = first + 1
        while last < len(groups) and sum(sizes[first : last + 1]) <= task_bytes:
            last += 1
        place = {"groups": [first, last], "first_row": sum(rows[:first]), "bytes": [starts[first], starts[last]]}
        parts.append((place, sum(sizes[first:last])))
        first = last
    return parts


def _start(group: Any) -> int:
    """Where the bytes of a row group begin in its file."""
    column = group.column(0)
    return min(int(at) for at in (column.dictionary_page_offset, column.data_page_offset) if at)
