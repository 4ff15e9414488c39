"""What an attacker may control, and what stops each attempt; SECURITY.md is the table."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from bad_inputs.lines import SECRET
from click.testing import CliRunner
from hub import serve
from interpreters import COMMAND_LINE, python
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llava

import exporter
from exporter.checkpoint.manifest import differences, hashes
from exporter.checkpoint.open import open_export
from exporter.checkpoint.report import read_report
from exporter.checkpoint.staging import check_output
from exporter.checkpoint.verify import verify
from exporter.cli.commands import main
from exporter.errors import InputError, VerificationError, printable
from exporter.models.base import resolve
from exporter.publishing.attach import write_report_and_card

PACKAGE = Path(exporter.__file__).parent
ROOT = PACKAGE.parent
REPORT = "shiftdc_report.json"


def calls(file: Path) -> set[str]:
    """Every name that is called, and every attribute, with what stands before it: "open", "torch.load", "x.read_text"."""
    tree = ast.parse(file.read_text("utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


UNSAFE = {"torch.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def test_no_pickle_anywhere():
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"} & imports(file)
        assert not forbidden, (file, forbidden)
        for call in calls(file):
            assert call not in ("torch.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"), (
                file,
                call,
            )
        assert "allow_pickle" not in file.read_text("utf-8"), file


def test_weights_are_asked_for_as_safetensors():
    """Where transformers loads what others made, it is told not to fall back on pickles."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("from_pretrained"):
                continue
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            name = ast.unparse(node.func)
            if "Model" in name or "model_class" in name:
                ours = file.name == "verify_worker.py" or "demo" in file.parts  # after every file was compared; our own files
                assert ours or options.get("use_safetensors") == "True", (file, name)
            if file.name != "verify_worker.py" and name.startswith("Auto"):
                assert options.get("trust_remote_code") == "False" or "demo" in file.parts, (file, name)


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.file), "w"))


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\nevil = generate = Evil\n"


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def hostile(calibration_file, tmp_path_factory):
    """The export of a base with pickles, and with code that every config names; and the canary that any of it would leave."""
    folder = tmp_path_factory.mktemp("hostile")
    base, canary = save_tiny_llava(folder / "base"), folder / "canary"
    for name in ("pytorch_model.bin", "training_args.pt", "model.ckpt"):
        (base / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("modeling_llava.py", "configuration_llava.py", "processing_llava.py", "tokenization_llava.py"):
        (base / name).write_text(code(canary))
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(code(canary))
    local = {
        "AutoConfig": "configuration_llava.Evil",
        "AutoModelForImageTextToText": "modeling_llava.Evil",
        "AutoProcessor": "processing_llava.Evil",
        "AutoTokenizer": ["tokenization_llava.Evil", None],
        "AutoImageProcessor": "someone/else--processing_llava.Evil",
    }
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((base / name).read_text())
        values |= {"auto_map": local, "custom_pipelines": {"x": {"impl": "modeling_llava.Evil"}}}
        if name == "config.json":
            values["text_config"]["auto_map"] = local
        (base / name).write_text(json.dumps(values))
    arguments = ["--layers", "1", "--calibration", calibration_file, "--output", folder / "out", "--quiet", base]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return folder / "out", canary


def test_a_chat_template_that_does_not_end(base_folder, tmp_path, calibration_file, monkeypatch):
    base = shutil.copytree(base_folder, tmp_path / "base")
    template = base / "chat_template.jinja"
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    template.write_text(f"{{% if messages|length > 1 %}}{loop}{{% endif %}}{template.read_text()}")
    monkeypatch.setattr("exporter.models.chat_template.LIMIT", 0.5)
    output = tmp_path / "out"
    done = CliRunner().invoke(main, [str(base), "--output", str(output), "--layers", "1", "--calibration", str(calibration_file)])
    assert done.exit_code == 2
    assert "chat template does not end within 0.5 seconds" in done.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


@pytest.mark.usefixtures("in_a_fresh_process")
def test_a_base_s_pickles_and_code_are_never_touched(hostile):
    out, canary = hostile
    assert not canary.exists()
    verify(out)
    assert not canary.exists()


def test_nothing_of_the_base_s_code_travels(hostile):
    """An export is loaded with trust_remote_code: nothing in it may name code but ours."""
    out, _ = hostile
    files = [f for f in out.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".py", ".md", ".jinja"}
    assert all(f.read_bytes() == (PACKAGE / "modeling" / f.name).read_bytes() for f in files if f.suffix == ".py")
    for file in files:
        if file.suffix == ".json":
            assert not {"llava.Evil", "custom_pipelines"} & set(re.findall(r"llava\.Evil|custom_pipelines", file.read_text())), (
                file
            )
    assert len([f for f in files if f.suffix == ".json" and '"auto_map"' in f.read_text()]) == 1


FRESH = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


def test_a_user_who_trusts_the_export_runs_our_code_only(hostile, tmp_path):
    out, canary = hostile
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*python(), "-c", FRESH, str(out)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "ShiftDCLlavaForConditionalGeneration\n", done.stderr
    assert not canary.exists()


@pytest.fixture
def export(make_export, tmp_path):
    return shutil.copytree(make_export().plan.output, tmp_path / "export")


def sign(folder: Path, **changes: object) -> None:
    """What a clever attacker does last: make the report agree with the files."""
    report = {**json.loads((folder / REPORT).read_text()), **changes}
    report["files"] = hashes(folder)
    (folder / REPORT).write_text(json.dumps(report))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def new_code(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(code(canary))


def new_generate(folder: Path, canary: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(canary))


def changed_code(folder: Path, canary: Path) -> None:
    (folder / "modeling_shiftdc.py").write_text(code(canary) + (folder / "modeling_shiftdc.py").read_text())


def other_repository(folder: Path, canary: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "someone/else--evil.Evil"})


def processor_code(folder: Path, canary: Path) -> None:
    edit(folder / "processor_config.json", auto_map={"AutoProcessor": "someone/else--evil.Evil"})


def nested_code(folder: Path, canary: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], "auto_map": {"AutoConfig": "someone/else--evil.Evil"}})


