"""What a person types, and what they see."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from exporter.cli.commands import main
from exporter.runtime.resources import resource


def run(*arguments: object) -> object:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def exported(make_export):
    return make_export(caption_max_new_tokens=8).plan.output


def test_export_says_where_and_what_next(base_folder, calibration_file, tmp_path):
    done = run(base_folder, "--layers", "1-2", "--calibration", calibration_file, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"tiny-llava is calibrated: {tmp_path / 'out'}"
    assert "layers 1-2 of 4" in lines[1]
    size = (base_folder / "model.safetensors").stat().st_size
    assert lines[2] == f"  weights copied: {size / 1e6:.2f} MB of new files"
    assert "bitwise equal" in lines[3]
    assert "trust_remote_code=True" in lines[-1]
    assert "directions" in done.stderr  # progress
    assert "directions" not in done.stdout


def test_options_may_come_first_and_json_is_one_document(base_folder, calibration_file, tmp_path):
    done = run("--layers", "1", "--calibration", calibration_file, "--json", "--quiet", "--output", tmp_path / "out", base_folder)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["layers"]["chosen"] == [1]
    assert document["parity"]["logits"] < 1e-3
    assert done.stderr == ""


def test_dry_run_touches_nothing(base_folder, tmp_path):
    done = run(base_folder, "--dry-run", "--output", tmp_path / "sub" / "out")
    assert done.exit_code == 0, done.output
    assert "family:         llava" in done.stdout
    assert "uploads:        none" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent/model/folder"], "there is no folder"),
        (["BASE", "--layers", "3-9"], "--layers: 3-9 ends at 9"),
        (["BASE", "--layers", "a"], "layers in the command line is wrong"),
        (["BASE", "--strength", "9"], "strength"),
        (["BASE", "--batch-size", "0"], "--batch-size: expected auto"),
        (["BASE", "--recipe", "none"], "there is none named 'none'"),
        (["BASE", "--calibration", "none.jsonl"], "--calibration: there is no file none.jsonl"),
        (["BASE", "--gate", "open"], "'open' is not one of"),
        (["verify", "absent"], "CHECKPOINT: absent has no readable"),
        (["generate", "absent", "--image", "IMAGE", "--prompt", "x"], "CHECKPOINT: absent has no"),
        (["generate", "EXPORT", "--image", "absent.png", "--prompt", "x"], "--image: there is no file absent.png"),
        (["generate", "EXPORT", "--image", "BASE/config.json", "--prompt", "x"], "cannot be read as a picture"),
        (["recipes", "none"], "there is none named 'none'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(base_folder, exported, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    names = {"BASE": str(base_folder), "EXPORT": str(exported), "IMAGE": "image.png"}
    done = run(*[names.get(a, a.replace("BASE/", f"{base_folder}/")) for a in arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert [f.name for f in tmp_path.iterdir()] == ["image.png"]


@pytest.fixture
def benchmark_file(tmp_path):
    """Writes one question about `image`, as given, and returns the file."""

    def write(image: bytes | None, **changes: object) -> Path:
        if image is not None:
            (tmp_path / "a.png").write_bytes(image)
        row = {"image": "a.png", "prompt": "What is it?", "kind": "benign", "category": "things", **changes}
        file = tmp_path / "mine.jsonl"
        file.write_text(json.dumps(row))
        return file

    return write


def png(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("1", size).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("image", "changes", "arguments", "message"),
    [
        (None, {}, [], "there is no image"),
        (b"no picture", {}, [], "line 1: the image cannot be decoded"),
        (png((20000, 20000)), {}, [], "line 1: the image has more than"),
        (png((8, 8)), {"kind": "odd"}, [], "line 1: kind"),
        (png((8, 8)), {}, ["--category", "weather"], "has none named 'weather', expected of things"),
        (png((8, 8)), {}, ["--defence", "magic"], "none named 'magic'"),
        (png((8, 8)), {}, ["--judge", "nobody/guard"], "neither prefix nor keywords"),
    ],
    ids=["missing", "unreadable", "bomb", "kind", "category", "defence", "judge"],
)
def test_bad_benchmarks_are_one_sentence(exported, benchmark_file, tmp_path, image, changes, arguments, message):
    file = benchmark_file(image, **changes)
    done = run("evaluate", exported, "--benchmark", file, "--quiet", "--no-attach", "--output", tmp_path / "out", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_empty_benchmark_and_a_foreign_reply_file(exported, benchmark_file, tmp_path):
    file = benchmark_file(png((8, 8)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "replies.jsonl").write_text("my diary")
    arguments = ("evaluate", exported, "--benchmark", file, "--quiet", "--no-attach", "--output", tmp_path / "out")
    done = run(*arguments)
    assert (done.exit_code, "is no log of replies" in done.stderr) == (2, True)
    assert (tmp_path / "out" / "replies.jsonl").read_text() == "my diary"
    file.write_text("")
    done = run(*arguments)
    assert (done.exit_code, "holds no questions" in done.stderr) == (2, True)


def test_evaluate_prints_tables_or_one_document(exported, benchmark_file, tmp_path):
    file = benchmark_file(png((30, 30)), answer="a box.")
    arguments = ("evaluate", exported, "--benchmark", file, "--no-attach", "--max-new-tokens", 2, "--output", tmp_path / "out")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "over-refusal" in done.stdout
    assert "not shown that calibration lowers attack success" in done.stderr  # there was no attack
    document = json.loads(run(*arguments, "--json", "--quiet").stdout)
    assert document["defences"]["shiftdc"]["n_benign"] == 1


def test_export_with_evaluate_has_its_figures_in_the_card(base_folder, calibration_file, benchmark_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((resource("recipes") / "llava.yaml").read_text())
    recipe |= {"benchmark": str(benchmark_file(png((30, 30)))), "caption_max_new_tokens": 4, "layers": "1"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("--recipe", "mine.yaml", "--calibration", calibration_file, "--quiet", "--evaluate", "--json")
    done = run(base_folder, *arguments, "--output", "out")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["evaluation"]["defences"].keys() == {"direct", "text_only", "shiftdc", "random_direction_0"}
    assert "harmless refused" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out-evaluation" / "results.json").is_file()


def test_a_failed_check_is_exit_code_1(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "export")
    (folder / "shiftdc.safetensors").unlink()
    done = run("verify", folder)
    assert done.exit_code == 1
    assert "failed its checks" in done.stderr


def test_verify_and_generate(exported, tmp_path):
    done = run("verify", exported)
    assert done.exit_code == 0, done.output
    assert "bitwise the base model's" in done.stdout
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    arguments = ("generate", exported, "--image", tmp_path / "a.png", "--prompt", "How?", "--max-new-tokens", 4)
    assert "its caption" in run(*arguments).stdout
    result = json.loads(run(*arguments, "--json").stdout)
    assert {"calibrated", "uncalibrated", "caption", "layers", "calibrated_seconds"} <= result.keys()
    for layer in result["layers"]:
        # one-sided: the coordinate ends at the reference, or stays where it is below it
        assert layer["after"] <= layer["reference"] + 1e-3 or layer["after"] <= layer["before"] + 1e-3


def test_recipes():
    assert "llava-hf/llava-1.5-7b-hf" in run("recipes").stdout
    assert "text_counterpart" in run("recipes", "llava").stdout
    assert json.loads(run("recipes", "llava", "--json").stdout)["family"] == "llava"
    listed = json.loads(run("recipes", "--json").stdout)
    assert all({"name", "family", "models", "onnx", "notes"} == row.keys() for row in listed["supported"])
    assert "llava" in [row["family"] for row in listed["supported"]]
    assert "encoder-decoder" in listed["refused"]["florence2"] and listed["untried"] == []


@pytest.mark.parametrize("form", [(), ("--markdown",)])
def test_recipes_begin_with_the_count_and_end_with_what_is_refused(form):
    first, *rows = run("recipes", *form).stdout.splitlines()
    listed = json.loads(run("recipes", "--json").stdout)
    assert first.startswith(f"{listed['supported_types']} of {listed['types']} image-text-to-text types of transformers ")
    assert "florence2" in rows[-len(listed["refused"]) + list(listed["refused"]).index("florence2")]
    assert "MiniGPT-4" in rows[-1]


def test_help_needs_no_torch():
    code = "import sys, exporter.cli.commands as c; c.main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert "shiftdc-export MODEL" in done.stdout
