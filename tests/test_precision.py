"""bf16 where the machine computes in it, and float32, or a word of warning, where it does not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from fakes import tokenizer
from families import tiny_model

from memory3 import precision
from memory3.loading import load
from memory3.train.settings import Schedule, Settings


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "no")])
def test_passes_of_a_training_run_in_bf16_where_the_machine_computes_in_it(
    fast: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda *device: fast)
    assert Settings(Path("unused"), Schedule(1e-2, 6)).precision == chosen
    assert Settings(Path("unused"), Schedule(1e-2, 6), precision="bf16").precision == "bf16"


def test_a_model_whose_files_are_in_bf16_is_loaded_with_a_warning_where_that_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", vocab_size=400).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(precision, "computes_bf16", lambda *device: False)
    with pytest.warns(UserWarning, match="found a model in bfloat16 on a CPU without instructions for it"):
        load(tmp_path, device="cpu").detach()
    for fast, dtype in ((False, "float32"), (False, "bfloat16"), (True, None)):
        monkeypatch.setattr(precision, "computes_bf16", lambda *device, fast=fast: fast)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path, device="cpu", dtype=dtype).detach()
        assert not [w for w in caught if "instructions" in str(w.message)]


def test_an_accelerator_says_nothing_of_the_cpu_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = precision.computes_bf16("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert precision.computes_bf16() and precision.computes_bf16("cuda")
    assert precision.computes_bf16("cpu") is alone is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_a_tensor_asked_for_in_bf16_is_a_copy_in_float32_inside_the_block_only() -> None:
    values = torch.full((2,), 1 + 2**-12)
    with precision.Float32InsteadOfBf16():
        wide = values.bfloat16()
        assert torch.equal(wide, values) and wide.data_ptr() != values.data_ptr()
    assert values.bfloat16().dtype == torch.bfloat16
