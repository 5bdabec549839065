"""Publish release folders as revisions ``step-N`` of one repository, on the Hub or in a local Hub cache folder.

``main`` is the latest step with the card of all steps and ``trajectory.jsonl``, one line per revision. Nothing is
published twice, two steps never hold the same weights (a fault known from published trajectories), the model code is
the same in all of them, and a run that stopped anywhere is finished by repeating the call.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cognica_poe.analysis.sums import unpack
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, parse_json, safe_name
from cognica_poe.leftovers import scratch_folder
from cognica_poe.recipe.rules import REPO_ID
from cognica_poe.release.export import SUMS, Release, check_release
from cognica_poe.release.publish.clean_load import logits_in_clean_process
from cognica_poe.release.publish.hub_folder import HubFolder
from cognica_poe.release.publish.hub_remote import HubRepo
from cognica_poe.release.publish.tree import (
    DamagedRevision,
    Published,
    Tree,
    code_of,
    main_outline,
    main_tree,
    source_sha256,
    trajectory_line,
    tree_of,
)

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")


class Hub(Protocol):
    """A place that holds revisions (``HubFolder``, ``HubRepo``). All calls raise UserError where the place refuses."""

    repo_id: str
    where: str
    """The place in words, for messages."""

    def open(self) -> contextlib.AbstractContextManager[None]:
        """Make the place if it is not there; within the block it is this process' own, where that can be."""

    def refs(self, rewritten: Collection[str] = ()) -> dict[str, str]:
        """``{name of a revision: commit}``; those to be ``rewritten`` may be missing where they are damaged."""

    def read(self, commit: str, name: str) -> bytes:
        """One file of a revision."""

    def is_ours(self, commit: str) -> bool:
        """Whether the revision carries a manifest of ours, damaged or not."""

    def check(self, ref: str, tree: Tree) -> None:
        """Raise UserError, before anything is written, when ``ref`` holds files that ``tree`` may not replace."""

    def holds(self, commit: str, tree: Tree) -> bool:
        """Whether the revision holds ``tree``, undamaged, and nothing else that we wrote."""

    def put(self, ref: str, tree: Tree) -> str:
        """Store ``tree`` beside what others wrote, check it, then point ``ref`` at it; returns the commit."""

    def finish(self, ref: str, commit: str) -> None:
        """What is left to do once ``ref`` names ``commit``; can be repeated."""


@dataclass(frozen=True)
class Publication:
    """What is on the hub now."""

    repo_id: str
    where: str
    revisions: dict[int, str]
    """Commit of every published step."""
    main: str
    """Commit of ``main``."""


