"""A forked interpreter is a fresh one to what it runs: support/interpreters.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from interpreters import PLACE, python

pytestmark = pytest.mark.skipif(PLACE not in os.environ, reason="interpreters are forked on Linux without a GPU only")

SEEN = """
import json, os, random, sys, torch
import numpy as np
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), __name__, hasattr(torch, "left"), "exporter" in sys.modules,
                  sys.stdin.read()]))
torch.left = True
print(random.random(), torch.rand(1), np.random.random())
"""


def run(*command, **options):
    return subprocess.run([*command], capture_output=True, text=True, check=False, **options)


def test_it_has_its_own_arguments_environment_folder_and_streams_and_nothing_of_others(tmp_path):
    options = {"cwd": tmp_path, "env": {**os.environ, "GIVEN": "x"}, "input": "typed"}
    fresh = run(sys.executable, "-c", SEEN, "a", "b", **options).stdout.splitlines()
    first, second = (run(*python(), "-c", SEEN, "a", "b", **options).stdout.splitlines() for _ in range(2))
    assert first[0] == second[0] == fresh[0]
    assert json.loads(first[0])[:4] == [["a", "b"], str(tmp_path), "x", "__main__"]
    assert not {*first[1].split()} & {*second[1].split()}


@pytest.mark.parametrize("isolated", [False, True])
def test_where_it_looks_for_modules(tmp_path, isolated):
    (tmp_path / "mine.py").write_text("import sys; print(__name__, [p for p in sys.path if 'interpreters' not in p])")
    (tmp_path / "below").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for what in (["-c", "import mine"], ["-m", "mine"], [tmp_path / "mine.py"]):
        expected = run(sys.executable, *(["-I"] if isolated else []), *what, env=environment, cwd=tmp_path / "below")
        found = run(*python(isolated=isolated), *what, env=environment, cwd=tmp_path / "below")
        assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout), found.stderr


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit(3)", "import sys; sys.exit('no')", "1 / 0", "import os; os.kill(os.getpid(), 9)", "print(1)"],
)
def test_it_ends_as_what_it_runs(code):
    expected, found = (run(*command, "-c", code) for command in ([sys.executable], python()))
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_what_libraries_read_at_import_is_read():
    code = "from huggingface_hub import constants; print(constants.ENDPOINT)"
    for url in ("http://127.0.0.1:9", "http://127.0.0.1:8"):
        assert run(*python(), "-c", code, env={**os.environ, "HF_ENDPOINT": url}).stdout.strip() == url


def test_any_number_of_environments_at_once():
    """More than there is room for, all at once."""
    asked = [str(i) for i in range(6)] * 2
    processes = [
        subprocess.Popen([*python(""), "-c", "import os; print(os.environ['HF_GIVEN'])"], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "HF_GIVEN": i})
        for i in asked
    ]  # fmt: skip
    assert [p.communicate()[0].strip() for p in processes] == asked


def test_what_it_runs_is_killed_with_it():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(pid, 0)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < end
        time.sleep(0.01)
