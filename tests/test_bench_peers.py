"""Peers beside memory at toy size: the protocol, the peers that cannot run, the turns, the GGUF export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.bench.peers import gguf_export, worker
from memory3.bench.peers.measuring import WAYS, Scene, Sizes, alike, bench_peers, compared, reference_text
from memory3.bench.peers.process import Process, export_gguf
from memory3.bench.peers.venvs import REQUIRED, PeerError, commands, given, install, python_of
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=4, reference_length=16, chunk_length=8, references_per_chunk=2)
SIZES = Sizes(prompts=2, prompt=5, output=4, repeats=1)
FAKE = """
import json, sys
from pathlib import Path

here = Path(__file__).parent
if sys.argv[1].endswith("gguf_export.py"):
    Path(sys.argv[3]).write_text("gguf")
    sys.exit()
assert sys.argv[1].endswith("worker.py")
for n, line in enumerate(sys.stdin):
    asked = json.loads(line)
    with open(here.parent / "log", "a") as log:
        print(json.dumps({"peer": sys.argv[2], **asked}), file=log)
    if n == DIES:
        print("first line\\n\\nout of memory", file=sys.stderr)
        sys.exit(3)
    said = {"version": "1.0"} if n == 0 else {"seconds": 0.5, "bytes": 64} if asked["do"] == "encode" else None
    print(json.dumps(said or {"ids": list(range(asked["output"])), "first_s": 0.25, "others_s": 0.5}), flush=True)
"""
"""A peer that answers anything at once, and writes down what it was asked."""


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def fake(folder: Path, dies: int = -1) -> Path:
    """A venv whose interpreter is this one with a script of ours before all else."""
    script, python = folder / "fake.py", folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    script.write_text(FAKE.replace("DIES", str(dies)))
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    return folder


def asked(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "log").read_text().splitlines()]


# ---- what is compared ----


def test_a_peer_that_cannot_run_is_named_with_the_reason(decoder: Decoder, tmp_path: Path) -> None:
    """And transformers, which runs in this very interpreter, gives the tokens of memory3's plain decoding."""
    report = bench_peers(decoder, SIZES, home=tmp_path)
    missing = {row["peer"]: row["reason"] for row in report.figures["missing"]}
    assert set(missing) == {"llama.cpp", "kvpress"}
    assert missing["kvpress"].startswith("not installed: found no ") and "--install" in missing["kvpress"]
    assert [row["way"] for row in report.figures["ways"]] == ["none", "memory", "transformers"]
    assert report.figures["agreement"] == [{"way": "none", "references": False, "tokens": 1.0, "answers": 1.0}]
    assert f"| llama.cpp | cannot run here: {missing['llama.cpp']} |" in report.table