def code_of_a_part(folder: Path, canary: Path) -> None:
    (folder / "qformer_tokenizer").mkdir()
    entry = {"auto_map": {"AutoTokenizer": ["someone/else--evil.Evil", None]}}
    (folder / "qformer_tokenizer" / "tokenizer_config.json").write_text(json.dumps(entry))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (code_of_a_part, r"qformer_tokenizer/tokenizer_config\.json names code"),
        (new_code, r"evil\.py is not the code of this version"),
        (new_generate, r"custom_generate/generate\.py is not the code of this version"),
        (changed_code, r"modeling_shiftdc\.py is not the code of this version"),
        (other_repository, r"config\.json names other classes or code \(auto_map\)"),
        (processor_code, r"processor_config\.json names code"),
        (nested_code, r"config\.json names code"),
    ],
)
def test_a_checkpoint_s_own_code_is_never_run(export, canary, attack, message):
    """Even where the report of the checkpoint says that all is as it should be."""
    attack(export, canary)
    sign(export)
    with pytest.raises(VerificationError, match=message):
        verify(export)
    open_export(export)  # what generate and evaluate do
    assert not canary.exists()


def test_a_report_that_names_another_class(export):
    report = json.loads((export / REPORT).read_text())
    sign(export, base_model={**report["base_model"], "architecture": "pipeline"})
    with pytest.raises(VerificationError, match="another architecture"):
        verify(export)


