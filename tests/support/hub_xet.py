"""Xet storage for the local Hub, as hf_xet 1.8 speaks to it: serve(ROUTES).

The client asks the Hub for an address and a token of the storage. It packs the chunks of a file into xorbs, asks the storage
where to put each (a grant), puts it there and says so (commit); without a grant it posts the xorb itself. A shard then says which
chunks make up which file. From it the file is put together here, so that a commit may name it: what was not sent is not there.
Formats: huggingface/xet-core, xet_core_structures/src/{metadata_shard/file_structs,xorb_object/xorb_chunk_format}.rs.
"""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections.abc import Iterator
from typing import Any

from hub_write import API, REPO, Handler, Refusal, Route, digest

#: The token of the storage, which errors quote too.
XET = "xet_of_alice_for_an_hour"
VERIFIED, DESCRIBED = 1 << 31, 1 << 30
ENTRY = 48


def token(handler: Handler, repo_id: str, revision: str) -> Any:
    handler.repository(repo_id, write=True).find(revision)
    return {"casUrl": f"{handler.hub.url}/_cas/{repo_id}", "exp": int(time.time()) + 3600, "accessToken": XET}


def check(handler: Handler, authorization: str | None) -> None:
    """The storage gets its own token, and the bucket none: neither gets the Hub's."""
    if handler.headers.get("Authorization") != authorization:
        raise Refusal(401, "another token than expected")


def known_chunk(handler: Handler, repo_id: str, chunk: str) -> Any:
    check(handler, f"Bearer {XET}")
    raise Refusal(404, "no such chunk")


def grant(handler: Handler, repo_id: str, xorb: str) -> Any:
    check(handler, f"Bearer {XET}")
    place = str(uuid.uuid4())
    url = f"{handler.hub.url}/_bucket/{place}?X-Amz-Signature={XET}"
    return json.dumps({"id": place, "method": "PUT", "url": url, "headers": {}}).encode(), {"status": 201}


def put(handler: Handler, place: str) -> Any:
    check(handler, None)
    handler.hub.storage[place] = handler.body
    return {}


def commit(handler: Handler, repo_id: str, xorb: str, place: str) -> Any:
    check(handler, f"Bearer {XET}")
    handler.hub.storage[xorb] = handler.hub.storage.pop(place)
    return {"was_inserted": True}


def post(handler: Handler, repo_id: str, xorb: str) -> Any:
    check(handler, f"Bearer {XET}")
    handler.hub.storage[xorb] = handler.body
    return {"was_inserted": True}


def shard(handler: Handler, repo_id: str, version: str) -> Any:
    check(handler, f"Bearer {XET}")
    for sha256, parts in files(handler.body):
        data = b"".join(b"".join(chunks(handler.hub.storage[xorb])[start:end]) for xorb, start, end in parts)
        if digest(data) != sha256:
            raise Refusal(400, "other content than announced")
        handler.hub.repositories[repo_id].objects[sha256] = data
    return {"type": "result"} if version == "2" else {"result": 1}


def files(shard: bytes) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """(SHA-256, its parts: a xorb and a range of its chunks) of each file of a shard."""
    at = ENTRY
    while shard[at : at + 32] != b"\xff" * 32:
        flags, number = struct.unpack_from("<II", shard, at + 32)
        entries = [shard[at + i * ENTRY : at + (i + 1) * ENTRY] for i in range(1, number + 1)]
        at += ENTRY * (1 + number * (2 if flags & VERIFIED else 1))
        assert flags & DESCRIBED
        sha256, at = name(shard[at : at + 32]), at + ENTRY
        yield sha256, [(name(e[:32]), *struct.unpack_from("<II", e, 40)) for e in entries]


def name(value: bytes) -> str:
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", value))


def chunks(xorb: bytes) -> list[bytes]:
    """Its chunks, sent as they are (HF_XET_XORB_COMPRESSION_POLICY=none)."""
    found, at = [], 0
    while at < len(xorb):
        version, packed, scheme, size = xorb[at], xorb[at + 1 : at + 4], xorb[at + 4], xorb[at + 5 : at + 8]
        assert (version, scheme, packed) == (0, 0, size)
        at += 8 + int.from_bytes(size, "little")
        found.append(xorb[at - int.from_bytes(size, "little") : at])
    return found


CAS = f"/_cas/{REPO}"
ROUTES: list[Route] = [
    (f"GET {API}/xet-write-token/(.+)", token),
    (f"GET {CAS}/v1/chunks/[^/]+/(.+)", known_chunk),
    (f"POST {CAS}/v1/xorb-grants/default/(.+)", grant),
    ("PUT /_bucket/(.+)", put),
    (f"POST {CAS}/v1/xorb-commits/default/(.+)/grant/(.+)", commit),
    (f"POST {CAS}/v1/xorbs/default/(.+)", post),
    (f"POST {CAS}/v([12])/shards", shard),
]