def test_ways_take_turns_with_the_same_prefix_prompts_and_output(decoder: Decoder, tmp_path: Path) -> None:
    for peer in REQUIRED:
        fake(tmp_path / peer)
    report = bench_peers(decoder, SIZES, home=tmp_path)
    assert [row["way"] for row in report.figures["ways"]] == list(WAYS) and report.figures["missing"] == []
    scene, log = Scene.of(decoder, SIZES), [line for line in asked(tmp_path) if "do" in line]
    turn = [
        (way.peer, what, way.press) for way in WAYS.values() if way.peer != "memory3" for what in ("encode", "answer", "answer")
    ]
    timed = log[: 2 * len(turn)]
    assert [(line["peer"], line["do"]) for line in timed] == [(peer, what) for peer, what, _ in turn] * 2
    encodes = [line for line in timed if line["do"] == "encode"]
    assert all(line["prefix"] == scene.prefix and line["kept"] == 8 for line in encodes)
    assert [line["press"] for line in encodes] == [press for _, what, press in turn if what == "encode"] * 2
    assert [line["prompt"] for line in timed if line["do"] == "answer"] == scene.prompts * (len(timed) // 3)
    assert {line["output"] for line in timed if line["do"] == "answer"} == {4}


def test_figures_and_ratios_are_those_of_what_the_peer_said(decoder: Decoder, tmp_path: Path) -> None:
    fake(tmp_path / "llama.cpp")
    report = bench_peers(decoder, SIZES, home=tmp_path)
    none, memory, _, llama = report.figures["ways"]
    said = {
        "encode_s": 0.5,
        "first_token_s": 0.25,
        "changed_s": 0.75,
        "tokens_per_s": 6.0,
        "answer_s": 0.75,
        "reference_bytes": 32,
    }
    assert llama == {"way": "llama.cpp", "peer": "llama.cpp", "version": "1.0", **said}
    assert report.ratios["rate_llama_cpp_over_none"] == pytest.approx(6 / none["tokens_per_s"])
    assert report.ratios["first_token_llama_cpp_over_memory"] == pytest.approx(0.25 / memory["first_token_s"])
    assert memory["changed_s"] == memory["first_token_s"]  # its bank has the references
    assert report.ratios["changed_llama_cpp_over_memory"] == pytest.approx(0.75 / memory["first_token_s"])
    assert report.ratios["answer_llama_cpp_over_memory"] == pytest.approx(0.75 / memory["answer_s"])
    assert not any(name.startswith(("rate_none", "first_token_memory")) for name in report.ratios)
    wrong = [row for row in report.figures["agreement"] if row["way"] == "llama.cpp"]
    assert [row["references"] for row in wrong] == [False, True]
    assert all(row["answers"] == 0 for row in wrong)  # the fake says 0, 1, 2, … whatever it is asked


def test_a_peer_that_dies_on_the_way_is_missing_and_the_others_go_on(decoder: Decoder, tmp_path: Path) -> None:
    fake(tmp_path / "llama.cpp", dies=5)
    fake(tmp_path / "kvpress")
    report = bench_peers(decoder, SIZES, home=tmp_path)
    assert report.figures["missing"] == [{"peer": "llama.cpp", "reason": "it ended without an answer: out of memory"}]
    assert [row["way"] for row in report.figures["ways"]] == [name for name in WAYS if name != "llama.cpp"]


def test_memory_keeps_its_record_and_nothing_is_kept_without(decoder: Decoder, tmp_path: Path) -> None:
    """`pairs * slots * D` keys and values of float32, positions, header and padding."""
    for peer in REQUIRED:
        fake(tmp_path / peer)
    none, memory, *_ = bench_peers(decoder, SIZES, home=tmp_path).figures["ways"]
    spec = decoder.spec
    assert none["reference_bytes"] is None and none["encode_s"] == 0
    assert 0 <= memory["reference_bytes"] - 2 * spec.pairs * spec.slots * decoder.head_dim * 4 < 1024


def test_memory_reads_the_references(decoder: Decoder, tmp_path: Path) -> None:
    scene, sizes = Scene.of(decoder, SIZES), SIZES
    with compared(decoder, scene, sizes, {}, tmp_path, make=False) as run:
        asked = {"do": "answer", "prompt": scene.prompts[0], "output": 12}
        read, plain = (run.partners[name].ask(asked)["ids"] for name in ("memory", "none"))
    assert len(read) == len(plain) == 12 and read != plain


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    assert alike([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == {"tokens": 4 / 6, "answers": 0.5}


def test_references_are_no_longer_than_the_spec_allows(decoder: Decoder) -> None:
    """Random tokens are mostly bytes of no character; several tokens of one character end at the same place."""
    rng = np.random.default_rng(0)
    lengths = [len(decoder.tokens(reference_text(decoder, rng))) for _ in range(30)]
    assert max(lengths) <= SPEC.reference_length and min(lengths) >= SPEC.reference_length - 3


def test_sizes_below_what_can_be_timed_are_refused() -> None:
    with pytest.raises(SpecError, match="found output=1, expected at least 2"):
        Sizes(output=1)


# ---- venvs and processes ----


def test_transformers_runs_here_unless_it_has_a_venv(tmp_path: Path) -> None:
    assert python_of("transformers", {}, tmp_path) == Path(sys.executable)
    folder = fake(tmp_path / "transformers")
    assert python_of("transformers", {}, tmp_path) == folder / "bin" / "python"
    assert python_of("kvpress", {"kvpress": folder}, tmp_path) == folder / "bin" / "python"
    with pytest.raises(PeerError, match="expected a venv there"):
        python_of("kvpress", {"kvpress": tmp_path}, tmp_path)


def test_a_venv_is_given_by_the_name_of_a_peer() -> None:
    assert given(["llama.cpp=a=b", "kvpress=c"]) == {"llama.cpp": Path("a=b"), "kvpress": Path("c")}
    for word in ("vllm=x", "kvpress", "kvpress="):
        with pytest.raises(SpecError, match=f"found --venv {word}, expected NAME=FOLDER"):
            given([word])


def test_a_venv_is_made_once_and_its_torch_is_ours(tmp_path: Path) -> None:
    new = commands("kvpress", tmp_path / "new", Path("c.txt"))
    assert [command[1:3] for command in new] == [["-m", "venv"], ["-m", "pip"]]
    fake(tmp_path / "kvpress")
    script = tmp_path / "kvpress" / "fake.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nconstraints = Path(sys.argv[sys.argv.index('-c') + 1]).read_text()\n"
        f"Path({str(tmp_path / 'said')!r}).write_text(' '.join(sys.argv[1:4]) + '|' + sys.argv[-1] + '|' + constraints)"
    )
    install("kvpress", tmp_path)
    assert (tmp_path / "said").read_text() == f"-m pip install|kvpress|torch=={torch.__version__.partition('+')[0]}\n"


def test_an_install_that_fails_is_the_reason(decoder: Decoder, tmp_path: Path) -> None:
    for peer in ("llama.cpp", "kvpress"):
        fake(tmp_path / peer).joinpath("fake.py").write_text("import sys; sys.exit('no C++ compiler')")
    report = bench_peers(decoder, SIZES, home=tmp_path, make=True)
    reason = "could not be installed: no C++ compiler"
    assert report.figures["missing"] == [{"peer": peer, "reason": reason} for peer in ("llama.cpp", "kvpress")]


def test_the_worker_says_in_one_sentence_what_went_wrong(tmp_path: Path) -> None:
    setup = {"model": str(tmp_path), "dtype": "float32", "device": "cpu", "threads": 1}
    with pytest.raises(PeerError, match="^ValueError: Unrecognized model in .*config.json"):
        Process("transformers", Path(sys.executable), setup)
    with pytest.raises(PeerError, match="does not start: No such file"):
        Process("kvpress", tmp_path / "python", setup)


def test_a_model_without_a_gguf_form_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    fake(tmp_path / "venv").joinpath("fake.py").write_text(
        f"import sys; sys.modules['gguf'] = sys; sys.argv = sys.argv[1:]\n"
        f"import runpy; runpy.run_path({gguf_export.__file__!r}, run_name='__main__')"
    )
    with pytest.raises(PeerError, match="^its GGUF file cannot be written: found a model of type 'gpt_neox', and"):
        export_gguf(tmp_path / "venv" / "bin" / "python", tmp_path, tmp_path / "file")


# ---- the workers ----


class Newest:
    """A press that keeps the newest key-values, as kvpress would: on the cache, behind each layer's attention."""

    def __init__(self, dropped: float) -> None:
        self.dropped = dropped

    def __call__(self, model: Any) -> Any:
        press = self

        class Pressing:
            def __enter__(self) -> None:
                self.hooks = [m.self_attn.register_forward_hook(press.drop, with_kwargs=True) for m in model.model.layers]

            def __exit__(self, *_: object) -> None:
                for hook in self.hooks:
                    hook.remove()

        return Pressing()

    def drop(self, module: Any, given: Any, keywords: dict[str, Any], output: Any) -> None:
        layer = keywords.get("past_key_values", keywords.get("cache")).layers[module.layer_idx]
        kept = int(layer.keys.shape[2] * (1 - self.dropped))
        layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]


@pytest.fixture
def setup(tmp_path: Path) -> dict[str, Any]:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return {"model": str(tmp_path / "model"), "dtype": "float32", "device": "cpu", "threads": torch.get_num_threads()}


def test_a_pressed_prefix_that_lost_nothing_gives_the_tokens_of_text(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(Newest=Newest))  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "version", lambda package: "0")
    pressed, text = worker.KvPress(setup), worker.Transformers(setup)
    prefix, prompts = [1, *range(20, 60)], [[5, 6, 7], [8, 9], [5, 6, 7]]
    nbytes = pressed.encode(prefix, {"press": None, "kept": 0})
    text.encode(prefix, {})
    whole = [pressed.answer(prompt, 6)[0] for prompt in prompts]
    assert whole == [text.answer(prompt, 6)[0] for prompt in prompts]  # and the first answer left nothing behind
    assert pressed.encode(prefix, {"press": "Newest", "kept": 10}) == nbytes * 10 // len(prefix)
    assert pressed.length == len(prefix)
    assert [pressed.answer(prompt, 6)[0] for prompt in prompts] != whole
    pressed.encode([], {})
    text.encode([], {})
    assert [pressed.answer(prompt, 6)[0] for prompt in prompts] == [text.answer(prompt, 6)[0] for prompt in prompts]


