"""Publish release folders as revisions ``step-N`` of one repository, on the Hub or in a local Hub cache folder.

``main`` is the latest step with the card of all steps and ``trajectory.jsonl``, one line per revision. Nothing is
published twice, two steps never hold the same weights (a fault known from published trajectories), the model code is
the same in all of them, and a run that stopped anywhere is finished by repeating the call.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, safe_name
from cognica_poe.leftovers import scratch_folder
from cognica_poe.recipe.rules import REPO_ID
from cognica_poe.release.export import Release, check_release
from cognica_poe.release.publish.clean_load import logits_in_clean_process
from cognica_poe.release.publish.hub_folder import HubFolder
from cognica_poe.release.publish.hub_remote import HubRepo
from cognica_poe.release.publish.tree import DamagedRevision, Published, Tree, code_of, main_tree, tree_of

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")


class Hub(Protocol):
    """A place that holds revisions (``HubFolder``, ``HubRepo``). All calls raise UserError where the place refuses."""

    repo_id: str
    where: str
    """The place in words, for messages."""

    def open(self) -> contextlib.AbstractContextManager[None]:
        """Make the place if it is not there; within the block it is this process' own, where that can be."""

    def refs(self) -> dict[str, str]:
        """``{name of a revision: commit}``."""

    def read(self, commit: str, name: str) -> bytes:
        """One file of a revision."""

    def holds(self, commit: str, tree: Tree) -> bool:
        """Whether the revision is ``tree``, undamaged."""

    def put(self, ref: str, tree: Tree) -> str:
        """Store ``tree``, check it, then point ``ref`` at it; returns the commit."""

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

    ``replace`` allows a step to get other content than it was published with. ``clean_load`` (folder only) loads the
    latest revision in a clean offline process at the end. Raises UserError for a faulty release, equal weights in two
    steps, code that differs between steps, a step that exists with other content, no token, no network.
    """
    checked = sorted((check_release(Path(path)) for path in release_dirs), key=lambda release: release.step)
    if not checked:
        raise UserError("nothing to publish: pass at least one release folder")
    hub = open_hub(dest, repo_id)
    releases: dict[int, Release] = {}
    for release in checked:
        if release.step in releases:
            raise UserError(f"{releases[release.step].path} and {release.path} are both of step {release.step}")
        releases[release.step] = release
    with hub.open():
        return _publish(hub, releases, replace, clean_load, log)


def _publish(
    hub: Hub, releases: dict[int, Release], replace: bool, clean_load: bool, log: Callable[[str], None]
) -> Publication:
    before = _published(hub, hub.refs(), set(releases), log)
    pending = _pending(hub, releases, before, replace)
    _check_uniqueness(releases, before)
    for step, release in releases.items():
        name = f"step-{step}"
        if step not in pending:
            hub.finish(name, before[step].commit)
            log(f"publish: {name} is published already")
            continue
        commit = hub.put(name, tree_of(release.path))
        log(f"publish: {name} is {commit[:12]} at {hub.where}")
    steps = _published(hub, hub.refs())
    main = _publish_main(hub, releases, steps)
    log(f"publish: main is step-{max(steps)} ({main[:12]}), {len(steps)} revisions of {hub.repo_id}")
    if clean_load and isinstance(hub, HubFolder):
        for revision in ("main", f"step-{max(steps)}"):
            logits_in_clean_process(hub.repo_id, [0, 1, 2], revision=revision, cache_dir=hub.base.parent)
        log("publish: the latest revision loads in a clean process")
    return Publication(hub.repo_id, hub.where, {step: item.commit for step, item in sorted(steps.items())}, main)


def open_hub(dest: str, repo_id: str | None = None) -> Hub:
    """The place that ``dest`` names. Raises UserError when it names none."""
    folder = dest.removeprefix("file:")
    if folder != dest:
        if not folder:
            raise UserError("--to file: names no folder: write file:FOLDER")
        if repo_id is None or not REPO_ID.fullmatch(repo_id):
            raise UserError(f"{repo_id!r} is no repository id: it must look like org/name")
        return HubFolder(Path(folder), repo_id)
    if not REPO_ID.fullmatch(dest):
        raise UserError(f"cannot publish to {dest!r}: write org/name for the Hub, or file:FOLDER for a local folder")
    return HubRepo(dest)


def _published(
    hub: Hub,
    refs: dict[str, str],
    replaceable: Collection[int] = (),
    log: Callable[[str], None] = lambda line: None,
) -> dict[int, Published]:
    """Every step on the hub, by its own manifest and record; without damaged ones that are ``replaceable``."""
    found = {}
    for name, commit in refs.items():
        match = _STEP.fullmatch(name)
        if match:
            step = int(match.group(1))
            try:
                manifest = Manifest.parse(hub.read(commit, MANIFEST), f"{MANIFEST} of {name} at {hub.where}")
                record = json.loads(hub.read(commit, "analysis.json"))
            except DamagedRevision as error:
                if step not in replaceable:
                    raise
                log(f"publish: {name} is stored again: {str(error).partition(';')[0]}")
                continue
            found[step] = Published(step, commit, manifest.digests, record)
    return found


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
    head = hub.refs().get("main")
    return head if head and hub.holds(head, tree) else hub.put("main", tree)


def _extend_main(hub: Hub, steps: dict[int, Published]) -> str:
    """``main`` where the latest step is not among the folders at hand: its files are read from the hub."""
    latest = steps[max(steps)]
    with scratch_folder() as scratch:
        for name in [*latest.digests, MANIFEST]:
            flat = safe_name(name, f"step-{latest.step} at {hub.where}: file name")
            (scratch / flat).write_bytes(hub.read(latest.commit, flat))
        tree = main_tree(check_release(scratch), list(steps.values()))
        head = hub.refs().get("main")
        return head if head and hub.holds(head, tree) else hub.put("main", tree)
