"""Headless Chromium over its debugging pipe: open a page, evaluate JavaScript, choose files. Standard library only."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio",
)  # fmt: skip


class Chromium:
    """A context manager; every call may raise AssertionError with what the browser said."""

    def __init__(self, program: str, profile: Path):
        self.command = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self.count, self.buffer = 0, b""
        self.session: str | None = None
        self.log: list[str] = []

    def __enter__(self) -> Chromium:
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()

        def pipes() -> None:  # Chromium reads descriptor 3 and writes 4
            spare = os.dup(theirs_out)
            os.dup2(theirs_in, 3)
            os.dup2(spare, 4)

        self.process = subprocess.Popen(
            self.command, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method: str, timeout: float = 120, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the DevTools protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session and not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.log.append(json.dumps(answer["params"])[:1000])

    def open(self, url: str) -> None:
        """Returns when the page has loaded."""
        self.call("Page.navigate", url=url)
        self.evaluate("new Promise((go) => document.readyState === 'complete' ? go() : addEventListener('load', go))")

    def evaluate(self, script: str, timeout: float = 120) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", timeout, expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{found['exceptionDetails']}\n" + "\n".join(self.log[-5:])
        return found["result"].get("value")

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def _read(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.into], [], [], max(0, left))
            assert ready, f"{method}: no answer in time; {self.log[-5:]}"
            read = os.read(self.into, 1 << 16)
            assert read, f"{method}: the browser ended; {self.log[-5:]}"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)
