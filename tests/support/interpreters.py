"""Python processes that start at once: each is forked from one that has imported the large libraries already.

[*python(), "-c", code] in the place of [sys.executable, "-c", code] runs as a fresh process would: with its own arguments,
environment, folder and streams, and with libraries that were imported under this environment and that nobody has used. It ends
with the status of what it runs, and when it is killed, so is that. -m MODULE and a file work too.

A nursery has imported torch, which takes most of the time. From it zygotes are forked, one for each environment, for
huggingface_hub and transformers read theirs at import; a zygote imports what it is told to and forks what runs. Elsewhere than
on Linux all is started anew.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUPPORT = Path(__file__).parent
#: Names the folder of the nurseries' sockets.
PLACE = "SHIFTDC_TEST_INTERPRETERS"
LIBRARIES = "import transformers, huggingface_hub"
#: Of a process that runs a command; where it verifies, that process is forked too.
COMMAND_LINE = f"""
import pathlib
import exporter.cli.commands, exporter.pipeline.export, exporter.publishing.push
exporter.checkpoint.verify.WORKER = pathlib.Path({str(SUPPORT / "worker_forked.py")!r})
"""
#: The same for run_cli.py.
RUN_CLI = f"import sys; sys.path.append({str(SUPPORT)!r}); import with_torchvision" + COMMAND_LINE
NURSERIES: list[subprocess.Popen[bytes]] = []  # each ends when its stdin, which this process holds open, is closed


def python(imports: str = LIBRARIES, isolated: bool = False) -> list[str]:
    """The begin of a command; `imports` is code that has been run."""
    return [sys.executable, "-I", "-S", str(SUPPORT / "interpreters_client.py"), "-I" if isolated else "", imports]


def open_nurseries() -> None:
    """For this process and all that it starts."""
    if not sys.platform.startswith("linux") or PLACE in os.environ:
        return
    place = tempfile.mkdtemp(prefix="shiftdc-interpreters-")
    for flags in (["-I"], []):
        command = [sys.executable, *flags, str(SUPPORT / "interpreters_server.py"), f"{place}/nursery{''.join(flags)}"]
        nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert nursery.stdout and nursery.stdout.readline() == b"open\n"
        NURSERIES.append(nursery)
    os.environ[PLACE] = place
    atexit.register(close_nurseries, place, os.getpid())


def close_nurseries(place: str, opened_by: int) -> None:
    if os.getpid() != opened_by:  # but in a copy of it
        return
    for nursery in NURSERIES:
        nursery.communicate()
    shutil.rmtree(place)
