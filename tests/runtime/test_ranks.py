"""Several processes of one run give what one gives, bit for bit, and end together."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file

from exporter.errors import InputError
from exporter.runtime.batches import Batches
from exporter.runtime.ranks import Ranks, joined
from exporter.runtime.store import Store


def torchrun(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "SHIFTDC_CACHE": str(cache)}
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False)


def test_two_ranks_export_what_one_does(make_export, base_folder, calibration_file, tmp_path):
    arguments = ("--layers", "1-2", "--calibration", calibration_file, "--output", tmp_path / "out", "--batch-size", "3")
    cli = Path(__file__).parents[1] / "support" / "run_cli.py"
    done = torchrun(cli, base_folder, *arguments, "--json", "--quiet", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one process prints
    alone = make_export(batch_size=3)
    assert document["statistics"] == [asdict(layer) for layer in alone.report.statistics]
    found, expected = (load_file(f / "shiftdc.safetensors") for f in (tmp_path / "out", alone.plan.output))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cache", "out"]


def test_an_error_of_one_rank_is_one_sentence(base_folder, calibration_file, tmp_path):
    """The image of one row is damaged: only the rank that has its batch sees that."""
    rows = [json.loads(line) for line in calibration_file.read_text().splitlines()]
    picture = io.BytesIO()
    Image.new("RGB", (30, 30)).save(picture, "PNG")
    for i in range(len(rows)):
        (tmp_path / f"{i}.png").write_bytes(picture.getvalue() if i != 3 else b"no picture")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "image": f"{i}.png"}) + "\n" for i, row in enumerate(rows)))
    arguments = ("--layers", "1", "--calibration", file, "--output", tmp_path / "out", "--batch-size", "1", "--quiet")
    done = torchrun("-m", "exporter", base_folder, *arguments, cache=tmp_path / "cache")
    assert done.returncode != 0
    assert done.stderr.count("Error: --calibration: the image") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def in_two_processes(folder: Path, function, *arguments) -> list:
    """What `function(ranks, *arguments)` gives in each of two gloo processes."""
    mp.spawn(_joined, (function, arguments, folder, str(_free_port())), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _joined(rank, function, arguments, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    with joined() as ranks:
        (folder / f"{rank}.json").write_text(json.dumps(function(ranks, *arguments)))


def steps(ranks: Ranks, folder: str) -> list:
    """Batches of which some were kept, of uneven number, and one that fails on the second rank alone."""
    computed = []

    def compute(indices):
        computed.append(indices)
        if indices == [7]:
            raise InputError("seven is wrong")
        return torch.tensor(indices, dtype=torch.float64)[:, None] * 2

    store = Store(Path(folder))
    if ranks.is_main:
        store.put("a-1-00001", torch.tensor([[4.0], [6.0]], dtype=torch.float64))
    got = [(i, v.flatten().tolist()) for i, v in Batches(ranks, store).run("a", [[0, 1], [2, 3], [4]], compute)]
    try:
        list(Batches(ranks, store).run("b", [[5], [7]], compute))
    except InputError as error:
        return [got, computed, str(error)]
    return [got, computed, "nothing"]


def test_batches_are_shared_out(tmp_path):
    first, second = in_two_processes(tmp_path, steps, str(tmp_path))
    assert first[0] == second[0] == [[[0, 1], [0.0, 2.0]], [[2, 3], [4.0, 6.0]], [[4], [8.0]]]
    assert first[1] == [[0, 1], [4], [5]]
    assert second[1] == [[7]]  # its share of the first stage was kept
    assert first[2] == second[2] == "seven is wrong"
    assert sorted(f.stem for f in tmp_path.glob("*.safetensors")) == ["a-1-00000", "a-1-00001", "a-1-00002"]


def test_device_map_and_other_commands_are_refused(base_folder, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from exporter.cli.commands import main
    from exporter.pipeline.plan import ExportOptions, make_plan

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave one of them out"):
        make_plan(str(base_folder), ExportOptions.of(output=tmp_path / "out", device_map="auto"))
    done = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert (done.exit_code, "run the other commands without it" in done.stderr) == (2, True)
