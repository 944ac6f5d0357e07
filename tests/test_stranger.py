"""A reader of banks written from docs/bank.md alone, and a bank of each format version that must stay readable."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import lance
import numpy as np
import pytest
import torch
from fakes import FakeDecoder, FakeEmbedder
from test_bank import filled

from memory3.bank import Bank
from memory3.manifest import FORMAT_VERSION
from memory3.verifying import verify

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["The tower was completed in 1889.", "Salt melts at 801 degrees.", "Ω"]


def read_bank(folder: Path) -> dict[str, tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Id -> text, kept positions (P, K), keys and values (P, K, D) as the bits of bf16; nothing of memory3 is used."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["format_version"] == 1
    assert manifest["codec"] == {"name": "raw", "parameters": {"dtype": "bfloat16"}}
    pairs, slots, dim = (manifest["shape"][name] for name in ("pairs", "slots", "head_dim"))
    size = manifest["record_bytes"]
    payload = (32 + pairs * slots + 63) // 64 * 64
    found = {}
    for row in lance.dataset(str(folder / "index.lance/memories.lance")).to_table().to_pylist():
        with (folder / f"shards/{row['shard']:05d}.kv").open("rb") as shard:
            shard.seek(row["slot"] * size)
            record = shard.read(size)
        magic, state, kept, checksum, owner = struct.unpack_from("<4sHHI4x16s", record)
        assert (magic, state, owner.hex()) == (b"M3KV", 1, row["id"])
        assert checksum == zlib.crc32(record[12:], zlib.crc32(record[:8]))
        positions = np.frombuffer(record, np.uint8, pairs * slots, 32).reshape(pairs, slots)
        keys, values = np.frombuffer(record, "<u2", 2 * pairs * slots * dim, payload).reshape(2, pairs, slots, dim)
        found[row["id"]] = (row["text"], positions[:, :kept], keys[:, :kept], values[:, :kept])
    return found


def check(folder: Path) -> None:
    with Bank(folder, FakeDecoder()) as bank:
        found = read_bank(folder)
        assert sorted(found) == bank.ids()
        for id, memory in zip(bank.ids(), bank.read(bank.ids()), strict=True):
            text, positions, keys, values = found[id]
            assert bank.references([id])[id][0].text == text
            assert (memory.positions.numpy() == positions).all()
            for ours, theirs in ((memory.keys, keys), (memory.values, values)):
                assert (ours.view(torch.int16).numpy().view(np.uint16) == theirs).all()


def test_a_reader_written_from_the_page_reads_what_a_bank_holds(tmp_path: Path) -> None:
    filled(tmp_path, *TEXTS, max_shard_bytes=2000)
    check(tmp_path)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_banks_of_every_format_version_stay_readable(tmp_path: Path, version: int) -> None:
    """Made once with `filled(GOLDEN / "bank-v1", *TEXTS)`; read from a copy, so that nothing is written here."""
    shutil.copytree(GOLDEN / f"bank-v{version}", tmp_path / "bank")
    check(tmp_path / "bank")
    with Bank(tmp_path / "bank", FakeDecoder()) as bank:
        assert {spans[0].text for spans in bank.references(bank.ids()).values()} == set(TEXTS)
        assert bank.search("melts", 1)[0].id == bank.search("salt", 1)[0].id
        assert verify(bank).problems == []


def test_a_bank_with_vectors_and_contexts_stays_readable(tmp_path: Path) -> None:
    """The same texts as one document, `write(…, context=True)` into a bank with `FakeEmbedder()`."""
    shutil.copytree(GOLDEN / "bank-v1-columns", tmp_path / "bank")
    check(tmp_path / "bank")
    embedder = FakeEmbedder()
    with Bank(tmp_path / "bank", FakeDecoder(), embedder=embedder) as bank:
        for text in TEXTS:
            [[hit]] = bank.nearest([text], 1)
            assert bank.references([hit.id])[hit.id][0].text == text and hit.score == pytest.approx(1, abs=2e-3)
        assert len(bank.in_context()) == 2
        assert verify(bank).problems == []
