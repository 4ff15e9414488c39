"""Pushing over Xet, as to the real Hub: hf_xet itself against a storage on the loopback interface."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import EFFECTIVE, Client, edit_report, pushed_files, with_base
from hub_write import LARGE, WRITE, Fault, Hub, serve
from hub_xet import ROUTES, XET
from tiny import save_tiny_llava

from exporter.checkpoint.report import read_report


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve(ROUTES) as found:
        yield found


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.repositories.clear()
    server.faults.clear()
    server.received.clear()
    server.storage.clear()
    return server


@pytest.fixture(scope="module")
def client(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    found = Client(server.url, tmp_path_factory.mktemp("client"), xet=True)
    yield found
    found.end()


@pytest.fixture
def repo(tmp_path: Path) -> str:
    """Another one for each test, with a storage of its own: hf_xet remembers what it has sent to which."""
    return f"alice/{tmp_path.parent.name}-{tmp_path.name}"


@pytest.fixture
def checkpoint(hub: Hub, base_folder: Path, make_export: Any, tmp_path: Path) -> Path:
    """An export of a base that lives on the Hub, with a measured effect."""
    return measured(make_export(), tmp_path, hub.add("org/tiny", base_folder))


def measured(export: Any, tmp_path: Path, commit: str) -> Path:
    folder = shutil.copytree(export.plan.output, tmp_path / "calibrated")
    edit_report(folder, lambda report: report.update(evaluation=EFFECTIVE))
    return with_base(folder, "org/tiny", commit)


def sent(hub: Hub) -> int:
    """Bytes of xorbs."""
    return sum(size for method, path, size in hub.received if "/_bucket/" in path or "/v1/xorbs/" in path)


def test_what_differs_is_sent_and_the_rest_copied(hub, client, checkpoint, repo):
    done = client.push(checkpoint, repo_id=repo, thorough=True)
    there = hub.files(repo)
    assert there.keys() - {".gitattributes"} == pushed_files(checkpoint)
    assert set(done["copied"]) == set(read_report(checkpoint).base_model.shards)
    large = [p for p in done["sent"] if p.endswith(LARGE)]
    assert large
    assert all(there[p] == (checkpoint / p).read_bytes() for p in large)  # put together from chunks
    assert sent(hub) > sum(len(there[p]) for p in large)
    assert not [p for _, p, _ in hub.received if "lfs/objects" in p or p.startswith("/_lfs/")]


def test_under_one_per_cent_goes_over_the_wire(hub, client, make_export, tmp_path, repo):
    base = save_tiny_llava(tmp_path / "base", intermediate=20_000)
    folder = measured(make_export(base), tmp_path, hub.add("org/tiny", base))
    client.push(folder, repo_id=repo)
    whole = sum(len(data) for data in hub.files(repo).values())
    assert 0 < sent(hub) < sum(size for _, _, size in hub.received) < 0.01 * whole


def test_a_second_push_sends_nothing(hub, client, checkpoint, repo):
    client.push(checkpoint, repo_id=repo)
    hub.received.clear()
    assert client.push(checkpoint, repo_id=repo)["sent"] == []
    assert sent(hub) == 0


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("POST", "/xorb-grants/", 404)],
        [Fault("PUT", "/_bucket/", 403, times=3)],
        [Fault("PUT", "/_bucket/", times=3)],
        [Fault("POST", "/v2/shards", 404)],
        [Fault("POST", "/v2/shards", 503)],
        [Fault("GET", "/xet-write-token/", 500)],
        [Fault("POST", "/commit/", late=True)],
    ],
    ids=lambda faults: f"{faults[0].path}{faults[0].status}",
)
def test_what_passes_is_tried_again(hub, client, checkpoint, repo, faults):
    hub.faults += faults
    client.push(checkpoint, repo_id=repo)
    assert [f.times for f in faults] == [0]
    assert hub.files(repo).keys() - {".gitattributes"} == pushed_files(checkpoint)


REFUSED = "InputError: --push: the Hub does not accept the token for {} (Xet: Network error 401)"
FORBIDDEN = "InputError: --push: the token may not do this with {} (Xet: Network error 403)"
FULL = "PushError: --push: the Hub has no room for {} (Xet: Server error 507)"
GONE = "PushError: --push: {} could not be reached or served (Xet: "
PLACES = [
    ("GET", "/xet-write-token/"),
    ("POST", "/xorb-grants/"),
    ("POST", "/xorb-commits/"),
    ("POST", "/v2/shards"),
    ("POST", "/v1/shards"),
]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        *((Fault(*place, 401), REFUSED) for place in PLACES),
        *((Fault(*place, 403), FORBIDDEN) for place in PLACES),
        *((Fault(*place, 507, times=99), FULL) for place in PLACES),
        *((Fault(*place, 500, times=99), GONE + "Server error 500)") for place in PLACES),
        *((Fault(*place, times=99), GONE + "Network error)") for place in PLACES),
        *((Fault(*place, hang=9, times=99), "no end after 2 s") for place in PLACES if "xorb" not in place[1]),
        (Fault("POST", "/v2/shards", 200), GONE + "Internal error)"),  # an answer that is none, which hf_xet quotes
    ],
    ids=lambda f: f"{f.path}{f.status or ('silent' if f.hang else 'cut')}" if isinstance(f, Fault) else "",
)
def test_what_does_not_pass_stops_and_can_be_resumed(hub, client, checkpoint, repo, fault, message):
    if fault.path == "/v1/shards":
        hub.faults.append(Fault("POST", "/v2/shards", 404, times=99))
    hub.faults.append(fault)
    found = client.refused(checkpoint, repo_id=repo)
    assert message.format(repo) in found
    assert hub.files(repo).keys() == {".gitattributes"}  # nothing half-pushed
    hub.faults.clear()
    client.push(checkpoint, repo_id=repo)
    assert hub.files(repo).keys() - {".gitattributes"} == pushed_files(checkpoint)


def test_what_has_arrived_is_not_sent_twice(hub, client, checkpoint, repo):
    hub.faults.append(Fault("POST", "/commit/", 401))
    client.refused(checkpoint, repo_id=repo)
    assert sent(hub) > 0
    hub.received.clear()
    client.push(checkpoint, repo_id=repo)
    assert sent(hub) == 0


def test_no_token_is_left_in_the_caches_and_logs_of_the_client(client):
    texts = [f.read_bytes() for f in client.home.rglob("*") if f.is_file()]
    assert texts
    assert not [t for t in texts if WRITE.encode() in t or XET.encode() in t]
