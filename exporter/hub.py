"""Push an export to the Hugging Face Hub: checks first, then one commit, then every file compared. Nothing else here uploads.

The base's shards are copied on the server; what was sent before an interruption is not sent again. The token is never part of a
message: whatever the Hub or its client says is scrubbed first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from httpx2 import HTTPError, Timeout, TransportError  # what huggingface_hub speaks HTTP with
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_session,
    get_token,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

from exporter.bake import REPORT, sha256
from exporter.card_metadata import inherit
from exporter.errors import InputError, ShiftDCError, VerificationError
from exporter.exported import read_report
from exporter.manifest import CARD, recorded, shipped
from exporter.source import BaseCheckpoint
from exporter.verdict import judge_effect
from exporter.verify import verify

#: Seconds before a commit that was cut off, or refused for now, is tried again. The client itself repeats uploads only.
WAITS = (1.0, 4.0)
#: Seconds of silence after which the Hub counts as gone; the client alone would wait for ever.
SILENCE = 300.0

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
# KeyError: an answer that lacks something
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError, KeyError, EntryNotFoundError, FileDuplicationError)

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{6,}")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")
_NO_DERIVATIVES = re.compile(r"(?i)(^|[^a-z])nd([^a-z]|$)|no-?deriv")
_QUOTA = re.compile(r"(?i)quota|storage|limit|exceed|payment|billing")
_SNIPPET = re.compile(r'(\.from_pretrained\()"(?:[^"\\\n]|\\.)*"(, trust_remote_code=True\))')
# what transformers would read: left over from an earlier export, it would change the new one
_LOADED = (".safetensors", ".json", ".jinja", ".py", ".model", ".onnx", ".onnx_data")


class PushError(ShiftDCError):
    """The Hub did not take the checkpoint, for a reason that is not the caller's."""


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


@dataclass(frozen=True)
class Source:
    """A file on the Hub that holds the same bytes."""

    repo_id: str
    revision: str
    path: str


@dataclass(frozen=True)
class LocalFile:
    """A file to push; `source` is where the server can copy it from."""

    path: str
    file: Path
    known_sha256: str | None = None
    source: Source | None = None

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self.known_sha256 or sha256(self.file)

    @cached_property
    def git_sha1(self) -> str:
        """The id under which git keeps it, all that the Hub tells of a small text file."""
        data = self.file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def difference(self, there: RepoFile | None) -> str | None:
        """How the file on the Hub differs; None where it is the same."""
        if there is None:
            return f"{self.path} is missing"
        if there.size != self.bytes:
            return f"{self.path} has {there.size} bytes instead of {self.bytes}"
        same = there.lfs.sha256 == self.sha256 if there.lfs is not None else there.blob_id == self.git_sha1
        return None if same else f"{self.path} has another content"


# Before


def preflight(repo_id: str | None, *, private: bool, revision: str | None, create_pr: bool) -> str:
    """Check token, name, rights and what is there, and create nothing; returns owner/name. Raises InputError, PushError."""
    if not repo_id:
        raise InputError("--repo-id: a push needs the name of a repository; give owner/name, or a name under your own account.")
    _check_name(repo_id)
    _check_revision(revision, create_pr)
    if not get_token():
        raise InputError("--push: there is no Hugging Face token; log in with 'hf auth login', or set HF_TOKEN.")
    with _patience():
        account = _ask("your token", lambda: HfApi().whoami(cache=True))
        full = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        _check_name(full)
        found = _existing(full)
        if found is None:
            _check_may_create(account, full)
        else:
            _check_existing(full, public=found.private is False, private=private, revision=revision, create_pr=create_pr)
    return full


def check_base(folder: Path, base_id: str, revision: str | None) -> None:
    """Check that the base's licence lets a derivative be shared, and that a base on the Hub is open to us. Raises InputError.

    `folder` holds the base's card, or that of the export. `revision` is None for what is not on the Hub.
    """
    inherited = inherit(BaseCheckpoint(base_id, revision, folder, {}, ()))
    licences = [*inherited.license, inherited.license_name]
    if revision is not None:
        with _patience():
            licences += _licences_on_hub(base_id)
    forbidding = next((x for x in licences if x and _NO_DERIVATIVES.search(x)), None)
    if forbidding:
        raise InputError(
            f"--push: the licence of {base_id}, {forbidding}, forbids sharing derivatives, and a calibrated checkpoint is one; "
            "keep the export to yourself, or start from another base model."
        )


