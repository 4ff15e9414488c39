"""Files of a model on the Hub, and what may go wrong while they are fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import InputError


def download(model: str, revision: str | None, patterns: Sequence[str], option: str) -> tuple[Path, str]:
    """The files of a Hub model that match `patterns`, and their commit. Raises InputError, which names `option`."""
    from huggingface_hub import snapshot_download

    with hub_requests(model, revision, option):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    return folder, folder.name  # a snapshot folder is named after its commit


def listed_files(model: str, revision: str) -> dict[str, int]:
    """The files at the top of a Hub model with their bytes; of none where only the local cache may be used."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    with hub_requests(model, revision, "MODEL"):
        try:
            return {f.path: f.size for f in HfApi().list_repo_tree(model, revision=revision) if isinstance(f, RepoFile)}
        except OfflineModeIsEnabled:
            return {}


@contextmanager
def hub_requests(model: str, revision: str | None, option: str) -> Iterator[None]:
    """Around requests to the Hub: what may go wrong becomes one sentence."""
    from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise InputError(f"{option}: {model} is gated; accept its terms on its page and log in with 'hf auth login'.") from None
    except RevisionNotFoundError:
        raise InputError(f"{option}: {model} has no revision {revision!r}; give an existing branch, tag or commit.") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{option}: {model} is neither an existing folder nor a model on the Hub that you can see; "
            "check the spelling, or log in with 'hf auth login' if it is private."
        ) from None
    except HFValidationError:
        raise InputError(f"{option}: {model!r} is neither an existing folder nor a Hub id of the form owner/name.") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise InputError(
            f"{option}: {model} is not in the local cache and the Hub cannot be reached; check the connection."
        ) from None
    except OSError as error:
        raise InputError(
            f"{option}: {model} cannot be stored in the local cache ({error.strerror or error}); see to it."
        ) from None
    except (
        HTTPError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:  # replies that are not in the form of the Hub
        raise InputError(f"{option}: {model} cannot be fetched from the Hub ({type(error).__name__}); try again.") from None
