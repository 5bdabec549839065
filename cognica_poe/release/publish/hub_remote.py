"""The Hugging Face Hub as a place to publish to.

A new step goes to a staging branch first; its checksums are compared there, and only then does ``step-N`` come into
being at that very commit, with a tag beside it. A branch that is there gets a commit on top, in which files that we did
not write stay. Every call can be repeated: a run that stopped anywhere is finished by the next.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST
from cognica_poe.leftovers import scratch_folder
from cognica_poe.release.publish.ownership import Change, change_of, require_ours
from cognica_poe.release.publish.tree import Tree, has_mark, source_git_sha1, source_sha256, written_by_us

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_STAGING = "cognica-poe-staging-"
_KEPT = {".gitattributes"}  # the Hub's own


class _Refs(NamedTuple):
    """Commit by name."""

    branches: dict[str, str]
    tags: dict[str, str]


class HubRepo:
    """One model repository on the Hub (``HF_ENDPOINT``, if set, names another one). The token comes from ``HF_TOKEN``
    and goes nowhere but into the requests."""

    def __init__(self, repo_id: str, *, replace: bool = False, log: Callable[[str], None] = lambda line: None) -> None:
        """``replace``: files that we did not write may be replaced; each is named in ``log``."""
        from huggingface_hub import HfApi

        token = os.environ.get("HF_TOKEN")
        if not token:
            raise UserError(f"no Hugging Face token: set HF_TOKEN to one that may write to {repo_id}")
        self.repo_id = repo_id
        self.where = repo_id
        self._replace, self._log = replace, log
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Create the repository unless it exists. Others may write there too: its commits name their parents."""
        with self._errors("create"):
            self._api.create_repo(self.repo_id, exist_ok=True)
        yield

    def refs(self, rewritten: Collection[str] = ()) -> dict[str, str]:
        """``{branch: commit}``."""
        with self._errors("list the revisions of"):
            return {ref.name: ref.target_commit for ref in self._api.list_repo_refs(self.repo_id).branches}

    def read(self, commit: str, name: str) -> bytes:
        """One (small) file of a revision."""
        with self._errors(f"read {name} at {commit[:12]} of"), scratch_folder() as folder:
            path = self._api.hf_hub_download(self.repo_id, name, revision=commit, local_dir=folder)
            with open(path, "rb") as file:
                return file.read()

    def is_ours(self, commit: str) -> bool:
        """Whether the revision carries a manifest of ours, damaged or not."""
        return MANIFEST in self._files(commit) and has_mark(self.read(commit, MANIFEST))

    def check(self, ref: str, tree: Tree) -> None:
        """Raise UserError when ``ref`` holds files that ``tree`` may not replace, or its tag is somebody else's."""
        found = self._refs()
        if head := found.branches.get(ref):
            require_ours(self._change(head, tree), self._replace, f"{ref} of {self.repo_id}")
        if ref != "main":
            if ref in found.tags:
                raise UserError(f"{self.repo_id} has a tag {ref}, which the branch of that name would hide: delete it")
            self._require_own_tag(f"release-{ref}", found.tags.get(f"release-{ref}"))

    def holds(self, commit: str, tree: Tree) -> bool:
        """Whether the revision holds ``tree``, by the Hub's own checksums, and nothing else that we wrote."""
        return not self._change(commit, tree)

    def put(self, ref: str, tree: Tree) -> str:
        """Upload ``tree``, compare checksums, then make branch ``ref`` (and its tag). Returns the commit.

        Raises UserError as ``check``.
        """
        refs, staging = self.refs(), f"{_STAGING}{ref}"
        if ref in refs or ref == "main":
            commit = self._commit(ref, refs.get(ref), tree)
        else:
            if staging not in refs:
                with self._errors(f"make the branch {staging} in"):
                    self._api.create_branch(self.repo_id, branch=staging, exist_ok=True)
                refs = self.refs()
            commit = self._commit(staging, refs[staging], tree, alone=True)
            with self._errors(f"make the branch {ref} in"):
                self._api.create_branch(self.repo_id, branch=ref, revision=commit, exist_ok=True)
        if ref != "main":
            self.finish(ref, commit)
        return commit

    def finish(self, ref: str, commit: str) -> None:
        """Tag the commit and drop the staging branch, whichever of the two is still to be done."""
        tag, staging = f"release-{ref}", f"{_STAGING}{ref}"
        found = self._refs()
        self._require_own_tag(tag, found.tags.get(tag, commit))
        with self._errors(f"tag {ref} in"):
            if found.tags.get(tag, commit) != commit:
                self._api.delete_tag(self.repo_id, tag=tag)
            if found.tags.get(tag) != commit:
                self._api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
            if staging in found.branches:
                self._api.delete_branch(self.repo_id, branch=staging)

    def _refs(self) -> _Refs:
        with self._errors("list the revisions of"):
            found = self._api.list_repo_refs(self.repo_id)
        branches, tags = ({ref.name: ref.target_commit for ref in refs} for refs in (found.branches, found.tags))
        return _Refs(branches, tags)

    def _require_own_tag(self, tag: str, commit: str | None) -> None:
        """Raise UserError unless the tag is free, at a release of ours, or may be replaced."""
        if commit is None or self._replace or self._written(commit, self._files(commit)):
            return
        raise UserError(f"the tag {tag} of {self.repo_id} is not at a release: delete it, or move it with --replace")

    def _commit(self, branch: str, head: str | None, tree: Tree, *, alone: bool = False) -> str:
        """One commit after which ``branch`` holds ``tree``; none where it does. Checked at the new commit.

        What else the branch holds stays; with ``alone``, it is our own new branch and holds nothing else.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        change = self._change(head, tree, alone=alone) if head else Change(sorted(tree), [], [])
        if head and not change:
            return head
        if said := require_ours(change, self._replace, f"{branch} of {self.repo_id}"):
            self._log(said)
        operations: list[Any] = [CommitOperationDelete(name) for name in change.remove]
        operations += [CommitOperationAdd(name, _payload(tree[name])) for name in change.put]
        with self._errors(f"upload to {branch} of"):
            made = self._api.create_commit(
                self.repo_id, operations, commit_message=f"Release {branch}", revision=branch, parent_commit=head
            )
        if wrong := self._change(made.oid, tree, alone=alone):
            raise UserError(
                f"{(wrong.put + wrong.remove)[0]} arrived at {self.repo_id} ({branch}, {made.oid[:12]}) with another "
                "checksum: publish again"
            )
        return made.oid

    def _files(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub import RepoFile

        with self._errors(f"list the files of {commit[:12]} in"):
            entries = list(self._api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _written(self, commit: str, files: Mapping[str, RepoFile]) -> dict[str, str]:
        return written_by_us(self.read(commit, MANIFEST)) if MANIFEST in files else {}

    def _change(self, commit: str, tree: Tree, *, alone: bool = False) -> Change:
        files = self._files(commit)
        if alone:
            held = files.keys() - _KEPT
            return change_of(tree, held, same=lambda name: _same(tree[name], files[name]), ours=lambda name: True)
        written = self._written(commit, files)

        def ours(name: str) -> bool:
            if name not in written:
                return False
            lfs = files[name].lfs
            return written[name] == (lfs.sha256 if lfs else source_sha256(self.read(commit, name)))

        return change_of(tree, files, same=lambda name: _same(tree[name], files[name]), ours=ours)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn the Hub's and the network's refusals into one clear line (without request headers)."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise UserError(f"cannot {doing} {self.repo_id}: {reason}") from error


def _reason(error: BaseException | None) -> str | None:
    """Why the Hub or the network refused, or None for what is no refusal. The client wraps some causes."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    refusals = (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError, ValueError)
    while error is not None and not isinstance(error, refusals):
        error = error.__cause__
    if error is None:
        return None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to publish"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        return _REASONS.get(status, f"the Hub answered {status}; try again")
    if isinstance(error, ValueError):  # what the client itself refuses, such as a card with bad metadata
        return str(error).splitlines()[0]
    return f"no connection to the Hub ({type(error).__name__}); try again"


_REASONS = {
    401: "the token in HF_TOKEN is not valid",
    403: "the token in HF_TOKEN may not write there",
    404: "the repository or revision does not exist, or the token may not see it",
    409: "the name is taken by something else; look at the repository",
    412: "somebody else has committed meanwhile; publish again",
    429: "too many requests; wait and publish again",
}


def _payload(source: Path | bytes) -> str | bytes:
    return source if isinstance(source, bytes) else str(source)


def _same(source: Path | bytes, entry: RepoFile) -> bool:
    """Whether the Hub's checksum of a file is that of ``source``."""
    if entry.lfs is not None:
        return source_sha256(source) == entry.lfs.sha256
    return source_git_sha1(source) == entry.blob_id