def plan_push(checkpoint: Path, repo_id: str, *, private: bool, create_pr: bool, revision: str | None) -> PushPlan:
    """What `push` would send and copy. Writes nothing, here or on the Hub. Raises InputError, PushError."""
    report = read_report(checkpoint)
    with _patience():
        files = local_files(checkpoint, report)
    planned = (PlannedFile(f.path, f.bytes, "copied" if f.source else "sent") for f in files)
    return PushPlan(repo_id, private, create_pr, revision, tuple(planned))


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(
            f"--repo-id: {_clean(repo_id)!r} is no name of a repository; give owner/name of letters, digits, '-', '_' and '.'."
        ) from None


def _check_revision(revision: str | None, create_pr: bool) -> None:
    if revision and create_pr:
        raise InputError("--create-pr: a pull request is opened against the default branch; leave --revision out.")
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError("--revision: a push makes a new commit, so give a branch, not a commit.")


def _existing(repo_id: str) -> ModelInfo | None:
    """What the Hub says of a repository; None where there is none that we can see."""

    def look() -> ModelInfo | None:
        try:
            return HfApi().model_info(repo_id)
        except RepositoryNotFoundError:
            return None

    return _ask(repo_id, look)


def _check_may_create(account: dict[str, Any], repo_id: str) -> None:
    owner = repo_id.split("/")[0]
    organisations = {o["name"]: o.get("roleInOrg") for o in account.get("orgs", [])}
    if owner != account["name"] and organisations.get(owner, "read") == "read":
        raise InputError(
            f"--repo-id: {repo_id} does not exist, and {account['name']} may not create repositories of {owner}; "
            "give a name under your own account or an organisation in which you may write."
        )
    token = account.get("auth", {}).get("accessToken", {})
    scoped = token.get("fineGrained", {}).get("scoped", [])
    rights = {p for s in scoped if s.get("entity", {}).get("name") == owner for p in s.get("permissions", [])}
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and "repo.write" not in rights):
        raise InputError(f"--push: the token may only read, so it cannot create {repo_id}; log in with one that may write.")


def _check_existing(repo_id: str, *, public: bool, private: bool, revision: str | None, create_pr: bool) -> None:
    if not create_pr:  # everyone who may read may propose

        def refused(error: Exception) -> ShiftDCError | None:
            if _status(error) not in (401, 403, 404):
                return None
            return InputError(f"--push: the token may not write to {repo_id} ({_reason(error)}); log in with one that may.")

        _ask(repo_id, lambda: HfApi().auth_check(repo_id, write=True), refused)
    if private and public:
        raise InputError(
            f"--private: {repo_id} exists and is public; make it private on its settings page, or give another --repo-id."
        )
    there = _tree(repo_id, revision) or {}
    if there.keys() - {".gitattributes"} and REPORT not in there:
        raise InputError(
            f"--repo-id: {repo_id} exists and holds no export of this tool (no {REPORT}); give another --repo-id, "
            "so that nothing of it is replaced."
        )


def _licences_on_hub(base_id: str) -> list[str | None]:
    def refused(error: Exception) -> ShiftDCError | None:
        if isinstance(error, GatedRepoError):
            return InputError(
                f"--push: the base model {base_id} is gated and your token may not read it; accept its terms on its page first."
            )
        if isinstance(error, RepositoryNotFoundError):
            return InputError(
                f"--push: the base model {base_id} is not on the Hub, or not for your token, so its terms cannot be checked; "
                "log in with a token that may read it."
            )
        return None

    info = _ask(base_id, lambda: HfApi().model_info(base_id), refused)
    _ask(base_id, lambda: HfApi().auth_check(base_id), refused)
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}
    named = card.get("license")
    return [*(named if isinstance(named, list) else [named]), card.get("license_name")]


def _check_effect(report: dict[str, Any], allow_ineffective: bool) -> None:
    if allow_ineffective:
        return
    results = report.get("evaluation")
    if not results:
        raise InputError(
            "--push: the effect of this calibration was not measured; run 'shiftdc-export evaluate' first, "
            "or give --allow-ineffective to publish it with a warning in its card."
        )
    effect = judge_effect(results)
    if not effect.publishable:
        why = " ".join((() if effect.effective else (effect.sentence,)) + effect.harms)
        raise InputError(
            f"--push: this calibration should not be published as it is: {why} "
            "Give --allow-ineffective to publish it with a warning in its card."
        )


# What to push


