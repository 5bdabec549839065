"""Pin a mix: the commit of every dataset, its data files with sizes and sha256, by the Hub's own list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from cognica_poe.data.mixes import FORMATS, Mix, PinnedFile, Source, choose_files
from cognica_poe.data.sources.hub import endpoint, fetch, mirror_folder, patiently
from cognica_poe.data.sources.local import named_split
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file

_COMMIT = re.compile(r"[0-9a-f]{40}")
Log = Callable[[str], None]


def pin(mix: Mix, sizes: dict[str, int] | None, log: Log) -> Mix:
    """``mix`` with the commit and the data files of every source; with ``sizes`` (bytes of text by source) only as many
    files as hold that much.

    A source that names a revision keeps it, any other gets the newest. Files of test and validation splits are left
    out. With ``HF_ENDPOINT=file:FOLDER`` the folder is a mirror (``data.sources.hub``). Raises UserError for a dataset,
    a revision or files that are not there, or not to be had.
    """
    wanted = sizes or {}
    return replace(mix, sources=tuple(_pin(source, wanted.get(source.name), log) for source in mix.sources))


def _pin(source: Source, wanted: int | None, log: Log) -> Source:
    mirror = mirror_folder()
    revision, listed = _from_mirror(source, mirror) if mirror else _from_hub(source, log)
    files = [replace(file, config=config) for file in listed for config in _config_of(source, file.path)]
    if missing := [config for config in source.configs if config not in {file.config for file in files}]:
        raise UserError(
            f"source {source.name}: {source.dataset}@{revision} has no data file {source.files!r} for "
            f"{', '.join(missing)}; set its files in a mix file"
        )
    pinned = replace(source, revision=revision, pinned=tuple(sorted(files, key=lambda file: file.path)))
    if wanted is not None:
        chosen = choose_files(pinned, wanted)
        if sum(map(pinned.text_bytes, chosen)) < wanted:
            log(f"{source.name}: its {len(chosen)} files may hold less than the {wanted:,} bytes wanted")
        pinned = replace(pinned, pinned=tuple(file for file in pinned.pinned if file in chosen))
    pinned = replace(pinned, pinned=tuple(_with_sha256(pinned, file) for file in pinned.pinned))
    size = sum(file.size for file in pinned.pinned)
    log(f"{source.name}: {source.dataset}@{revision}: {len(pinned.pinned)} of {len(files)} files, {size / 1e6:.1f} MB")
    return pinned


def _config_of(source: Source, path: str) -> Iterator[str]:
    """The configuration that a data file belongs to; none for files of no use."""
    if path.endswith(tuple(FORMATS)) and named_split(path) in (None, "train"):
        for config in source.configs:
            if fnmatchcase(path, source.files.replace("{config}", config)):
                yield config
                return


def _from_hub(source: Source, log: Log) -> tuple[str, list[PinnedFile]]:
    """Commit and files; those that Git itself holds have no sha256 yet."""
    from huggingface_hub import HfApi, RepoFile

    api, where = HfApi(endpoint=endpoint()), f"source {source.name}: {source.dataset}"
    info = patiently(lambda: api.dataset_info(source.dataset, revision=source.revision), where, log)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise UserError(f"the Hub names no commit of {where}")
    tree = patiently(
        lambda: list(api.list_repo_tree(source.dataset, recursive=True, revision=commit, repo_type="dataset")),
        where,
        log,
    )
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    return commit, [PinnedFile(file.path, file.size, file.lfs.sha256 if file.lfs else "") for file in files]


def _from_mirror(source: Source, mirror: Path) -> tuple[str, list[PinnedFile]]:
    root = mirror / "datasets" / source.dataset / "resolve"
    revisions = sorted(folder.name for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
    if source.revision is None and len(revisions) != 1:
        raise UserError(f"mirror {root} holds {len(revisions)} revisions of {source.name}; name one in a mix file")
    revision = source.revision or revisions[0]
    if revision not in revisions or not _COMMIT.fullmatch(revision):
        raise UserError(f"mirror {root} holds no folder {revision}, a commit of {source.name} in 40 hex digits")
    folder = root / revision
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return revision, [PinnedFile(file.relative_to(folder).as_posix(), file.stat().st_size, "") for file in files]


def _with_sha256(source: Source, file: PinnedFile) -> PinnedFile:
    return file if file.sha256 else replace(file, sha256=sha256_file(fetch(source, file)))
