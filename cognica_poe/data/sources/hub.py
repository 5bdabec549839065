"""Pinned files of datasets on the Hugging Face Hub, or of a mirror folder laid out as the Hub is.

``HF_ENDPOINT=file:/data/mirror`` names a mirror: the file PATH of a dataset at a commit is
``/data/mirror/datasets/ORG/NAME/resolve/COMMIT/PATH``, as in the Hub's addresses. Nothing else is asked then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from cognica_poe.data.mixes import PinnedFile, Source
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file

T = TypeVar("T")
_WAITS = (1, 4, 16)  # seconds before another try; the client itself asks six times for a file
Log = Callable[[str], None]


def _silent(line: str) -> None:
    pass


def endpoint() -> str | None:
    """Address of the Hub, where the environment names another than usual."""
    return os.environ.get("HF_ENDPOINT") or None


def mirror_folder() -> Path | None:
    """The folder that stands in for the Hub, if any. Raises UserError where there is no such folder."""
    given = endpoint() or ""
    if not given.startswith("file:"):
        return None
    folder = Path(unquote(given.removeprefix("file:").removeprefix("//")))
    if not folder.is_dir():
        raise UserError(f"HF_ENDPOINT names the mirror {folder}, which is no folder")
    return folder


def fetch(source: Source, file: PinnedFile, log: Log = _silent) -> Path:
    """Where ``file`` lies on this machine; downloaded into the Hub's cache unless it is there.

    Size and sha256 are compared with the pinned ones, where it is pinned; a cached file that differs is downloaded once
    more. Raises UserError where it cannot be had, or is another one.
    """
    where = f"{source.dataset}@{source.revision}:{file.path}"
    mirror = mirror_folder()
    if mirror is not None:
        found = mirror / "datasets" / source.dataset / "resolve" / str(source.revision) / file.path
        if not found.is_file():
            raise UserError(f"source {source.name}: the mirror lacks {found}")
        problem = _difference(found, file)
    else:
        found = patiently(lambda: _download(source, file.path, False), f"source {source.name}: {where}", log)
        problem = _difference(found, file)
        if problem:
            found = patiently(lambda: _download(source, file.path, True), f"source {source.name}: {where}", log)
            problem = _difference(found, file)
    if problem:
        raise UserError(f"source {source.name}: {where} {problem}; pin the mix again, or restore the file")
    return found


def _difference(found: Path, file: PinnedFile) -> str | None:
    if not file.sha256:
        return None
    size = found.stat().st_size
    if size != file.size:
        return f"has {size:,} bytes, pinned are {file.size:,}"
    digest = sha256_file(found)
    return None if digest == file.sha256 else f"is not the file that was pinned (sha256 {digest[:12]}...)"


def _download(source: Source, path: str, force: bool) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            source.dataset,
            path,
            repo_type="dataset",
            revision=source.revision,
            endpoint=endpoint(),
            force_download=force,
        )
    )


def patiently(call: Callable[[], T], what: str, log: Log = _silent) -> T:
    """The result of ``call``, which asks the Hub about ``what``; tried four times, with 1, 4 and 16 s in between.

    Raises UserError: at once for what another try cannot change (no such thing, no access, a full disk), else for the
    last failure.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()  # of several processes at once
    logging.set_verbosity(logging.ERROR)  # what is tried again is said here
    waits = list(_WAITS)
    while True:
        try:
            return call()
        except Exception as error:
            refusal = _refusal(error, what)
            if refusal is None and not _is_transport(error):
                raise
            if refusal or not waits:
                raise UserError(
                    refusal or f"{what} cannot be had: {_line(error)}; check the network and go on"
                ) from error
            wait = waits.pop(0)
            log(f"data: {what}: {_line(error)}; trying again in {wait} s")
            time.sleep(wait)


def _refusal(error: Exception, what: str) -> str | None:
    """What is final about a failure; None where another try may help."""
    import errno

    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"{what} asks for consent to its terms: give it on the dataset's page and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what} is not on the Hub, or not for you: check the id, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: the Hub knows no such revision any more; pin the mix again"
    if isinstance(error, LocalEntryNotFoundError):
        if isinstance(error.__cause__, HfHubHTTPError):
            return _refusal(error.__cause__, what)
        return f"{what} is not in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if isinstance(error, EntryNotFoundError):
        return f"{what} is not on the Hub any more; pin the mix again"
    if isinstance(error, HFValidationError):
        return f"{what}: {_line(error)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 500
        return None if status >= 500 or status in (408, 429) else f"{what} is refused: {_line(error)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"{what} cannot be kept: {error.strerror}; set HF_HOME to a disk with room"
    return None


def _is_transport(error: Exception) -> bool:
    """Whether a failure is one of the connection or of the server."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


def _line(error: Exception) -> str:
    return next(filter(None, str(error).splitlines()), type(error).__name__)[:160]