class TestManifest:
    """SHA-256 of every file, in the report and checked."""

    def test_every_file_is_in_the_report(self, export):
        files = {f.relative_to(export).as_posix() for f in export.rglob("*") if f.is_file()} - {REPORT}
        report = json.loads((export / REPORT).read_text())
        assert report["files"].keys() == files
        assert report["files"] == hashes(export)
        assert {"README.md", "assets/shiftdc_probe.safetensors", "tokenizer.json", "chat_template.jinja"} <= files

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: (f / "chat_template.jinja").write_text("{{ 1 }}"), r"chat_template\.jinja was changed"),
            (lambda f: edit(f / "generation_config.json", temperature=2.0), r"generation_config\.json was changed"),
            (lambda f: (f / "assets" / "shiftdc_probe.safetensors").unlink(), r"assets/shiftdc_probe\.safetensors is missing"),
            (lambda f: (f / "README.md").unlink(), r"README\.md is missing"),
            (lambda f: (f / "notes.txt").write_text("x"), r"notes\.txt is not part of the export"),
            (
                lambda f: (f / "onnx").mkdir() or (f / "onnx" / "x.onnx").write_text("x"),
                r"onnx/x\.onnx is not part of the export",
            ),
            (lambda f: (f / "adapter.bin").symlink_to("/etc/hostname"), r"adapter\.bin is not part of the export"),
            (lambda f: (f / "adapter.bin").symlink_to("nowhere"), r"adapter\.bin is not part of the export"),
            (lambda f: (f / "shiftdc.safetensors").unlink(), r"shiftdc\.safetensors is missing"),
        ],
    )
    def test_what_differs_is_named(self, export, change, message):
        change(export)
        with pytest.raises(VerificationError, match=message):
            verify(export)

    def test_the_card_is_its_owner_s(self, export):
        (export / "README.md").write_text("My words.")
        assert verify(export).edited == ("README.md",)
        done = CliRunner().invoke(main, ["verify", str(export)])
        assert (done.exit_code, "Edited since, which its owner may: README.md." in done.stdout) == (0, True)

    def test_a_card_that_was_edited_is_kept_when_it_is_written_anew(self, export, caplog):
        """By an evaluation, or for ONNX graphs."""
        write_report_and_card(export, read_report(export))
        assert not list(export.glob(".edited*")) and not caplog.messages  # it was as it had been written
        for number, words in enumerate(("My words.", "My other words."), 1):
            (export / "README.md").write_text(words)
            write_report_and_card(export, read_report(export))
            assert (export / f".edited-README.{number}.md").read_text() == words
            assert f"kept in {export}/.edited-README.{number}.md" in caplog.messages[-1]
        assert differences(export, read_report(export)) == ([], [])
        with pytest.raises(InputError, match=r"\.edited-README\.1\.md, \.edited-README\.2\.md"):
            check_output(export, True)

    def test_hidden_files_and_replies_are_no_part(self, export):
        (export / ".gitattributes").write_text("x")
        (export / "replies.jsonl").write_text("x")
        assert verify(export).edited == ()

    def test_a_shard_s_two_hashes_must_agree(self, export):
        shard = export / "model-00001-of-00002.safetensors"
        tensors = load_file(shard)
        shard.unlink()
        save_file({k: v + 1 for k, v in tensors.items()}, shard, metadata={"format": "pt"})
        sign(export)
        with pytest.raises(VerificationError, match="contradicts itself"):
            verify(export)


def test_links_of_a_hub_cache_are_taken(hub_snapshot):
    assert resolve(str(hub_snapshot)).companions


def test_the_shipped_code_reads_nothing_but_its_config_and_tensors():
    """No file, program, network or evaluation; one writer, of config.json, which save_pretrained calls."""
    allowed = {
        "torch",
        "transformers",
        "__future__",
        "collections",
        "typing",
        "functools",
        "contextlib",
        "inspect",
        "itertools",
        "json",
        "os",
        "dataclasses",
        "hashlib",
        "re",
        "threading",
    }
    forbidden = re.compile(
        r"^(eval|exec|compile|__import__|input|breakpoint|globals|vars\(.*\)\.update)$|^(os|sys|subprocess|socket|shutil|importlib)\."
        r"|(read_text|read_bytes|write_text|write_bytes|urlopen|from_file|load|loadtxt|hf_hub_download|snapshot_download)$"
    )
    for file in (PACKAGE / "modeling").glob("*.py"):
        assert imports(file) <= allowed, (file, imports(file) - allowed)
        found = calls(file)
        assert not [c for c in found if forbidden.search(c)], (file, found)
        tree = ast.parse(file.read_text("utf-8"))
        uses = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n).startswith("os.")}
        assert uses <= {"os.PathLike"}, (file, uses)  # in an annotation
        writers = [
            function.name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "io.open")
        ]
        assert writers in ([], ["to_json_file"]), (file, writers)


def test_exported_checkpoints_hold_only_files_that_run_nothing(make_export):
    kinds = {f.suffix for f in make_export().plan.output.rglob("*") if f.is_file()}
    assert kinds == {".json", ".safetensors", ".py", ".md", ".jinja"}