def local_files(checkpoint: Path, report: dict[str, Any], rewritten: Mapping[str, Path] | None = None) -> list[LocalFile]:
    """What the export ships; `rewritten` says which paths are sent from elsewhere."""
    shards = report["base_model"]["shards"]
    sources = _sources(report)
    files = []
    for name in shipped(checkpoint):
        if (checkpoint / name).is_symlink():
            raise InputError(
                f"CHECKPOINT: {checkpoint / name} is a symbolic link, and a push sends only what the export itself holds; "
                "put the file in its place."
            )
        known = shards.get(name)
        files.append(LocalFile(name, (rewritten or {}).get(name, checkpoint / name), known, sources.get(known)))
    return files


def _sources(report: dict[str, Any]) -> dict[str | None, Source]:
    """Files of the base's repository by SHA-256."""
    base_id, revision = report["base_model"]["id"], report["base_model"]["revision"]
    there = _tree(base_id, revision) if revision is not None else None
    return {f.lfs.sha256: Source(base_id, revision, f.path) for f in (there or {}).values() if f.lfs is not None}


def _tree(repo_id: str, revision: str | None) -> dict[str, RepoFile] | None:
    """The files of a repository by path; None where it has no such revision."""

    def look() -> dict[str, RepoFile] | None:
        try:
            listed = list(HfApi().list_repo_tree(repo_id, recursive=True, revision=revision))
        except RevisionNotFoundError:
            return None
        return {f.path: f for f in listed if isinstance(f, RepoFile)}

    return _ask(repo_id, look)


def rewrite(checkpoint: Path, report: dict[str, Any], repo_id: str, folder: Path) -> dict[str, Path]:
    """Copies of the card, which loads the checkpoint from the Hub, and of the report, which knows that card's hash.

    What its owner wrote into the card stays. Returns where the copies are, by path.
    """
    text = (checkpoint / CARD).read_text("utf-8")
    (folder / CARD).write_text(_SNIPPET.sub(rf'\g<1>"{repo_id}"\g<2>', text), "utf-8")
    (folder / REPORT).write_text(json.dumps(recorded(report, folder, [CARD]), indent=2) + "\n", "utf-8")
    return {name: folder / name for name in (CARD, REPORT)}


# The push


def push(
    checkpoint: Path,
    repo_id: str,
    *,
    private: bool,
    create_pr: bool = False,
    revision: str | None = None,
    allow_ineffective: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Pushed:
    """Check, upload in one commit, compare. Raises InputError, PushError, VerificationError; leaves `checkpoint` as it is."""
    report = read_report(checkpoint)
    target = Target(preflight(repo_id, private=private, revision=revision, create_pr=create_pr), private, create_pr, revision)
    _check_effect(report, allow_ineffective)
    check_base(checkpoint, report["base_model"]["id"], report["base_model"]["revision"])
    _staged(progress, "verify", lambda: verify(checkpoint))
    with tempfile.TemporaryDirectory(prefix="shiftdc-push-") as folder, _patience():
        files = local_files(checkpoint, report, rewrite(checkpoint, report, target.repo_id, Path(folder)))
        _ask(target.repo_id, lambda: _prepare(target))
        pushed = _ask(target.repo_id, lambda: _upload(target, files, progress))
        _staged(progress, "compare", lambda: _compare(target.repo_id, pushed.commit, files))
    return pushed


def _staged(progress: Progress, name: str, run: Callable[[], object]) -> None:
    progress(name, 0, 1)
    run()
    progress(name, 1, 1)


def _prepare(target: Target) -> None:
    api = HfApi()
    api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
    if target.revision and not target.revision.startswith("refs/"):
        api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)


def _upload(target: Target, files: Sequence[LocalFile], progress: Progress) -> Pushed:
    """Copy what the server can copy; where it will not, send everything."""
    try:
        return _commit_patiently(target, files, progress)
    except HUB_ERRORS as error:
        if not _cannot_copy(error):
            raise
        note = f"The server did not copy the base's shards ({_reason(error)}), so they were sent."
    return replace(_commit_patiently(target, [replace(f, source=None) for f in files], progress), note=note)


def _commit_patiently(target: Target, files: Sequence[LocalFile], progress: Progress) -> Pushed:
    for wait in WAITS:
        try:
            return _commit(target, files, progress)
        except HUB_ERRORS as error:
            if target.create_pr or not _passing(error):  # a second try could open a second pull request
                raise
        time.sleep(wait)
    return _commit(target, files, progress)


