"""Running the JavaScript examples in tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
NODE = ROOT / "examples" / "node"

needs_node = pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="node and npm are not installed")


def install_packages() -> None:
    """The packages of examples/node/package-lock.json, once for all test processes; git ignores them."""
    installed = NODE / "node_modules" / ".package-lock.json"
    with FileLock(NODE / ".install.lock"):
        if not installed.exists() or installed.stat().st_mtime < (NODE / "package-lock.json").stat().st_mtime:
            subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=NODE, check=True)


def node(*arguments: Any, cwd: Path = NODE) -> str:
    """What node prints."""
    done = subprocess.run(["node", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def node_module(source: str, *arguments: Any) -> str:
    """What an ES module prints that can import the packages and ./shiftdc.mjs; its arguments are process.argv.slice(1)."""
    return node("--input-type=module", "--eval", source, *arguments)
