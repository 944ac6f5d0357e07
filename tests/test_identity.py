"""A fingerprint changes with what writes memories, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.decoder import attach
from memory3.identity import tokenizer_fingerprint
from memory3.loading import load
from memory3.spec import MemorySpec

SPEC = MemorySpec(tokens_per_head=4)


def weights(decoder: Any) -> str:
    found: str = decoder.identity()["weights"]
    return found


def test_a_change_of_the_weights_is_seen_by_a_decoder_that_is_in_use() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
        before = weights(decoder)
        assert weights(decoder) == before == weights(decoder.using(MemorySpec(tokens_per_head=8)))
        with torch.no_grad():
            decoder.model.model.layers[1].mlp.up_proj.weight.add_(0.1)
        changed = weights(decoder)
        assert changed != before
        with torch.no_grad():
            decoder.model.model.layers[3].mlp.up_proj.weight.add_(1.0)  # behind the last memory layer
        assert weights(decoder) == changed


def test_an_adapter_in_the_memory_layers_changes_the_fingerprint_and_one_behind_them_does_not() -> None:
    peft = pytest.importorskip("peft")

    def adapted(layer: int, alpha: int = 8) -> str:
        model = tiny_model("llama")
        with attach(model, tiny_tokenizer(), SPEC) as decoder:
            before = weights(decoder)
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], layers_to_transform=[layer])
            peft.inject_adapter_in_model(config, model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(0.1)
            after = weights(decoder)
            return "same" if after == before else after

    assert adapted(3) == "same"
    assert adapted(0) != "same"
    assert adapted(0) == adapted(0) != adapted(0, alpha=16)


def test_padding_and_truncation_are_settings_of_a_call_and_not_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tiny_tokenizer(bos=False)) != before


def test_a_revision_has_its_own_tokenizer_and_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub" / "models--org--toy"
    (hub / "refs").mkdir(parents=True)
    for name, commit, bos in (("main", "a" * 40, True), ("v2", "b" * 40, False)):
        (hub / "refs" / name).write_text(commit)
        made = tiny_model("llama")
        if name == "v2":
            with torch.no_grad():
                made.model.layers[0].mlp.up_proj.weight.add_(0.1)
        made.save_pretrained(hub / "snapshots" / commit)
        tiny_tokenizer(bos=bos).save_pretrained(hub / "snapshots" / commit)

    def loaded(**options: Any) -> tuple[str, bool]:
        with load("org/toy", cache_dir=str(tmp_path / "hub"), local_files_only=True, **options) as decoder:
            return weights(decoder), bool(decoder.bos_ids)

    (first, with_bos), (second, without) = loaded(), loaded(revision="v2")
    assert first != second and with_bos and not without
    assert (loaded()[0], loaded(revision="v2")[0]) == (first, second)
    shutil.rmtree(hub / "snapshots" / ("a" * 40))
    (hub / "refs" / "main").unlink()
    assert loaded(revision="v2")[0] == second
    kept = list((tmp_path / "cache" / "fingerprints").iterdir())
    for file in kept:
        file.write_text("0" * 32)
    assert loaded(revision="v2")[0] == "0" * 32
    assert loaded(revision="v2", tie_word_embeddings=False)[0] == second  # who knows what that changes


def test_a_remembered_fingerprint_is_that_of_the_same_files_in_the_same_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)

    def loaded(**options: Any) -> str:
        with load(model, **options) as decoder:
            return weights(decoder)

    half = loaded(dtype="float16")
    whole = loaded()
    kept = list((tmp_path / "cache" / "fingerprints").iterdir())
    assert len(kept) == 2
    assert (loaded(dtype="float16"), loaded(), loaded(dtype="bfloat16")) == (half, whole, whole)
    for file in kept:
        file.write_text("0" * 32)  # what is remembered is believed: opening need not hash
    assert loaded() == "0" * 32
    with torch.no_grad():
        changed = tiny_model("llama")
        changed.model.layers[0].mlp.up_proj.weight.add_(0.1)
    changed.save_pretrained(model)
    assert loaded() not in (whole, "0" * 32)
