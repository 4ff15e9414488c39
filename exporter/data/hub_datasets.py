"""Datasets of the Hub: read as data only (no loading scripts), at one commit. Their texts never reach an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from exporter.data.pictures import Picture, loaded
from exporter.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PictureOfRow(Picture):
    """A picture in a column of a table; `where` names dataset, part and row."""

    table: Dataset = field(compare=False, repr=False)
    column: str
    index: int
    where: str
    commit: str

    def load(self) -> Image.Image:
        encoded = self.table[self.index][self.column] or {}
        subject = f"--benchmark: {self.where}: the image"
        if encoded.get("bytes") is not None:
            return loaded(BytesIO(encoded["bytes"]), subject)
        if encoded.get("path") is not None:  # where the dataset is a folder of pictures, these are in the local cache
            return loaded(Path(encoded["path"]), subject)
        raise InputError(f"--benchmark: {self.where}: the row has no picture; give another revision.")

    def identity(self) -> str:
        return f"{self.where}, at {self.commit}"


@dataclass(frozen=True)
class PictureOfRepository(Picture):
    """A picture that is a file of the repository, fetched when it is needed."""

    dataset: str
    commit: str
    path: str

    def load(self) -> Image.Image:
        from huggingface_hub import hf_hub_download

        with hub_errors(self.dataset, self.commit):
            file = hf_hub_download(self.dataset, self.path, repo_type="dataset", revision=self.commit)
        return loaded(Path(file), f"--benchmark: {self.dataset}, {self.path}: the image")

    def identity(self) -> str:
        return f"{self.dataset}, {self.path}, at {self.commit}"


def need_datasets(name: str) -> None:
    """Raises InputError where the extra `data` is not installed."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise InputError(f"--benchmark: {name} needs the package datasets; install shiftdc-export[data].") from error


def tables_of(dataset: str, config: str | None, commit: str) -> Mapping[str, Dataset]:
    """The splits of one config at one commit, by name."""
    import datasets

    with hub_errors(dataset, commit):
        # A bare id would be read from a folder of that name, if there is one here.
        builder = datasets.load_dataset_builder(f"hf://datasets/{dataset}", config, revision=commit)
        if builder.hash != commit:  # datasets falls back on whatever commit it has in its cache
            raise InputError(f"--benchmark: {dataset} cannot be read at {commit}; try again or give another revision.")
        builder.download_and_prepare(verification_mode="no_checks")  # of the sizes that the card states: these are often stale
        return builder.as_dataset()


@contextmanager
def hub_errors(dataset: str, revision: str | None) -> Iterator[None]:
    """What the Hub and the datasets package raise, as one sentence; never their texts, which may quote rows."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from httpx2 import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (GatedRepoError, DatasetNotFoundError):
        raise InputError(
            f"--benchmark: {dataset} is gated; accept its terms on its page and log in with 'hf auth login'."
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"--benchmark: {dataset} has no revision {revision!r}; give a branch, tag or commit of it.") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"--benchmark: {dataset} is not on the Hub as far as you can see; log in with 'hf auth login' or use a FILE.jsonl."
        ) from None
    except (HTTPError, ConnectionError) as error:
        raise InputError(
            f"--benchmark: {dataset} cannot be fetched ({type(error).__name__}); check the connection and try again."
        ) from None
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # a RuntimeError refuses a loading script
        raise InputError(
            f"--benchmark: {dataset} has not the form that is expected of it ({type(error).__name__}); give another revision."
        ) from None
