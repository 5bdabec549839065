"""The Hugging Face Hub as a place to publish to.

A step goes to a staging branch first; its checksums are compared there, and only then does ``step-N`` come into being
at that very commit, with a tag beside it. Every call can be repeated: a run that stopped anywhere is finished by the
next.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cognica_poe.errors import UserError
from cognica_poe.leftovers import scratch_folder
from cognica_poe.release.publish.tree import Tree, source_git_sha1, source_sha256

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_KEPT = {".gitattributes"}  # the Hub's own


class HubRepo:
    """One model repository on the Hub (``HF_ENDPOINT``, if set, names another one). The token comes from ``HF_TOKEN``
    and goes nowhere but into the requests."""

    def __init__(self, repo_id: str) -> None:
        from huggingface_hub import HfApi

        token = os.environ.get("HF_TOKEN")
        if not token:
            raise UserError(f"no Hugging Face token: set HF_TOKEN to one that may write to {repo_id}")
        self.repo_id = repo_id
        self.where = repo_id
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Create the repository unless it exists. Others may write there too: its commits name their parents."""
        with self._errors("create"):
            self._api.create_repo(self.repo_id, exist_ok=True)
        yield

    def refs(self) -> dict[str, str]:
        """``{branch: commit}``."""
        with self._errors("list the revisions of"):
            return {ref.name: ref.target_commit for ref in self._api.list_repo_refs(self.repo_id).branches}

    def read(self, commit: str, name: str) -> bytes:
        """One (small) file of a revision."""
        with self._errors(f"read {name} at {commit[:12]} of"), scratch_folder() as folder:
            path = self._api.hf_hub_download(self.repo_id, name, revision=commit, local_dir=folder)
            with open(path, "rb") as file:
                return file.read()

    def holds(self, commit: str, tree: Tree) -> bool:
        """Whether the revision is ``tree``, by the Hub's own checksums."""
        return self._difference(commit, tree) == ([], [])

    def put(self, ref: str, tree: Tree) -> str:
        """Upload ``tree``, compare checksums, then make branch ``ref`` (and its tag). Returns the commit."""
        refs = self.refs()
        if ref == "main":
            return self._commit("main", refs.get("main"), tree)
        staging = f"staging-{ref}"
        if staging not in refs:
            with self._errors(f"make the branch {staging} in"):
                self._api.create_branch(self.repo_id, branch=staging, exist_ok=True)
            refs = self.refs()
        commit = self._commit(staging, refs[staging], tree)
        if refs.get(ref, commit) != commit:  # replacing: a branch cannot be moved, only made anew
            with self._errors(f"replace {ref} in"):
                self._api.delete_branch(self.repo_id, branch=ref)
        with self._errors(f"make the branch {ref} in"):
            self._api.create_branch(self.repo_id, branch=ref, revision=commit, exist_ok=True)
        self.finish(ref, commit)
        return commit

    def finish(self, ref: str, commit: str) -> None:
        """Tag the commit and drop the staging branch, whichever of the two is still to be done."""
        tag, staging = f"release-{ref}", f"staging-{ref}"
        with self._errors(f"tag {ref} in"):
            found = self._api.list_repo_refs(self.repo_id)
            tags = {item.name: item.target_commit for item in found.tags}
            if tags.get(tag, commit) != commit:
                self._api.delete_tag(self.repo_id, tag=tag)
            if tags.get(tag) != commit:
                self._api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
            if staging in {item.name for item in found.branches}:
                self._api.delete_branch(self.repo_id, branch=staging)

    def _commit(self, branch: str, head: str | None, tree: Tree) -> str:
        """One commit that makes ``branch`` hold exactly ``tree``; none where it does. Checked at the new commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        changed, extra = self._difference(head, tree) if head else (sorted(tree), [])
        if head and not changed and not extra:
            return head
        operations: list[Any] = [CommitOperationAdd(name, _payload(tree[name])) for name in changed]
        operations += [CommitOperationDelete(name) for name in extra]
        with self._errors(f"upload to {branch} of"):
            made = self._api.create_commit(
                self.repo_id, operations, commit_message=f"Release {branch}", revision=branch, parent_commit=head
            )
        changed, extra = self._difference(made.oid, tree)
        if changed or extra:
            raise UserError(
                f"{(changed + extra)[0]} arrived at {self.repo_id} ({branch}, {made.oid[:12]}) with another checksum: "
                "publish again"
            )
        return made.oid

    def _difference(self, commit: str, tree: Tree) -> tuple[list[str], list[str]]:
        """Names in ``tree`` that the revision lacks or holds otherwise, and names it should not have."""
        from huggingface_hub import RepoFile

        with self._errors(f"list the files of {commit[:12]} in"):
            entries = list(self._api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        changed = [name for name in sorted(tree) if name not in files or not _same(tree[name], files[name])]
        return changed, sorted(set(files) - set(tree) - _KEPT)

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
