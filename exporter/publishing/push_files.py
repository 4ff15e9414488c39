"""What a push consists of: the files of an export, and where the server can copy each from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from exporter.checkpoint.layout import CARD, REPORT
from exporter.checkpoint.manifest import shipped, with_hashes
from exporter.checkpoint.report import Report
from exporter.errors import InputError
from exporter.publishing.hub_errors import ask
from exporter.runtime.hashing import sha256

_SNIPPET = re.compile(r'(\.from_pretrained\()"(?:[^"\\\n]|\\.)*"(, trust_remote_code=True\))')


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub that holds the same bytes."""

    repo_id: str
    revision: str
    path: str


@dataclass(frozen=True)
class LocalFile:
    """A file to push, on disk or in memory; `source` is where the server can copy it from."""

    path: str
    content: Path | bytes
    known_sha256: str | None = None
    source: HubFile | None = None

    @property
    def bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        return self.known_sha256 or sha256(self.content)

    @cached_property
    def git_sha1(self) -> str:
        """The id under which git keeps it, all that the Hub tells of a small text file."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def difference(self, there: RepoFile | None) -> str | None:
        """How the file on the Hub differs; None where it is the same."""
        if there is None:
            return f"{self.path} is missing"
        if there.size != self.bytes:
            return f"{self.path} has {there.size} bytes instead of {self.bytes}"
        same = there.lfs.sha256 == self.sha256 if there.lfs is not None else there.blob_id == self.git_sha1
        return None if same else f"{self.path} has another content"


def local_files(checkpoint: Path, report: Report, rewritten: Mapping[str, bytes] | None = None) -> list[LocalFile]:
    """What the export ships; `rewritten` has the content of those paths that are sent otherwise than they lie there."""
    shards = report.base_model.shards
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


def _sources(report: Report) -> dict[str | None, HubFile]:
    """Files of the base's repository by SHA-256."""
    base_id, revision = report.base_model.id, report.base_model.revision
    if revision is None:  # not from the Hub
        return {}
    there = tree(base_id, revision) or {}
    return {f.lfs.sha256: HubFile(base_id, revision, f.path) for f in there.values() if f.lfs is not None}


def tree(repo_id: str, revision: str | None) -> dict[str, RepoFile] | None:
    """The files of a repository by path; None where it has no such revision."""

    def look() -> dict[str, RepoFile] | None:
        try:
            listed = list(HfApi().list_repo_tree(repo_id, recursive=True, revision=revision))
        except RevisionNotFoundError:
            return None
        return {f.path: f for f in listed if isinstance(f, RepoFile)}

    return ask(repo_id, look)


def rewrite(checkpoint: Path, report: Report, repo_id: str) -> dict[str, bytes]:
    """The card, which loads the checkpoint from the Hub, and the report, which knows that card's hash, by path.

    What its owner wrote into the card stays.
    """
    text = (checkpoint / CARD).read_text("utf-8")
    card = _SNIPPET.sub(rf'\g<1>"{repo_id}"\g<2>', text).encode()
    described = with_hashes(report, {CARD: hashlib.sha256(card).hexdigest()})
    return {CARD: card, REPORT: described.text().encode()}
