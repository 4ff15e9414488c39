"""What is checked before a push: token, name, rights, what is there, the base's terms, the effect. Nothing is created or sent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, get_token
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from exporter.checkpoint.layout import REPORT
from exporter.checkpoint.report import Report
from exporter.errors import InputError, ShiftDCError
from exporter.evaluation.results_json import read_results
from exporter.evaluation.verdict import judge_effect
from exporter.models.base import BaseCheckpoint
from exporter.publishing.card_metadata import inherit
from exporter.publishing.hub_errors import ask, clean, client_timeouts, reason_of, status_of
from exporter.publishing.push_files import tree

_NO_DERIVATIVES = re.compile(r"(?i)(^|[^a-z])nd([^a-z]|$)|no-?deriv")


def preflight(repo_id: str | None, *, private: bool, revision: str | None, create_pr: bool) -> str:
    """Check token, name, rights and what is there, and create nothing; returns owner/name. Raises InputError, PushError."""
    if not repo_id:
        raise InputError("--repo-id: a push needs the name of a repository; give owner/name, or a name under your own account.")
    _check_name(repo_id)
    _check_revision(revision, create_pr)
    if not get_token():
        raise InputError("--push: there is no Hugging Face token; log in with 'hf auth login', or set HF_TOKEN.")
    with client_timeouts():
        account = ask("your token", lambda: HfApi().whoami(cache=True))
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
        with client_timeouts():
            licences += _licences_on_hub(base_id)
    forbidding = next((x for x in licences if x and _NO_DERIVATIVES.search(x)), None)
    if forbidding:
        raise InputError(
            f"--push: the licence of {base_id}, {forbidding}, forbids sharing derivatives, and a calibrated checkpoint is one; "
            "keep the export to yourself, or start from another base model."
        )


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(
            f"--repo-id: {clean(repo_id)!r} is no name of a repository; give owner/name of letters, digits, '-', '_' and '.'."
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

    return ask(repo_id, look)


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
            if status_of(error) not in (401, 403, 404):
                return None
            return InputError(f"--push: the token may not write to {repo_id} ({reason_of(error)}); log in with one that may.")

        ask(repo_id, lambda: HfApi().auth_check(repo_id, write=True), refused)
    if private and public:
        raise InputError(
            f"--private: {repo_id} exists and is public; make it private on its settings page, or give another --repo-id."
        )
    there = tree(repo_id, revision) or {}
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

    info = ask(base_id, lambda: HfApi().model_info(base_id), refused)
    ask(base_id, lambda: HfApi().auth_check(base_id), refused)
    card: dict[str, object] = info.card_data.to_dict() if info.card_data else {}
    named = card.get("license")
    return [*(named if isinstance(named, list) else [named]), card.get("license_name")]


def check_effect(report: Report, allow_ineffective: bool) -> None:
    """Raise InputError unless the report shows an effect that may be published, or that is waived."""
    if allow_ineffective:
        return
    results = report.evaluation
    if not results:
        raise InputError(
            "--push: the effect of this calibration was not measured; run 'shiftdc-export evaluate' first, "
            "or give --allow-ineffective to publish it with a warning in its card."
        )
    effect = judge_effect(read_results(results))
    if not effect.publishable:
        why = " ".join((() if effect.effective else (effect.sentence,)) + effect.harms)
        raise InputError(
            f"--push: this calibration should not be published as it is: {why} "
            "Give --allow-ineffective to publish it with a warning in its card."
        )
