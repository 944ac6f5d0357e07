"""A trained codebook: named by its hash, at home beside one bank, refused by every other model, needed by nothing but key-values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from codec_examples import codebook
from fakes import FakeDecoder, same
from hypothesis import given
from hypothesis import strategies as st
from object_store import bucket
from test_archive import rewritten
from test_bank import refs

from memory3.archive import export_bank, import_bank
from memory3.bank import Bank
from memory3.codebook import CODEBOOK, Codebook, Quantiser, Recipe, digest_of
from memory3.codec import codec_named
from memory3.fitting import fit_codebook, save_codebook
from memory3.integers import Int4Codec
from memory3.product import ProductCodec
from memory3.rebuilding import rebuild
from memory3.record import RecordShape
from memory3.remote import open_bank
from memory3.sharing import pull, push
from memory3.spec import BankError, BankMismatch, MemorySpec
from memory3.verifying import verify

SHAPE = RecordShape(3, 4, 8)
DATA = codebook(SHAPE, "OPQ2_8,Residual2x4,PQ2x5", "OPQ2_8,PQ4x3")
TEXTS = ["one", "two words", "a text of several more words, so that four tokens are kept"]


def filled(path: Path, data: bytes = DATA) -> Bank:
    decoder = FakeDecoder()
    bank = Bank(path, decoder, create=True, codec=ProductCodec.of(data))
    bank.add(refs(*TEXTS), decoder.encode(TEXTS))
    return bank


def raw_bank(path: Path, count: int) -> Bank:
    decoder, texts = FakeDecoder(), [f"text number {n} of many" for n in range(count)]
    bank = Bank(path, decoder, create=True)
    bank.add(refs(*texts), decoder.encode(texts))
    return bank


def test_the_papers_quantiser_takes_14_bytes_a_vector_and_39424_a_memory() -> None:
    paper = Recipe.scaled(80)
    assert str(paper) == "OPQ20_80,Residual2x14,PQ8x10"
    assert Recipe.parse(str(paper)) == paper
    assert paper.row_bytes == 14
    assert ProductCodec(str(paper), str(paper), "0" * 32).payload_bytes(RecordShape(176, 8, 80)) == 39_424


@given(st.integers(2, 256))
def test_other_head_dims_keep_the_papers_rate(head_dim: int) -> None:
    if all(head_dim % width for width in range(2, 11)):
        with pytest.raises(BankError, match="take codec rotated"):
            Recipe.scaled(head_dim)
        return
    recipe = Recipe.scaled(head_dim)
    assert recipe.head_dim == head_dim and Recipe.parse(str(recipe)) == recipe
    assert 8 * recipe.row_bytes <= max(1.4 * head_dim, 8 * -(-head_dim // 8))
    assert sum(level.parts * level.bits for level in recipe.levels) >= head_dim


@pytest.mark.parametrize(
    "bad",
    ["", "PQ4x8", "OPQ3_8,PQ4x3", "OPQ2_8,PQ3x3", "OPQ2_8,PQ4x17", "OPQ2_8,PQ4x0", "OPQ2_8,Residual3x2,PQ4x3", "OPQ0_0,PQ1x1"],
)
def test_a_quantiser_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(BankError, match="found quantiser .* expected"):
        Recipe.parse(bad)


def test_a_file_that_is_no_codebook_is_refused() -> None:
    whole = Codebook.from_bytes(DATA, "here")
    for bad in (b"", b"hello", DATA[:-1], DATA[:200], DATA.replace(b"PQ4x3", b"PQ4x4"), b"\xff" * 64):
        with pytest.raises(BankError, match="here is no codebook"):
            Codebook.from_bytes(bad, "here")
    spoilt = Quantiser(
        whole.keys.recipe, whole.keys.mean * torch.nan, *(getattr(whole.keys, n) for n in ("scale", "rotation", "centroids"))
    )
    with pytest.raises(BankError, match=r"keys\.mean is .*expected finite"):
        Codebook.from_bytes(Codebook(spoilt, whole.values, whole.about).to_bytes(), "here")


def test_a_code_is_the_nearest_centroid_of_each_part() -> None:
    book = Codebook.from_bytes(DATA, "here").values
    vectors = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(1))
    found = book.decode(book.encode(vectors))
    turned = (vectors @ book.rotation.T).unflatten(-1, (4, 2))
    for part in range(4):
        distances = torch.cdist(turned[..., part, :].flatten(0, 1), book.centroids[0][part])
        expected = book.centroids[0][part][distances.argmin(-1)]
        torch.testing.assert_close((found @ book.rotation.T).unflatten(-1, (4, 2))[..., part, :].flatten(0, 1), expected)


def test_a_damaged_or_lost_codebook_is_one_problem_and_the_texts_can_still_be_encoded_again(tmp_path: Path) -> None:
    filled(tmp_path / "bank").close()
    file = tmp_path / "bank" / CODEBOOK
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    for spoil, reason in ((lambda: file.write_bytes(data), "is damaged or another"), (file.unlink, "cannot be read")):
        spoil()
        with Bank(tmp_path / "bank", FakeDecoder()) as bank:
            assert bank.search("words", 1)
            with pytest.raises(BankError, match=f"{reason}.*memory3 bank rebuild .* --codec raw"):
                bank.read(bank.ids())
            [problem] = verify(bank).problems
            assert reason in problem
    assert Bank(tmp_path / "bank").delete([refs(*TEXTS)[0].id]) == 1
    rebuild(tmp_path / "bank", FakeDecoder(), codec=codec_named("raw", torch.bfloat16))
    with Bank(tmp_path / "bank", FakeDecoder()) as bank:
        assert same(bank.read([refs(*TEXTS)[1].id])[0], FakeDecoder().encode(TEXTS[1:2])[0])
        assert verify(bank).problems == []
    assert not file.exists()


def test_the_codebook_travels_with_the_bank_and_is_checked(tmp_path: Path) -> None:
    bank = filled(tmp_path / "bank")
    export_bank(bank, tmp_path / "bank.tar")
    moved = import_bank(tmp_path / "bank.tar", tmp_path / "moved")
    assert (tmp_path / "moved" / CODEBOOK).read_bytes() == DATA
    assert all(same(a, b) for a, b in zip(moved.read(moved.ids()), Bank(tmp_path / "bank").read(bank.ids()), strict=True))
    with pytest.raises(BankError, match=f"{CODEBOOK} in .* is damaged"):
        import_bank(rewritten(tmp_path / "bank.tar", CODEBOOK, DATA[:-1] + b"x"), tmp_path / "other")


def test_a_bank_far_away_is_read_with_the_codebook_that_was_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
    bank = filled(tmp_path / "bank")
    with bucket() as address:
        push(bank, address)
        far = open_bank(address, FakeDecoder())
        assert all(same(a, b) for a, b in zip(far.read(bank.ids()), bank.read(bank.ids()), strict=True))
        assert pull(address, tmp_path / "pulled").manifest.codec == bank.manifest.codec
    assert (tmp_path / "pulled" / CODEBOOK).read_bytes() == DATA


def test_another_codebook_is_refused(tmp_path: Path) -> None:
    filled(tmp_path).close()
    other = ProductCodec.of(codebook(SHAPE, "OPQ2_8,Residual2x4,PQ2x5", "OPQ2_8,PQ4x2"))
    with pytest.raises(BankMismatch, match="has codec product .*, expected product"):
        Bank(tmp_path, FakeDecoder(), codec=other)
    again = Codebook.from_bytes(DATA, "here")
    retrained = Codebook(again.keys, again.values, {**again.about, "seed": 1}).to_bytes()
    with pytest.raises(BankMismatch, match=digest_of(retrained)):
        Bank(tmp_path, FakeDecoder(), codec=ProductCodec.of(retrained))
    assert len(Bank(tmp_path, FakeDecoder(), codec=ProductCodec.of(DATA))) == 3


def test_a_codebook_of_another_model_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for decoder, reason in (
        (
            FakeDecoder(weights="ef" * 32, model="big"),
            r"memories of fake \(weights abababab…\), this model is big \(weights efef",
        ),
        (FakeDecoder(MemorySpec((0,), ((0, 1),), 4, 32)), "for 3 memory heads, this model has 2"),
    ):
        with pytest.raises(BankMismatch, match=f"{reason}.*memory3 bank codebook"):
            Bank(tmp_path / "bank", decoder, create=True, codec=ProductCodec.of(DATA))
    assert not (tmp_path / "bank").exists()
    with pytest.raises(BankError, match="found quantiser .* for head dim 8"):
        ProductCodec.of(codebook(RecordShape(3, 4, 6), "OPQ2_6,PQ2x3", "OPQ2_6,PQ2x3")).record_bytes(3, 4, 8)


def test_a_rebuild_keeps_the_codec_where_it_fits_and_takes_another(tmp_path: Path) -> None:
    filled(tmp_path / "bank").close()
    other = FakeDecoder(weights="99" * 32)
    with pytest.raises(BankMismatch, match="codebook was trained on memories of fake"):
        rebuild(tmp_path / "bank", other)
    assert len(Bank(tmp_path / "bank")) == 3
    rebuild(tmp_path / "bank", other, codec=Int4Codec())
    assert Bank(tmp_path / "bank", other).manifest.codec == Int4Codec()
    rebuild(tmp_path / "bank", FakeDecoder())
    assert Bank(tmp_path / "bank", FakeDecoder()).manifest.codec == Int4Codec()


def test_too_few_vectors_and_what_cannot_be_trained_on_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for count in (0, 1):
        with pytest.raises(BankError, match="found 0 vectors"):
            fit_codebook(raw_bank(tmp_path / f"{count}", count))
    bank = raw_bank(tmp_path / "few", 20)
    with pytest.raises(
        BankError, match=r"found 228 vectors in .*, expected at least 9,984 \(39 for each of 256 centroids\): write about"
    ):
        fit_codebook(bank)
    with pytest.raises(BankError, match="found quantiser OPQ20_80,Residual2x14,PQ8x10 for memories of head dim 8"):
        fit_codebook(bank, keys=str(Recipe.scaled(80)))
    with pytest.raises(BankError, match="has codec product, expected raw memories"):
        fit_codebook(filled(tmp_path / "product"))


def test_faiss_trains_what_torch_encodes_and_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    bank = raw_bank(tmp_path / "bank", 150)
    options = {"keys": "OPQ2_8,Residual2x3,PQ4x3", "values": "OPQ2_8,PQ4x4", "references": 140}
    book = fit_codebook(bank, **options)  # type: ignore[arg-type]
    again = fit_codebook(bank, **options)  # type: ignore[arg-type]
    assert book.to_bytes() == again.to_bytes()
    assert book.about["vectors"] == 3 * 4 * (147 - 7)
    assert torch.allclose(book.keys.rotation @ book.keys.rotation.T, torch.eye(8), atol=1e-5)
    read = bank.read(bank.ids())
    keys = torch.cat([m.keys.float() for m in read], 1)
    ours = book.keys.decode(book.keys.encode(keys))
    assert float((ours - keys).square().sum()) < 0.35 * float((keys - keys.mean(1, keepdim=True)).square().sum())
    flat = (((keys - book.keys.mean[:, None]) / book.keys.scale[:, None]).flatten(0, 1)).contiguous()
    index = faiss.index_factory(8, options["keys"])
    index.train(flat.numpy())
    theirs = torch.from_numpy(index.sa_decode(index.sa_encode(flat.numpy())))
    share = float((book.keys.decode(book.keys.encode(keys)) - keys).square().sum()) / float(keys.square().sum())
    other = float((theirs - flat).square().sum() / flat.square().sum())
    assert share < other * 1.05  # the same quantiser, trained once more: it is not worse by more than chance
    save_codebook(book, tmp_path / "book")
    with pytest.raises(BankError, match="exists, expected a new name"):
        save_codebook(book, tmp_path / "book")
    monkeypatch.setitem(sys.modules, "faiss", None)
    made = Bank(tmp_path / "made", FakeDecoder(), create=True, codec=codec_named("product", torch.bfloat16, tmp_path / "book"))
    made.add(refs(*TEXTS), FakeDecoder().encode(TEXTS))
    assert len(Bank(tmp_path / "made", FakeDecoder()).read(made.ids())) == 3
    with pytest.raises(BankError, match=r"found no FAISS.*pip install 'memory3\[codecs\]'"):
        fit_codebook(bank, **options)  # type: ignore[arg-type]


def test_a_codebook_that_is_not_given_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="found no codebook of this model.*--codebook.*memory3 bank codebook"):
        codec_named("product", torch.float32)
    with pytest.raises(BankError, match="cannot be read"):
        codec_named("product", torch.float32, tmp_path / "none")
    filled(tmp_path / "bank").close()
    manifest = tmp_path / "bank/manifest.json"
    fields = json.loads(manifest.read_text())
    fields["codec"]["parameters"]["fetch"] = "os.system"
    manifest.write_text(json.dumps(fields))
    with pytest.raises(BankError, match="expected its hash"):
        Bank(tmp_path / "bank")