def publish(
    release_dirs: Sequence[Path],
    dest: str,
    repo_id: str | None = None,
    *,
    replace: bool = False,
    clean_load: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Publication:
    """Publish release folders to ``dest``: ``file:FOLDER`` (with ``repo_id``) or ``org/name`` on the Hub.

    What others wrote stays. ``replace`` allows a step to get other content than it was published with, and files in the
    way that we did not write, or that were changed since, to be replaced; each is named. ``clean_load`` (folder only)
    loads the latest revision in a clean offline process at the end. Raises UserError for a faulty release, equal
    weights in two steps, code that differs between steps, a step that exists with other content, a file in the way,
    one that may not be read, no token, no network.
    """
    hub = open_hub(dest, repo_id, replace=replace, log=log)
    try:
        return _publish_checked(release_dirs, hub, replace, clean_load, log)
    except PermissionError as error:
        raise UserError(f"{error.filename} may not be read: change its permissions") from error


def _publish_checked(
    release_dirs: Sequence[Path], hub: Hub, replace: bool, clean_load: bool, log: Callable[[str], None]
) -> Publication:
    checked = sorted((check_release(Path(path)) for path in release_dirs), key=lambda release: release.step)
    if not checked:
        raise UserError("nothing to publish: pass at least one release folder")
    releases: dict[int, Release] = {}
    for release in checked:
        if not _STEP.fullmatch(f"step-{release.step}"):
            raise UserError(f"{release.path} is of step {release.step}: no run has that many, export it again")
        if release.step in releases:
            raise UserError(f"{releases[release.step].path} and {release.path} are both of step {release.step}")
        releases[release.step] = release
    with hub.open():
        return _publish(hub, releases, replace, clean_load, log)


def _publish(
    hub: Hub, releases: dict[int, Release], replace: bool, clean_load: bool, log: Callable[[str], None]
) -> Publication:
    rewritten = {"main", *(f"step-{step}" for step in releases)}
    before = _published(hub, hub.refs(rewritten), set(releases), log)
    pending = _pending(hub, releases, before, replace)
    _check_uniqueness(releases, before)
    for step in sorted(pending):
        hub.check(f"step-{step}", tree_of(releases[step].path))
    latest = max({**releases, **before})
    hub.check("main", main_outline(tree_of(releases[latest].path) if latest in releases else before[latest].outline))
    for step, release in releases.items():
        name = f"step-{step}"
        if step not in pending:
            hub.finish(name, before[step].commit)
            log(f"publish: {name} is published already")
            continue
        commit = hub.put(name, tree_of(release.path))
        log(f"publish: {name} is {commit[:12]} at {hub.where}")
    steps = _published(hub, hub.refs(rewritten))
    main = _publish_main(hub, releases, steps)
    log(f"publish: main is step-{max(steps)} ({main[:12]}), {len(steps)} revisions of {hub.repo_id}")
    if clean_load and isinstance(hub, HubFolder):
        for revision in ("main", f"step-{max(steps)}"):
            logits_in_clean_process(hub.repo_id, [0, 1, 2], revision=revision, cache_dir=hub.base.parent)
        log("publish: the latest revision loads in a clean process")
    return Publication(hub.repo_id, hub.where, {step: item.commit for step, item in sorted(steps.items())}, main)


def open_hub(
    dest: str,
    repo_id: str | None = None,
    *,
    replace: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Hub:
    """The place that ``dest`` names, with what may be done there. Raises UserError when it names none."""
    folder = dest.removeprefix("file:")
    if folder != dest:
        if not folder:
            raise UserError("--to file: names no folder: write file:FOLDER")
        if repo_id is None or not REPO_ID.fullmatch(repo_id):
            raise UserError(f"{repo_id!r} is no repository id: it must look like org/name")
        return HubFolder(Path(folder), repo_id, replace=replace, log=log)
    if not REPO_ID.fullmatch(dest):
        raise UserError(f"cannot publish to {dest!r}: write org/name for the Hub, or file:FOLDER for a local folder")
    return HubRepo(dest, replace=replace, log=log)


def _published(
    hub: Hub,
    refs: dict[str, str],
    replaceable: Collection[int] = (),
    log: Callable[[str], None] = lambda line: None,
) -> dict[int, Published]:
    """Every step on the hub, by its own manifest and record; without damaged ones that are ``replaceable``.

    A branch of such a name that holds no release of ours is left alone.
    """
    found = {}
    for name, commit in refs.items():
        match = _STEP.fullmatch(name)
        if match is None:
            continue
        step = int(match.group(1))
        try:
            if hub.is_ours(commit):
                found[step] = _read_published(hub, name, step, commit)
            else:
                log(f"publish: {name} at {hub.where} is no release of ours")
        except DamagedRevision as error:
            if step not in replaceable:
                raise
            log(f"publish: {name} is stored again: {str(error).partition(';')[0]}")
    return found


def _read_published(hub: Hub, name: str, step: int, commit: str) -> Published:
    """One step on the hub. Raises DamagedRevision where manifest or record is not what it should be."""
    where = f"of {name} at {hub.where}"
    remedy = "publish that step again"
    data = hub.read(commit, MANIFEST)
    try:
        digests = Manifest.parse(data, f"{MANIFEST} {where}", remedy).digests
    except UserError as error:
        raise DamagedRevision(str(error)) from error

    def read(file: str) -> bytes:
        data = hub.read(commit, file)
        if (digest := source_sha256(data)) != (expected := digests.get(file, "of no listed file")):
            raise DamagedRevision(
                f"{file} {where} was changed: its sha256 is {digest[:12]}, expected {expected[:12]}; {remedy}"
            )
        return data

    data, about = read("analysis.json"), read("release.json")
    packed = read(SUMS) if SUMS in digests else None
    try:
        sums = unpack(packed, where, remedy) if packed is not None else None
        published = Published(step, commit, digests, parse_json(data), sums, parse_json(about))
        if published.record["step"] != step:
            raise ValueError("it is of another step")
        trajectory_line(published)
    except UserError as error:
        raise DamagedRevision(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRevision(f"analysis.json {where} is no record of that step ({error}); {remedy}") from error
    return published


def _pending(hub: Hub, releases: dict[int, Release], before: dict[int, Published], replace: bool) -> set[int]:
    """Steps that have to be uploaded."""
    pending = set()
    for step, release in releases.items():
        if step in before and hub.holds(before[step].commit, tree_of(release.path)):
            continue
        damaged = step in before and before[step].digests == Manifest.read(release.path).digests
        if step in before and not replace and not damaged:
            raise UserError(
                f"step-{step} of {hub.repo_id} is published with other content at {hub.where}: a published revision "
                "stays as it is; use another repository, or --replace"
            )
        pending.add(step)
    return pending


def _check_uniqueness(releases: dict[int, Release], before: dict[int, Published]) -> None:
    """Different weights and the same code in all steps, those on the hub and those to come."""
    weights = {step: item.weights_sha256 for step, item in before.items()}
    code = {step: item.code for step, item in before.items()}
    for step, release in releases.items():
        weights[step] = release.weights_sha256
        code[step] = code_of(Manifest.read(release.path).digests)
    seen: dict[str, int] = {}
    for step in sorted(weights):
        if weights[step] in seen:
            raise UserError(f"step-{seen[weights[step]]} and step-{step} hold the same weights: one is not its step")
        seen[weights[step]] = step
    first = min(code)
    for step in sorted(code):
        if code[step] != code[first]:
            raise UserError(
                f"the model code of step-{step} is not that of step-{first}: export and publish all steps with one "
                "version of this package"
            )


def _publish_main(hub: Hub, releases: dict[int, Release], steps: dict[int, Published]) -> str:
    """Make ``main`` the latest step with the trajectory. A later step that is on the hub only stays the latest."""
    latest = max(steps)
    if latest not in releases:
        return _extend_main(hub, steps)
    tree = main_tree(releases[latest], list(steps.values()))
    head = hub.refs(["main"]).get("main")
    return head if head and hub.holds(head, tree) else hub.put("main", tree)


def _extend_main(hub: Hub, steps: dict[int, Published]) -> str:
    """``main`` where the latest step is not among the folders at hand: its files are read from the hub."""
    latest = steps[max(steps)]
    with scratch_folder() as scratch:
        for name in [*latest.digests, MANIFEST]:
            flat = safe_name(name, f"step-{latest.step} at {hub.where}: file name")
            (scratch / flat).write_bytes(hub.read(latest.commit, flat))
        tree = main_tree(check_release(scratch), list(steps.values()))
        head = hub.refs(["main"]).get("main")
        return head if head and hub.holds(head, tree) else hub.put("main", tree)