# ---- GGUF ----


def test_every_tensor_of_a_llama_has_a_name_of_its_own_in_gguf() -> None:
    names = list(tiny_model("llama", attention_bias=True).state_dict())
    renamed = [gguf_export.renamed(name) for name in names]
    assert len(set(renamed)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "blk.3.attn_q.bias", "blk.0.ffn_norm.weight"} <= set(renamed)
    with pytest.raises(ValueError, match="found tensor 'model.layers.0.self_attn.q_norm.weight'"):
        gguf_export.renamed("model.layers.0.self_attn.q_norm.weight")


def test_interleaved_rows_turn_in_pairs_as_halves_turn_in_halves() -> None:
    """Rotating dimension i with i + D/2 and interleaving after is interleaving first and rotating 2i with 2i + 1."""
    heads, size = 3, 8
    rows, angle = np.random.default_rng(0).normal(size=(heads, size)), np.arange(size // 2) + 0.5
    low, high = rows[:, : size // 2], rows[:, size // 2 :]
    turned = np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], 1)
    pairs = gguf_export.interleaved(rows.reshape(-1), heads).reshape(heads, size)
    even, odd = pairs[:, 0::2], pairs[:, 1::2]
    expected = np.stack([even * np.cos(angle) - odd * np.sin(angle), odd * np.cos(angle) + even * np.sin(angle)], 2)
    np.testing.assert_allclose(gguf_export.interleaved(turned.reshape(-1), heads), expected.reshape(-1))


