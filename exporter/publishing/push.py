"""Push an export to the Hugging Face Hub: checks first, then one commit, then every file compared. Nothing else here uploads.

The base's shards are copied on the server; what was sent before an interruption is not sent again. The token is never part of a
message: whatever the Hub or its client says is scrubbed first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

from exporter.checkpoint.report import read_report
from exporter.checkpoint.verify import verify
from exporter.errors import VerificationError
from exporter.publishing.hub_errors import HUB_ERRORS, ask, cannot_copy, client_timeouts, deadline, is_transient, reason_of
from exporter.publishing.push_files import LocalFile, local_files, rewrite, tree
from exporter.publishing.push_preflight import check_base, check_effect, preflight
from exporter.runtime.clock import Clock
from exporter.runtime.progress import Progress, silent

#: Seconds before a commit that was cut off, or refused for now, is tried again. The client itself repeats uploads only.
WAITS = (1.0, 4.0)

# what transformers would read: left over from an earlier export, it would change the new one
_LOADED = (".safetensors", ".json", ".jinja", ".py", ".model", ".onnx", ".onnx_data")


@dataclass(frozen=True)
class PlannedFile:
    """A file of a push: its path in the repository, its size, and whether it is "copied" on the server or "sent"."""

    path: str
    bytes: int
    how: str


@dataclass(frozen=True)
class PushPlan:
    """What a push would do."""

    repo_id: str
    private: bool
    create_pr: bool
    revision: str | None
    files: tuple[PlannedFile, ...]


@dataclass(frozen=True)
class Pushed:
    """What a push did. `copied` and `sent` are paths, less those that the Hub had already; `note` is there for the user."""

    url: str
    commit: str
    copied: tuple[str, ...]
    sent: tuple[str, ...]
    sent_bytes: int
    note: str | None = None


@dataclass(frozen=True)
class Target:
    """Where to push."""

    repo_id: str
    private: bool
    create_pr: bool
    revision: str | None


def plan_push(checkpoint: Path, repo_id: str, *, private: bool, create_pr: bool, revision: str | None) -> PushPlan:
    """What `push` would send and copy. Writes nothing, here or on the Hub. Raises InputError, PushError."""
    report = read_report(checkpoint)
    with client_timeouts():
        files = local_files(checkpoint, report)
    planned = (PlannedFile(f.path, f.bytes, "copied" if f.source else "sent") for f in files)
    return PushPlan(repo_id, private, create_pr, revision, tuple(planned))


def push(
    checkpoint: Path,
    repo_id: str,
    *,
    private: bool,
    create_pr: bool = False,
    revision: str | None = None,
    allow_ineffective: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Check, upload in one commit, compare. Raises InputError, PushError, VerificationError; leaves `checkpoint` as it is."""
    report = read_report(checkpoint)
    target = Target(preflight(repo_id, private=private, revision=revision, create_pr=create_pr), private, create_pr, revision)
    check_effect(report, allow_ineffective)
    check_base(checkpoint, report.base_model.id, report.base_model.revision)
    clock = Clock(progress)
    with clock.stage("verify"):
        verify(checkpoint)
    with client_timeouts():
        files = local_files(checkpoint, report, rewrite(checkpoint, report, target.repo_id))
        ask(target.repo_id, partial(_prepare, target))
        pushed = ask(target.repo_id, partial(_upload, target, files, progress))
        with clock.stage("compare"):
            _compare(target.repo_id, pushed.commit, files)
    return pushed


def _prepare(target: Target) -> None:
    api = HfApi()
    api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
    if target.revision and not target.revision.startswith("refs/"):
        api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)


def _upload(target: Target, files: Sequence[LocalFile], progress: Progress) -> Pushed:
    """Copy what the server can copy; where it will not, send everything."""
    try:
        return _commit_with_retries(target, files, progress)
    except HUB_ERRORS as error:
        if not cannot_copy(error):
            raise
        note = f"The server did not copy the base's shards ({reason_of(error)}), so they were sent."
    return replace(_commit_with_retries(target, [replace(f, source=None) for f in files], progress), note=note)


def _commit_with_retries(target: Target, files: Sequence[LocalFile], progress: Progress) -> Pushed:
    for wait in WAITS:
        try:
            return _commit(target, files, progress)
        except HUB_ERRORS as error:
            if target.create_pr or not is_transient(error):  # a second try could open a second pull request
                raise
        time.sleep(wait)
    return _commit(target, files, progress)


def _commit(target: Target, files: Sequence[LocalFile], progress: Progress) -> Pushed:
    """One commit of what differs. Its operations are made anew for each try: the client marks those that it has used."""
    api = HfApi()
    head = api.model_info(target.repo_id, revision=target.revision).sha
    there = tree(target.repo_id, head) or {}
    todo = [f for f in files if f.difference(there.get(f.path))]
    stale = sorted(p for p in there.keys() - {f.path for f in files} if p.endswith(_LOADED))
    url = f"{api.endpoint}/{target.repo_id}"
    if head and not todo and not stale:
        return Pushed(url, head, (), (), 0, "The Hub had every file already.")
    sent = [f for f in todo if f.source is None]
    additions = [CommitOperationAdd(f.path, f.content) for f in sent]
    _send(target, additions, progress)
    copies = [
        CommitOperationCopy(
            f.source.path, f.path, src_repo_id=f.source.repo_id, src_repo_type="model", src_revision=f.source.revision
        )
        for f in todo
        if f.source is not None
    ]
    done = api.create_commit(
        target.repo_id,
        [*additions, *copies, *(CommitOperationDelete(p) for p in stale)],
        commit_message="Push a checkpoint calibrated with ShiftDC",
        revision=target.revision,
        create_pr=target.create_pr,
        parent_commit=head,
    )
    copied = tuple(c.path_in_repo for c in copies)
    return Pushed(done.pr_url or url, done.oid, copied, tuple(f.path for f in sent), sum(f.bytes for f in sent))


def _send(target: Target, additions: Sequence[CommitOperationAdd], progress: Progress) -> None:
    """Send large files one by one: each that has arrived need not be sent again after an interruption."""
    progress("upload", 0, len(additions))
    for i, addition in enumerate(additions, 1):
        with deadline(addition.upload_info.size):
            HfApi().preupload_lfs_files(
                target.repo_id, [addition], revision=target.revision, create_pr=target.create_pr, free_memory=False
            )
        progress("upload", i, len(additions))


def _compare(repo_id: str, commit: str, files: Sequence[LocalFile]) -> None:
    """Raise VerificationError unless the Hub holds every file, bit for bit, at `commit`."""
    there = tree(repo_id, commit) or {}
    wrong = [d for f in files if (d := f.difference(there.get(f.path)))]
    if wrong:
        raise VerificationError(f"{repo_id} at {commit} is not what was pushed: {'; '.join(wrong)}; push again.")