def _commit(target: Target, files: Sequence[LocalFile], progress: Progress) -> Pushed:
    """One commit of what differs. Its operations are made anew for each try: the client marks those that it has used."""
    api = HfApi()
    head = api.model_info(target.repo_id, revision=target.revision).sha
    there = _tree(target.repo_id, head) or {}
    todo = [f for f in files if f.difference(there.get(f.path))]
    stale = sorted(p for p in there.keys() - {f.path for f in files} if p.endswith(_LOADED))
    url = f"{api.endpoint}/{target.repo_id}"
    if head and not todo and not stale:
        return Pushed(url, head, (), (), 0, "The Hub had every file already.")
    sent = [f for f in todo if f.source is None]
    additions = [CommitOperationAdd(f.path, f.file) for f in sent]
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
    options: dict[str, Any] = {"revision": target.revision, "create_pr": target.create_pr, "free_memory": False}
    progress("upload", 0, len(additions))
    for i, addition in enumerate(additions, 1):
        HfApi().preupload_lfs_files(target.repo_id, [addition], **options)
        progress("upload", i, len(additions))


def _compare(repo_id: str, commit: str, files: Sequence[LocalFile]) -> None:
    """Raise VerificationError unless the Hub holds every file, bit for bit, at `commit`."""
    there = _tree(repo_id, commit) or {}
    wrong = [d for f in files if (d := f.difference(there.get(f.path)))]
    if wrong:
        raise VerificationError(f"{repo_id} at {commit} is not what was pushed: {'; '.join(wrong)}; push again.")


# What the Hub answers


@contextmanager
def _patience() -> Iterator[None]:
    """Give up on a silent server, and keep the client from printing: its warnings may quote what the server says."""
    session, verbosity, bars = get_session(), hub_logging.get_verbosity(), not are_progress_bars_disabled()
    before, session.timeout = session.timeout, Timeout(SILENCE)
    hub_logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        session.timeout = before
        hub_logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _ask(what: str, call: Callable[[], T], translate: Callable[[Exception], ShiftDCError | None] = lambda error: None) -> T:
    """Call the Hub; its errors become ours."""
    try:
        return call()
    except HUB_ERRORS as error:
        failure = translate(error) or _failure(error, what)
    raise failure  # outside of the handler, so that it does not carry the original with its headers


def _failure(error: Exception, what: str) -> ShiftDCError:
    reason, status = _reason(error), _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("--push: HF_HUB_OFFLINE is set; unset it to push.")
    if status == 401:
        return InputError(f"--push: the Hub does not accept the token for {what} ({reason}); log in again with 'hf auth login'.")
    if status in (402, 413, 507) or (status == 403 and _QUOTA.search(reason)):
        return PushError(f"--push: the Hub has no room for {what} ({reason}); free storage or change the plan, then push again.")
    if status == 403:
        return InputError(f"--push: the token may not do this with {what} ({reason}); log in with one that may.")
    if status in (409, 412):
        return PushError(f"--push: {what} was changed by someone else meanwhile ({reason}); look at it, then push again.")
    return PushError(f"--push: {what} could not be reached or served ({reason}); push again, what has arrived is not sent twice.")


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error; the client wraps those of uploads."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    return _status(error.__cause__) if error.__cause__ is not None else None


def _passing(error: Exception) -> bool:
    """Cut off, or refused for now. Errors of uploads are wrapped, and the client has repeated those already."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    return isinstance(error, TransportError) or status in (429, 500, 502, 503, 504)


def _cannot_copy(error: Exception) -> bool:
    """The server, or the client, refuses to copy; being out of quota, time or rights is something else."""
    if isinstance(error, GatedRepoError):
        return True
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        refused = (
            error.response.request.url.path.endswith("/lfs-files/duplicate")
            and status < 500
            and status not in (401, 402, 413, 429)
        )
        return refused and not (status == 403 and _QUOTA.search(_reason(error)))
    if isinstance(error, FileDuplicationError):
        return not _QUOTA.search(str(error))
    return isinstance(error, EntryNotFoundError) or (isinstance(error, ValueError) and "duplicate LFS file" in str(error))


def _reason(error: BaseException) -> str:
    """What went wrong, on one line, without the token."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or type(error).__name__
        return _clean(f"{error.response.status_code}: {said}")
    cause = error.__cause__
    return _reason(cause) if cause is not None else _clean(f"{type(error).__name__}: {error}")


def _clean(text: str) -> str:
    """One printable line of at most 300 characters in which no token stands."""
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return _UNPRINTABLE.sub(" ", _TOKEN.sub("<token>", text)).strip()[:300]