def test_queries_and_keys_are_interleaved_by_their_own_heads_and_values_are_not() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tensor = np.arange(32, dtype=np.float32).reshape(16, 2)
    for part, heads in (("q", 4), ("k", 2)):
        name, mapped = gguf_export.mapped(f"model.layers.1.self_attn.{part}_proj.weight", tensor, config)
        assert name == f"blk.1.attn_{part}.weight"
        np.testing.assert_array_equal(mapped, gguf_export.interleaved(tensor, heads))
        assert (mapped != tensor).any()
    np.testing.assert_array_equal(gguf_export.mapped("model.layers.1.self_attn.v_proj.weight", tensor, config)[1], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path)
    found = dict(gguf_export.tensors(tmp_path / "model.safetensors"))
    for name, tensor in found.items():
        np.testing.assert_array_equal(gguf_export.widened(tensor), model.state_dict()[name].float().numpy())
    assert "model.norm.weight" in found


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "qwen3"}, "type 'qwen3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotation of type 'yarn'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_bias": True}, "biases in the feed-forward"),
    ],
)
def test_what_gguf_cannot_say_is_refused(changed: dict[str, Any], reason: str) -> None:
    config = {"model_type": "llama", "rope_parameters": {"rope_type": "default"}, "hidden_act": "silu", "mlp_bias": False}
    assert gguf_export.unsupported(config) is None
    assert reason in str(gguf_export.unsupported(config | changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_holds_the_sizes_and_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is in llama.cpp's venv")
    model = tiny_model("llama", attention_bias=True, tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path)
    gguf_export.export(tmp_path, tmp_path / "file.gguf")
    reader = gguf.GGUFReader(tmp_path / "file.gguf")
    assert reader.get_field("llama.attention.head_count_kv").contents() == model.config.num_key_value_heads
    written = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in written and written["blk.0.attn_q.bias"].tensor_type.name == "F32"
    assert written["token_embd.weight"].tensor_type.name == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    bits = np.uint16 if dtype == torch.bfloat16 else np.float32
    rows = np.ascontiguousarray(written["token_embd.weight"].data).view(bits).reshape(model.config.vocab_size, -1)
    np.testing.assert_array_equal(gguf_export.widened(rows), model.state_dict()["model.embed_tokens.weight"].float().numpy())
