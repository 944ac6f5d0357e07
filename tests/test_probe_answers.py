"""The circuit of an answer: its heads and edges are what cuts say, its tokens are named right, few heads carry it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model, tiny_tokenizer

import memory3
from memory3.answering import question_prompt
from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.generation import complete
from memory3.probe.answers import SHARE, Circuit, _subject, circuit_of, described, document
from memory3.probe.edges import Edges, effects
from memory3.recall import Recall
from memory3.spec import MemorySpec, Reference, SourceError
from memory3.splitting import references
from memory3.writing import write

NOTES = Path(__file__).parents[1] / "examples" / "notes"
QUESTION = "Who founded the Festival of Oskerra?"
SPEC = MemorySpec(layers=(0, 2), heads=((0, 1), (1,)), tokens_per_head=6, reference_length=64)
FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")


def of_tiny(name: str, folder: Path, **options: int) -> tuple[Circuit, Decoder, Bank]:
    decoder = attach(tiny_model(name), tiny_tokenizer(), SPEC)
    bank = Bank(folder / "bank", decoder, create=True)
    write(decoder, [Reference(fact) for fact in FACTS], bank)
    return circuit_of(decoder, "When was the tower of salt completed?", Recall(bank), **options), decoder, bank


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Circuit]:
    """The shipped model on the example notes."""
    folder = tmp_path_factory.mktemp("notes")
    with pytest.MonkeyPatch.context() as patch, memory3.load(device="cpu") as decoder:
        patch.setenv("MEMORY3_CACHE", str(folder / "cache"))
        bank = Bank(folder / "bank", decoder, create=True)
        write(decoder, references(NOTES, decoder), bank)
        yield circuit_of(decoder, QUESTION, Recall(bank, retriever="lexical"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt-neox", "gpt-oss", "cohere2"])
def test_likelihoods_are_those_of_generation_with_memory_and_masked(name: str, tmp_path: Path) -> None:
    found, decoder, bank = of_tiny(name, tmp_path, max_new_tokens=6)
    with decoder:
        prompt = question_prompt(decoder, found.question)
        [done] = complete(decoder, [prompt], recall=Recall(bank), max_new_tokens=6)
        said = done.ids[: found.answered]
        layout = decoder.layout([[*prompt.ids, *said]], grid=[[0] * (len(prompt.ids) + len(said))])
        reading = decoder.reading(layout.chunks, [[done.recalls[0][1].memories]])
        for expected, given in ((found.with_memory, reading), (found.without, None)):
            with torch.no_grad():
                logits = decoder.forward(layout, given).logits[0, -len(said) - 1 : -1].log_softmax(-1)
            total = float(logits[torch.arange(len(said)), torch.tensor(said)].sum())
            assert total == pytest.approx(expected, abs=1e-3)
        group = 4 // decoder.geometry.num_kv_heads
        kv = {0: (0, 1), 2: (1,)}
        assert {(h.layer, h.head) for h in found.heads} == {
            (layer, k * group + n) for layer, some in kv.items() for k in some for n in range(group)
        }


def test_named_tokens_are_those_of_the_reference_and_of_the_context(tmp_path: Path) -> None:
    found, decoder, _ = of_tiny("llama", tmp_path, max_new_tokens=6)
    with decoder:
        remembered = [edge for edge in found.edges if edge.key.reference is not None]
        inside = [edge for edge in found.edges if edge.key.reference is None]
        assert 0 < len(remembered) <= 24 and 0 < len(inside) <= 24
        for edge in remembered:
            assert edge.key.reference is not None
            assert edge.layer in (0, 2)
            assert found.references[edge.key.reference].text[edge.key.place] == edge.key.text  # a token is a character here
        text = decoder.tokenizer.decode(question_prompt(decoder, found.question).ids)
        assert "".join(node.text for node in found.context)[: len(text)] == text
        for edge in inside:
            assert found.context[edge.key.place] == edge.key and found.context[edge.query.place] == edge.query
            assert edge.key.place <= edge.query.place


def test_a_named_edge_is_the_one_that_was_cut(tmp_path: Path) -> None:
    """The slot is looked up again from what its name says: the reference, the head and the kept token."""
    found, decoder, bank = of_tiny("llama", tmp_path, max_new_tokens=6)
    with decoder:
        prompt = question_prompt(decoder, found.question)
        [done] = complete(decoder, [prompt], recall=Recall(bank), max_new_tokens=6)
        recalls = [r for _, r in done.recalls]
        subject, _ = _subject(decoder, prompt, done.ids[: found.answered], recalls)
        for edge in (edge for edge in found.edges if edge.key.reference is not None):
            assert edge.key.reference is not None
            memory = recalls[0].memories[edge.key.reference]
            row = {(0, 0): 0, (0, 1): 1, (2, 1): 2}[edge.layer, edge.head // 2]
            slot = edge.key.reference * memory.count + memory.positions[row].tolist().index(edge.key.place)
            query = len(decoder.prefix_ids) + edge.query.place
            [effect] = effects(decoder, subject, [[Edges(edge.layer, edge.head, subject.pairs([(query, slot)]))]])
            assert effect == pytest.approx(edge.effect, abs=1e-4)
        assert len({edge.key.reference for edge in found.edges}) > 2  # of more than one memory, and of the context


def test_few_heads_of_the_shipped_model_carry_an_answer_from_the_right_note(shipped: Circuit) -> None:
    assert shipped.answer == "Milo Tarrant"
    assert shipped.gain > 10
    assert len(shipped.heads) == 32
    assert 1 <= len(shipped.carriers) <= 8
    assert shipped.alone >= shipped.without + SHARE * shipped.gain
    assert shipped.carriers == shipped.heads[: len(shipped.carriers)]
    remembered = [edge for edge in shipped.edges if edge.key.reference is not None]
    best = remembered[0]
    assert best.key.reference is not None
    assert shipped.references[best.key.reference].source.endswith("festival-of-oskerra.md")
    assert "Milo Tarrant".startswith(best.key.text.strip())
    assert best.query.text == ":"  # what foretells the answer's first token


def test_edges_and_heads_come_in_order_of_their_effect(shipped: Circuit) -> None:
    for some in (shipped.edges, shipped.heads):
        assert [one.effect for one in some] == sorted((one.effect for one in some), reverse=True)


def test_what_recalls_nothing_is_refused(tmp_path: Path) -> None:
    found, decoder, bank = of_tiny("llama", tmp_path, max_new_tokens=3)
    with decoder, pytest.raises(SourceError, match="nothing recalled to 'zzzz'"):
        circuit_of(decoder, "zzzz", Recall(bank, min_score=1e9), max_new_tokens=3)
    assert found.answered == 3


def test_a_long_answer_is_read_in_the_chunks_of_generation(tmp_path: Path) -> None:
    """Chunks of 8 tokens recall again and again; each token of a greedy answer is the best one in the one pass that is cut."""
    spec = replace(SPEC, chunk_length=8, references_per_chunk=1)
    with attach(tiny_model("llama"), tiny_tokenizer(), spec) as decoder, Bank(tmp_path / "b", decoder, create=True) as bank:
        write(decoder, [Reference(fact) for fact in FACTS], bank)
        prompt = question_prompt(decoder, "When was the tower completed? And does salt melt?")
        [done] = complete(decoder, [prompt], recall=Recall(bank), max_new_tokens=20)
        subject, known = _subject(decoder, prompt, done.ids, [r for _, r in done.recalls])
        with torch.no_grad():
            best = decoder.forward(subject.layout, subject.reading).logits[0, subject.first - 1 : -1].argmax(-1)
            closed = decoder.forward(subject.layout).logits[0, subject.first - 1 : -1].argmax(-1)
    assert len(done.recalls) > 5 and len(known) > 1
    assert best.tolist() == list(done.ids) != closed.tolist()


def test_tables_and_document_say_what_was_found(shipped: Circuit) -> None:
    made = json.loads(json.dumps(document(shipped, "m")))
    assert [h["carries"] for h in made["heads"]].count(True) == len(shipped.carriers)
    assert made["edges"][0]["effect"] == shipped.edges[0].effect
    lines = described(shipped, most=3).splitlines()
    assert lines[0] == "Milo Tarrant"
    assert sum(line.endswith("| yes |") for line in lines) == len(shipped.carriers)


def test_a_picture_shows_every_line_that_matters(shipped: Circuit, tmp_path: Path) -> None:
    from memory3.probe.picture import draw_circuit, lines

    drawn = lines(shipped.edges)
    strongest = next(edge for edge in shipped.edges if edge.key.reference is not None)
    [line] = [one for one in drawn if (one.layer, one.key, one.query) == (strongest.layer, strongest.key, strongest.query)]
    alike = [e for e in shipped.edges if (e.layer, e.key, e.query) == (line.layer, line.key, line.query)]
    assert strongest.head in line.heads and set(line.heads) <= {edge.head for edge in alike}
    assert line.effect == pytest.approx(sum(edge.effect for edge in alike if edge.head in line.heads))
    assert all(one.effect > 0 for one in drawn)
    draw_circuit(shipped, tmp_path / "new" / "circuit.png")
    assert (tmp_path / "new" / "circuit.png").read_bytes()[:4] == b"\x89PNG"
    draw_circuit(replace(shipped, edges=(), carriers=(), question="What costs $5 or $6?\n"), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000