def test_pictures_start_no_program(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    from exporter.data.pictures import PictureError, read_picture

    def started(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(PictureError, match="cannot be decoded"):
        read_picture(tmp_path / "a.eps")


@pytest.mark.parametrize(
    "text", ["line\nbreak", "\x1b[31mred", "\u202egnp.exe", "\ud800", "\r\nError: all is well", "x" * 10_000], ids=ascii
)
def test_sentences_stay_one_line_whatever_they_quote(text):
    shown = printable(f"MODEL: {text} is wrong; mend it.")
    assert shown.isprintable() and len(shown) <= 1500 and shown.endswith("mend it.")


HOSTILE = "x`|<script>alert(1)<!-- \n---\nlicense: mit\n# Owned\n{{ 7*7 }} ](javascript:x)"


def test_hostile_names_stay_names_in_a_card(calibration_file, tmp_path):
    """A folder's name and a data set's name, from the command line to README.md; more in test_card.py."""
    base = save_tiny_llava(tmp_path / HOSTILE.replace("/", "_"))
    rows = shutil.copy(calibration_file, tmp_path / f"{HOSTILE}.jsonl".replace("/", "_"))
    (base / "README.md").write_text(f"---\nlicense: {json.dumps(HOSTILE)}\nlanguage: {json.dumps(HOSTILE)}\n---\n")
    arguments = ["--layers", "1", "--calibration", rows, "--output", tmp_path / "out", "--quiet", base]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() <= {"pipeline_tag", "library_name", "tags", "base_model", "license", "language"}
    assert "license" not in yaml.safe_load(front)
    prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert "<script" not in prose and "\n# Owned" not in body and "49" not in prose
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1


def test_requests_reach_no_output_and_no_error(make_export, tmp_path, monkeypatch):
    """Of an evaluation only replies.jsonl holds text, and that is replies, and stays outside of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    export = shutil.copytree(make_export(caption_max_new_tokens=8).plan.output, tmp_path / "export")
    data = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    (tmp_path / "mine.jsonl").write_text(json.dumps({"image": "a.png", "prompt": SECRET, "kind": "harmful"}))
    arguments = ["evaluate", "export", "--benchmark", "mine.jsonl", "--max-new-tokens", "2", "--output", "e", "--json", "--quiet"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert SECRET not in done.output
    written = [f for folder in (tmp_path / "e", export) for f in folder.rglob("*") if f.is_file()]
    assert {"replies.jsonl", "results.json", "README.md", REPORT} <= {f.name for f in written}
    assert not [f for f in written if SECRET.encode() in f.read_bytes()]
    assert not list(export.rglob("*.jsonl"))
    assert verify(export).edited == ()  # the card and the pictures are new, and the report knows
    assert json.loads((export / REPORT).read_text())["files"].keys() >= {
        f"assets/{f.name}" for f in (export / "assets").iterdir()
    }


EVIL = [{"type": "file", "path": f"tokenizer{up}/evil.json", "size": 2, "oid": "0" * 40} for up in ("/.." * 2, "/.." * 9)]
LIES = {
    "org/above": {"tree": EVIL[:1]},
    "org/far-above": {"tree": EVIL[1:]},
    "org/absolute": {"tree": [{**EVIL[0], "path": "/tmp/tokenizer/evil.json"}, {**EVIL[0], "path": "/LICENSE/evil.json"}]},
    "org/commit": {"sha": "../../../../evil"},
    "org/nothing": {"sha": None},
    "org/numbers": {"sha": 7, "tree": [1, 2]},
    "org/text": {"tree": "evil"},
}
ASK = """
import sys
from click.testing import CliRunner
from exporter.cli.commands import main
for model in sys.argv[1:]:
    done = CliRunner().invoke(main, [model, "--dry-run"])
    print(done.exit_code, repr(done.exception), done.stderr.strip() or "nothing")
"""


def test_file_names_of_the_hub_that_lead_out(base_folder, tmp_path):
    """And other answers that no Hub should give: nothing is written outside of the cache, and nothing raised."""
    home = tmp_path / "home"
    with serve(dict.fromkeys(LIES, base_folder), lies=LIES) as url:
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
        done = subprocess.run(
            [*python(COMMAND_LINE), "-c", ASK, *LIES], env=environment, capture_output=True, text=True, check=False
        )
    answers = done.stdout.splitlines()
    assert len(answers) == len(LIES), done.stderr
    for said in answers:
        assert said.startswith("2 SystemExit(2) Error: MODEL: ") and said.endswith("."), answers
    assert not [f for f in tmp_path.rglob("*") if home not in (f, *f.parents)]
    assert not [f for f in home.rglob("*evil*") if f.is_file()] and not Path("/tmp/tokenizer").exists()


TEST = re.compile(r"`(tests/[\w./]+\.py)(?:::(\w+)(?:::(\w+))?)?`")


def test_every_row_of_the_threat_model_names_a_test_that_is_there():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| Attempt", "| ---"))]
    assert len(rows) >= 25
    for row in rows:
        named = TEST.findall(row)
        assert named or "not stopped" in row, row
        for file, *path in named:
            source = (ROOT / file).read_text("utf-8")
            for name in filter(None, path):
                assert re.search(rf"\b(def|class) {name}\b", source), (file, name)
