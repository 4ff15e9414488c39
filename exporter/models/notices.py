"""What transformers, and Python's `warnings`, say while a checkpoint's files are loaded.

Nothing of it is lost: what means another tokenizer or processor than the checkpoint's is an error, what means nothing is named
here, and the rest goes into the report.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import InputError, printable

#: Words of transformers 5.23 that mean another tokenizer or processor than the checkpoint's own, and what to do.
WRONG = {
    r"Could not load tokenizer from subfolder `(?P<part>[^`]*)`": "restore its folder {part}",
    r"Could not extract SentencePiece model from": "restore its tokenizer files, or install sentencepiece and protobuf",
    r"Could not reorder vocab using converter": "restore its tokenizer files",
    r"^Can't set \S+ with value": "restore its config and processor files",
}
#: Those that say nothing about this checkpoint, or only how its files should be written.
HARMLESS = (
    r"^You are using a model of type `shiftdc_\w+` to instantiate a model of type",  # an export's, read without its code
    r"^`(torch_dtype|use_return_dict|rope_scaling)` is deprecated",
    r"^Chat templates should be in a 'chat_template\.jinja' file",
    r"^The `?use_fast`? parameter is deprecated",
)
#: Longest message that is kept, in characters.
CHARACTERS = 500


@contextmanager
def noticed(what: str, folder: Path) -> Iterator[list[str]]:
    """Collects in its value what is said in the block, each message once and on one line; nothing is printed.

    what: begins the sentence of an InputError, which a message of `WRONG` becomes. folder: named by its last part alone.
    """
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []
    handler = _Collector(messages)
    logger = transformers_logging.get_logger("transformers")
    level, handlers = logger.level, logger.handlers
    # what is said once a process would not be said of a second checkpoint
    getattr(transformers_logging.warning_once, "cache_clear", lambda: None)()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING)
        try:
            yield found
        finally:
            logger.setLevel(level)
            logger.handlers = handlers
    messages += [
        str(w.message) for w in warned if not issubclass(w.category, (DeprecationWarning, ImportWarning, ResourceWarning))
    ]
    lines = dict.fromkeys(_line(text, folder) for text in messages)
    found += [line for line in lines if not any(re.search(pattern, line) for pattern in HARMLESS)]
    for line in found:
        for pattern, remedy in WRONG.items():
            if match := re.search(pattern, line):
                raise InputError(
                    f"{what} is not loaded as its maker published it ({line}); {remedy.format(**match.groupdict())}."
                )


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _line(text: str, folder: Path) -> str:
    """One line without paths of this machine."""
    line = printable(" ".join(text.replace(str(folder), folder.name).split())).rstrip(".")
    return line if len(line) <= CHARACTERS else f"{line[:CHARACTERS]} ..."
