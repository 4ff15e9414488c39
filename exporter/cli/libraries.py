"""The libraries below this package, before they are imported: whether they fit together, and what they print."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from exporter.errors import InputError


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """No reports, bars and warnings of the libraries beside our own progress; SHIFTDC_DEBUG=1 shows them."""
    _check_torchvision()
    if os.environ.get("SHIFTDC_DEBUG"):
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    yield


def _check_torchvision() -> None:
    """Beside a torchvision of another build than torch's, transformers cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:  # fine: only some families need it
        return
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"torchvision and torch are of different builds ({reason}); install both from one index, or run "
            "'pip uninstall torchvision'."
        ) from error
