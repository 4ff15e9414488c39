"""A process that pushes to a local Hub with the real client, which reads HF_ENDPOINT and HF_HUB_DISABLE_XET at import.

The server quotes the tokens in every error and in a warning header of every answer; `Client` sees that none is ever printed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_write import EXPIRED, FINE, READ, WRITE, Hub
from hub_xet import XET
from interpreters import COMMAND_LINE, python

REPO = "alice/tiny-shiftdc"
EFFECTIVE = {
    "benchmark": "demo", "judge": "prefix",
    "defences": {"direct": {"asr": 0.5, "over_refusal": 0.0}, "shiftdc": {"asr": 0.1, "over_refusal": 0.0}},
    "paired": {"shiftdc": {"asr": {"difference": -0.4, "ci95": [-0.5, -0.3]}}},
}  # fmt: skip
#: Settings of hf_xet: chunks as they are, and no long waits.
HF_XET = {"HF_XET_XORB_COMPRESSION_POLICY": "none", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
# answers one JSON line for each that it reads
CLIENT = """
import dataclasses, json, os, sys, traceback
from pathlib import Path
from exporter.publishing import hub_errors, push
from exporter.errors import ShiftDCError
push.WAITS = (0.1, 0.1)
hub_errors.SILENCE = 2.0
verify = push.verify
for line in sys.stdin:
    what, folder, options, token, thorough = json.loads(line)
    os.environ["HF_TOKEN"] = token or ""
    push.verify = verify if thorough else lambda folder: None
    try:
        if what == "preflight":
            answer = push.preflight(**options)
        else:
            answer = dataclasses.asdict(getattr(push, what)(Path(folder), **options))
    except ShiftDCError as error:
        traceback.print_exception(error)
        assert error.__context__ is None or "Validation" in str(type(error.__context__))
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stderr.flush()
    print(json.dumps(answer), flush=True)
"""


def with_base(folder: Path, base_id: str, commit: str) -> Path:
    edit_report(folder, lambda report: report["base_model"].update(id=base_id, revision=commit))
    return folder


def edit_report(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "shiftdc_report.json"
    report = json.loads(file.read_text())
    edit(report)
    file.write_text(json.dumps(report, indent=2) + "\n")


def environment(url: str, home: Path, xet: bool = False) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")}
    settings = HF_XET if xet else {"HF_HUB_DISABLE_XET": "1"}
    return {**kept, **settings, "HF_ENDPOINT": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}


class Client:
    """A process that pushes."""

    def __init__(self, url: str, folder: Path, xet: bool = False, home: Path | None = None) -> None:
        self.home, self.stderr = home or folder / "home", folder / "stderr"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.stderr.open("w")}
        command = [*python(COMMAND_LINE), "-c", CLIENT]
        self.process = subprocess.Popen(command, env=environment(url, self.home, xet), text=True, **pipes)

    def ask(self, *question: object) -> tuple[Any, str]:
        """The answer and what was printed on stderr; neither holds a token."""
        before = len(self.stderr.read_text())
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question, default=str), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        printed = self.stderr.read_text()[before:]
        assert answer, printed
        for secret in (WRITE, READ, FINE, EXPIRED, XET):
            assert secret not in answer + printed
        return json.loads(answer), printed

    def push(self, folder: Path, what: str = "push", repo_id: str = REPO, thorough: bool = False, **options: Any) -> Any:
        """What came of it, with nothing printed."""
        answer, printed = self.ask(what, folder, {"repo_id": repo_id, "private": False, **options}, WRITE, thorough)
        assert "error" not in answer, printed
        assert printed == ""
        return answer

    def refused(
        self, folder: Path, what: str = "push", token: str | None = WRITE, repo_id: str | None = REPO, thorough: bool = False,
        **options: Any,
    ) -> str:  # fmt: skip
        """The error, on one line."""
        answer, _ = self.ask(what, folder, {"repo_id": repo_id, "private": False, **options}, token, thorough)
        assert "error" in answer, answer
        assert "\n" not in answer["error"]
        return answer["error"]

    def end(self) -> None:
        self.process.communicate()


def changes(hub: Hub) -> list[tuple[str, str]]:
    """Requests that change something on the Hub."""
    asking = ("/paths-info/", "/validate-yaml")
    return [(m, p) for m, p, _ in hub.received if m in ("POST", "PUT") and not any(a in p for a in asking)]


def pushed_files(folder: Path) -> set[str]:
    strays = {".secret", "shiftdc_report.json.partial", "replies.jsonl"}
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - strays
