"""Pushing to a local Hub with the real client, over LFS."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import EFFECTIVE, REPO, Client, changes, edit_report, environment, pushed_files, with_base
from hub_write import EXPIRED, FINE, READ, WRITE, Fault, Hub, serve
from interpreters import COMMAND_LINE, python
from PIL import Image
from tiny import save_tiny_llava

from exporter.checkpoint.manifest import differences
from exporter.checkpoint.report import read_report
from exporter.evaluation.results_json import read_results
from exporter.onnx import export as onnx_export
from exporter.publishing.attach import attach_results
from exporter.publishing.push_files import LocalFile, rewrite

GENERATE = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, cache_dir=sys.argv[2])
ids = torch.arange(5, 25)[None]
print(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False).tolist())
"""


FETCH = """
import sys
from pathlib import Path
from huggingface_hub import snapshot_download
from exporter.checkpoint.verify import verify
snapshot_download(sys.argv[1], local_dir=sys.argv[2])
assert verify(Path(sys.argv[2])).edited == ()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve() as found:
        yield found


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.repositories.clear()
    server.faults.clear()
    server.received.clear()
    server.corrupted = None
    return server


@pytest.fixture
def checkpoint(make_export: Any, tmp_path: Path) -> Path:
    """An export of a base folder, with a measured effect, and with what must not be pushed."""
    folder = shutil.copytree(make_export().plan.output, tmp_path / "calibrated")
    edit_report(folder, lambda report: report.update(evaluation=EFFECTIVE))
    for stray in (".secret", "shiftdc_report.json.partial", "replies.jsonl"):
        (folder / stray).write_text("never pushed")
    return folder


@pytest.fixture
def of_hub_base(hub: Hub, base_folder: Path, checkpoint: Path) -> Path:
    """The same of a base that lives on the Hub."""
    return with_base(checkpoint, "org/tiny", hub.add("org/tiny", base_folder))


@pytest.fixture(scope="module")
def client(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    found = Client(server.url, tmp_path_factory.mktemp("client"))
    yield found
    found.end()


@pytest.fixture
def push(hub: Hub, client: Client) -> Callable[..., Any]:
    return client.push


@pytest.fixture
def refused(hub: Hub, client: Client) -> Callable[..., str]:
    return client.refused


def reply(client: Client, url: str, model: object, cache: Path) -> str:
    """Token ids from plain transformers in a process of its own, with caches of its own."""
    command = [*python(COMMAND_LINE), "-c", GENERATE, str(model), str(cache)]
    settings = {**environment(url, client.home), "HF_TOKEN": WRITE, "HF_MODULES_CACHE": str(cache / "modules")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_round_trip(hub, client, push, checkpoint, tmp_path):
    before = {f: f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()}
    done = push(checkpoint, private=True, thorough=True)
    assert before == {f: f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()}
    repository = hub.repositories[REPO]
    assert repository.private
    assert done["commit"] == repository.refs["main"]
    assert len(repository.commits) == 2  # the empty one of the creation, and ours
    there = hub.files(REPO)
    assert there.keys() - {".gitattributes"} == pushed_files(checkpoint)
    assert set(done["sent"]) == pushed_files(checkpoint)
    assert f'from_pretrained("{REPO}", trust_remote_code=True)'.encode() in there["README.md"]
    assert b"calibrated" in there["README.md"]
    assert reply(client, hub.url, REPO, tmp_path / "fresh") == reply(client, hub.url, checkpoint, tmp_path / "local")


def test_graphs_and_pictures_go_along_and_verify_when_fetched(hub, client, push, of_hub_base, tmp_path, monkeypatch):
    def write(checkpoint, family, precisions, folder, wording, progress):
        """In the place of tracing, which takes its time."""
        (folder / "config.json").write_text('{"shiftdc": {}}')
        (folder / "decoder_model_merged.onnx").write_bytes(b"graph")
        (folder / "decoder_model_merged.onnx_data").write_bytes(bytes(range(256)) * 4096)
        return onnx_export.OnnxEntry({}, {})

    monkeypatch.setattr(onnx_export, "_write", write)
    onnx_export.export_onnx(of_hub_base, ("fp32",))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    attach_results(of_hub_base, read_report(of_hub_base), read_results(EFFECTIVE), [tmp_path / "picture.png"])
    push(of_hub_base, thorough=True)
    there = hub.files(REPO)
    assert {p for p in there if p.startswith(("onnx/", "assets/"))} == {
        "onnx/config.json", "onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx_data",
        "assets/picture.png", "assets/shiftdc_probe.safetensors",
    }  # fmt: skip
    recorded = json.loads(there["shiftdc_report.json"])["files"]
    assert recorded == {p: hashlib.sha256(there[p]).hexdigest() for p in recorded}
    assert recorded.keys() == there.keys() - {"shiftdc_report.json", ".gitattributes"}
    command = [*python(COMMAND_LINE), "-c", FETCH, REPO, str(tmp_path / "fetched")]
    fetched = {**environment(hub.url, client.home), "HF_TOKEN": WRITE}
    done = subprocess.run(command, env=fetched, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_in_memory_is_as_one_on_disk(checkpoint):
    report = read_report(checkpoint)
    for path, content in rewrite(checkpoint, report, REPO).items():
        (checkpoint / path).write_bytes(content)
        of_disk, of_memory = (LocalFile(path, c) for c in (checkpoint / path, content))
        assert (of_disk.bytes, of_disk.sha256, of_disk.git_sha1) == (of_memory.bytes, of_memory.sha256, of_memory.git_sha1)
    assert f'from_pretrained("{REPO}"' in (checkpoint / "README.md").read_text()
    assert differences(checkpoint, read_report(checkpoint)) == ([], [])


def test_base_shards_are_copied_on_the_server(hub, push, of_hub_base):
    shards = set(json.loads((of_hub_base / "shiftdc_report.json").read_text())["base_model"]["shards"])
    plan = push(of_hub_base, "plan_push", create_pr=False, revision=None)
    assert {f["path"] for f in plan["files"] if f["how"] == "copied"} == shards
    assert changes(hub) == []
    done = push(of_hub_base)
    assert set(done["copied"]) == shards
    assert done["note"] is None
    assert hub.files(REPO).keys() - {".gitattributes"} == pushed_files(of_hub_base)
    put = [p.rsplit("/")[-1] for m, p, _ in hub.received if m == "PUT"]
    assert not set(put) & set(hub.repositories["org/tiny"].objects)
    small = sum((of_hub_base / f).stat().st_size for f in done["sent"])
    assert done["sent_bytes"] == pytest.approx(small, abs=200)  # the card is another
    sent = {(f["path"], f["bytes"]) for f in plan["files"] if f["how"] == "sent"}
    assert {p for p, _ in sent} == set(done["sent"])


def test_under_one_per_cent_goes_over_the_wire(hub, push, make_export, tmp_path):
    base = save_tiny_llava(tmp_path / "base", intermediate=20_000)
    folder = shutil.copytree(make_export(base).plan.output, tmp_path / "calibrated")
    with_base(folder, "org/large", hub.add("org/large", base))
    edit_report(folder, lambda report: report.update(evaluation=EFFECTIVE))
    push(folder)
    whole = sum(len(data) for data in hub.files(REPO).values())
    assert 0 < sum(sent for _, _, sent in hub.received) < 0.01 * whole


def test_a_second_push_sends_nothing(hub, push, of_hub_base):
    first = push(of_hub_base)
    hub.received.clear()
    again = push(of_hub_base)
    assert again["commit"] == first["commit"]
    assert again["sent"] == again["copied"] == []
    assert not any(m == "PUT" or "/commit/" in p for m, p in changes(hub))


def test_what_an_earlier_export_left_is_taken_away(hub, push, of_hub_base):
    push(of_hub_base)
    repository = hub.repositories[REPO]
    old = repository.commits[repository.refs["main"]]
    repository.commit("main", {**old, "model-00009.safetensors": (b"old", True), "notes.md": (b"mine", False)})
    push(of_hub_base)
    assert "model-00009.safetensors" not in hub.files(REPO)
    assert hub.files(REPO)["notes.md"] == b"mine"


@pytest.mark.parametrize("status", [400, 403, 404])
def test_a_server_that_does_not_copy(hub, push, of_hub_base, status):
    hub.faults.append(Fault("POST", "/lfs-files/duplicate", status, "not between these regions"))
    done = push(of_hub_base)
    assert "not between these regions" in done["note"]
    assert done["copied"] == []
    assert hub.files(REPO).keys() - {".gitattributes"} == pushed_files(of_hub_base)
    assert len(hub.repositories[REPO].commits) == 2


def test_quota_is_no_reason_to_send(hub, refused, of_hub_base):
    hub.faults.append(Fault("POST", "/lfs-files/duplicate", 403, "private storage limit reached"))
    assert "PushError: --push: the Hub has no room for" in refused(of_hub_base)
    assert len(hub.repositories[REPO].commits) == 1


def test_pull_request_and_branch(hub, push, of_hub_base):
    proposed = push(of_hub_base, create_pr=True)
    assert proposed["url"].endswith("/discussions/1")
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert hub.files(REPO, "refs/pr/1").keys() - {".gitattributes"} == pushed_files(of_hub_base)
    push(of_hub_base, revision="v2")
    assert hub.files(REPO, "v2").keys() - {".gitattributes"} == pushed_files(of_hub_base)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/_lfs/"),
        Fault("PUT", "/_lfs/", 503),
        Fault("POST", "/commit/"),
        Fault("POST", "/commit/", 502),
        Fault("POST", "/commit/", late=True),
        Fault("POST", "/lfs-files/duplicate"),
        Fault("POST", "/commit/", hang=3),
        Fault("POST", "/preupload/", 429),
    ],
    ids=lambda f: f"{f.path}{f.status or ('late' if f.late else 'stalled' if f.hang else 'cut')}",
)
def test_what_passes_is_tried_again(hub, push, of_hub_base, fault):
    hub.faults.append(fault)
    push(of_hub_base)
    assert fault.times == 0
    assert hub.files(REPO).keys() - {".gitattributes"} == pushed_files(of_hub_base)
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST", "/commit/", 401), "InputError: --push: the Hub does not accept the token"),
        (Fault("POST", "/commit/", 403), "InputError: --push: the token may not do this"),
        (Fault("POST", "/commit/", 409), "PushError: --push: alice/tiny-shiftdc was changed by someone else"),
        (Fault("POST", "/commit/", 412), "PushError: --push: alice/tiny-shiftdc was changed by someone else"),
        (Fault("POST", "/commit/", 507), "PushError: --push: the Hub has no room"),
        (Fault("POST", "/commit/", 500, times=9), "PushError: --push: alice/tiny-shiftdc could not be reached or served"),
        (Fault("PUT", "/_lfs/", 403, "storage quota"), "PushError: --push: the Hub has no room"),
    ],
    ids=lambda f: f"{f.path}{f.status}" if isinstance(f, Fault) else "",
)
def test_what_does_not_pass_stops_and_can_be_resumed(hub, push, refused, of_hub_base, fault, message):
    hub.faults.append(fault)
    assert message in refused(of_hub_base)
    assert hub.files(REPO).keys() == {".gitattributes"}  # nothing half-pushed
    hub.faults.clear()
    objects = set(hub.repositories[REPO].objects)
    hub.received.clear()
    push(of_hub_base)
    assert not [p for m, p, _ in hub.received if m == "PUT" and p.rsplit("/")[-1] in objects]  # sent once


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "/whoami", hang=1),
        Fault("POST", "/repos/create", hang=1),
        Fault("PUT", "/_lfs/", hang=1),
        Fault("POST", "/lfs-files/duplicate", hang=1),
        Fault("POST", "/commit/", hang=1),
        Fault("POST", "/commit/", hang=1, late=True),
    ],
    ids=lambda f: f"{f.path}{'late' if f.late else ''}",
)
def test_killed_at_every_stage_and_pushed_again(hub, client, push, of_hub_base, tmp_path, fault):
    hub.faults.append(fault)
    doomed = Client(hub.url, tmp_path, home=client.home)
    question = ["push", str(of_hub_base), {"repo_id": REPO, "private": False}, WRITE, False]
    assert doomed.process.stdin
    print(json.dumps(question), file=doomed.process.stdin, flush=True)
    wait_until(lambda: fault.times == 0)
    doomed.process.kill()
    doomed.end()
    if fault.late:  # the server carries it out whether anybody waits or not
        wait_until(lambda: len(hub.repositories[REPO].commits) == 2)
    there = hub.files(REPO).keys() - {".gitattributes"} if REPO in hub.repositories else set()
    assert there == (pushed_files(of_hub_base) if fault.late else set())
    hub.received.clear()
    assert bool(push(of_hub_base)["note"]) == fault.late  # nothing was left to do
    assert hub.files(REPO).keys() - {".gitattributes"} == pushed_files(of_hub_base)
    assert len(hub.repositories[REPO].commits) == 2


def wait_until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_file_is_compared_afterwards(hub, refused, of_hub_base):
    for path in ("shiftdc.safetensors", "config.json"):
        hub.corrupted = path
        message = refused(of_hub_base)
        assert message.startswith("VerificationError")
        assert f"{path} has another content" in message
        del hub.repositories[REPO]


@pytest.mark.parametrize(
    ("token", "options", "message"),
    [
        (None, {}, "there is no Hugging Face token"),
        (EXPIRED, {}, "does not accept the token"),
        (READ, {}, "may only read"),
        (FINE, {}, "may only read"),
        (WRITE, {"repo_id": None}, "--repo-id"),
        (WRITE, {"repo_id": "a/b/c"}, "no name of a repository"),
        (WRITE, {"repo_id": f"x{WRITE} y"}, "no name of a repository"),
        (WRITE, {"repo_id": "bob/tiny"}, "may not create repositories of bob"),
        (WRITE, {"repo_id": "readers/tiny"}, "may not create repositories of readers"),
        (WRITE, {"repo_id": "org/foreign"}, "may not write to org/foreign"),
        (READ, {"repo_id": "alice/public"}, "may not write to alice/public"),
        (WRITE, {"repo_id": "alice/public"}, "holds no export of this tool"),
        (WRITE, {"repo_id": "alice/public", "private": True}, "is public"),
        (WRITE, {"revision": "v1", "create_pr": True}, "leave --revision out"),
        (WRITE, {"revision": "0" * 40}, "not a commit"),
    ],
)
def test_preflight_refuses(hub, refused, base_folder, tmp_path, token, options, message):
    hub.add("org/foreign", base_folder)
    hub.add("alice/public", base_folder)
    given = {"revision": None, "create_pr": False, **options}
    found = refused(tmp_path, "preflight", token=token, **given)
    assert found.startswith("InputError")
    assert message in found
    assert changes(hub) == []


def test_preflight_passes_and_creates_nothing(hub, push, tmp_path):
    hub.add("alice/empty")
    for asked, full in (("tiny", "alice/tiny"), ("alice/tiny", "alice/tiny"), ("alice/empty", "alice/empty")):
        assert push(tmp_path, "preflight", repo_id=asked, revision=None, create_pr=False) == full
    assert changes(hub) == []
    assert hub.repositories.keys() == {"alice/empty"}


def test_no_hub_in_reach(tmp_path):
    client = Client("http://127.0.0.1:9", tmp_path)
    options = {"repo_id": REPO, "private": False, "revision": None, "create_pr": False}
    assert client.ask("preflight", None, options, WRITE, False)[0]["error"].startswith("PushError")
    client.end()


@pytest.mark.parametrize("evaluation", [None, {**EFFECTIVE, "paired": {}}])
def test_an_effect_not_shown_needs_permission(hub, push, refused, checkpoint, evaluation):
    edit_report(checkpoint, lambda report: report.update(evaluation=evaluation))
    found = refused(checkpoint)
    assert found.startswith("InputError")
    assert "--allow-ineffective" in found
    assert not hub.repositories
    push(checkpoint, allow_ineffective=True)


def test_terms_of_the_base(hub, refused, base_folder, checkpoint, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "nd")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    cases = {
        "forbids sharing derivatives": hub.add("org/nd", folder),
        "is gated": hub.add("org/gated", folder, gated=True),
        "is not on the Hub": hub.add("org/hidden", folder, private=True),
    }
    for (message, commit), base_id in zip(cases.items(), ("org/nd", "org/gated", "org/hidden"), strict=True):
        found = refused(with_base(checkpoint, base_id, commit))
        assert found.startswith("InputError")
        assert message in found
    assert REPO not in hub.repositories


def test_a_damaged_checkpoint_is_not_pushed(hub, refused, of_hub_base):
    (of_hub_base / "shiftdc.safetensors").unlink()
    assert refused(of_hub_base, thorough=True).startswith("VerificationError")
    assert REPO not in hub.repositories


def test_a_link_is_not_followed(hub, refused, of_hub_base, tmp_path):
    (of_hub_base / "notes.txt").symlink_to(tmp_path / "private")
    assert "symbolic link" in refused(of_hub_base)
    assert REPO not in hub.repositories
