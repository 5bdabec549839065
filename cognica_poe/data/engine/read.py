"""Stage ``read``: documents out of their sources, those that are no use left out, keys of the others beside them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from cognica_poe.data.cleaning.decontamination import EvaluationIndex
from cognica_poe.data.cleaning.rules import EVALUATION_TEXT, Cleaning
from cognica_poe.data.documents import Document
from cognica_poe.data.engine.job import Job, Made, Outputs, Stage, Values
from cognica_poe.data.engine.keys import Keys, write_arrays
from cognica_poe.data.engine.texts import DocumentWriter
from cognica_poe.data.mixes import PYTHON_DOCS, PinnedFile, Source
from cognica_poe.data.sources import python_docs
from cognica_poe.data.sources.hub import fetch
from cognica_poe.data.sources.local import read_file
from cognica_poe.data.sources.records import read_pinned
from cognica_poe.seals import require_sha256

TEST_SPLIT = "test split"
_LATER = ("exact_duplicates", "validation_leaks", "evaluation_texts")  # of other stages, or by its content
Drop = Callable[[str, str], None]
"""Counts a document left out: its reason and its source."""


class Read(Stage):
    """A task per list of parts in the plan. Writes ``.parquet``, the documents kept, and ``.npz``, their keys.

    Counts ``kept``, ``dropped`` (by source and reason), ``sources`` (names in the order of the keys' numbers) and
    ``files`` (of each part that is one).
    """

    name = "read"
    endings = (".parquet", ".npz")

    def count(self, job: Job) -> int:
        return len(job.plan["parts"])

    def parameters(self, job: Job, number: int) -> Values:
        plan = job.plan
        cleaning = {name: value for name, value in plan["options"]["cleaning"].items() if name not in _LATER}
        of_plan = {"seed": plan["options"]["seed"], "root": plan["root"], "evaluation": plan["evaluation"]}
        return {"parts": plan["parts"][number], "cleaning": cleaning, **of_plan}

    def is_current(self, job: Job, made: Made) -> bool:
        return all(
            _state(job, part) == known["state"] or _sha256(job, part) == known["sha256"]
            for part, known in zip(made.parameters["parts"], made.counts["files"], strict=True)
            if part["kind"] == "file"
        )

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        keys, cleaning = Keys(job.plan["options"]["seed"]), Cleaning(**job.plan["options"]["cleaning"])
        evaluation = evaluation_index(job.plan["evaluation"], cleaning)
        dropped: dict[str, Counter[str]] = defaultdict(Counter)
        kept, files = 0, list[Values | None]()

        def drop(reason: str, source: str) -> None:
            dropped[source][reason] += 1

        with out.write(".parquet") as file, DocumentWriter(file) as writer:
            for part in job.plan["parts"][number]:
                is_file = part["kind"] == "file"
                files.append({"state": _state(job, part), "sha256": _sha256(job, part)} if is_file else None)
                for document in documents_of(job, part, drop):
                    problem = TEST_SPLIT if part["split"] == "test" else None
                    problem = problem or cleaning.problem(document.text, document.language)
                    if problem or (evaluation is not None and document.text in evaluation):
                        drop(problem or EVALUATION_TEXT, document.source)
                        continue
                    size = len(document.text.encode())
                    keys.add(document, size, part["split"], cleaning.near_duplicates)
                    writer.add(document, size)
                    kept += 1
        with out.write(".npz") as file:
            write_arrays(file, keys.arrays())
        left_out = {source: dict(sorted(reasons.items())) for source, reasons in sorted(dropped.items())}
        return {"kept": kept, "dropped": left_out, "sources": list(keys.sources), "files": files}


def evaluation_index(planned: Values | None, cleaning: Cleaning) -> EvaluationIndex | None:
    """What a plan's evaluation texts hold; None without any. Raises UserError for a file that changed since."""
    if planned is None:
        return None
    root = Path(planned["root"])
    paths = [root / name if name else root for name, _ in planned["files"]]
    for path, (_, digest) in zip(paths, planned["files"], strict=True):
        require_sha256(path, digest, "evaluation text", "start the build again")
    texts = (document.text for path in paths for document in read_file(path, root, lambda reason, source: None))
    return EvaluationIndex(texts, cleaning.evaluation_words)


def documents_of(job: Job, part: Values, drop: Drop) -> Iterator[Document]:
    """Documents of a part of the plan, as they come."""
    if part["kind"] == PYTHON_DOCS:
        yield from python_docs.collect()
    elif part["kind"] == "hub":
        source = TypeAdapter(Source).validate_json(json.dumps(part["source"]))
        pinned = PinnedFile(**part["file"])
        yield from read_pinned(source, pinned, fetch(source, pinned), lambda reason: drop(reason, source.name))
    else:
        groups = (part["groups"][0], part["groups"][1]) if "groups" in part else None
        yield from read_file(_path(job, part), Path(job.plan["root"]), drop, groups, part.get("first_row", 0))


def _path(job: Job, part: Values) -> Path:
    root = Path(job.plan["root"])
    return root / part["file"] if part["file"] is not None else root


def _state(job: Job, part: Values) -> list[int] | None:
    """What tells of a change of a file without reading it."""
    try:
        found = _path(job, part).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _sha256(job: Job, part: Values) -> str | None:
    """Hex sha256 of a file, or of the part of it that is read; None where it is gone or no file."""
    path = _path(job, part)
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            if "bytes" not in part:
                return hashlib.file_digest(file, "sha256").hexdigest()
            first, last = part["bytes"]
            file.seek(first)
            digest = hashlib.sha256()
            while first < last and (data := file.read(min(2**20, last - first))):
                digest.update(data)
                first += len(data)
            return digest.hexdigest()
    except OSError:
        return None  # reading it says what is wrong
