"""The control that reads text in the prompt: what its prompts hold, and that its heads are taught where the answer stands there."""

from __future__ import annotations

import pytest
import torch
from fakes import tokenizer
from families import tiny_model
from test_passages import PAGE, PHASE

from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec
from memory3.train.prompted import CONTEXTS, PromptedObjective, Watching, paid_loss
from memory3.train.reading import prompted, table_of


def reader(implementation: str = "sdpa") -> Decoder:
    endless = tokenizer()
    endless.eos_token = "<s>"
    model = tiny_model("llama", vocab_size=400)
    model.set_attn_implementation(implementation)
    return attach(model, endless, MemorySpec(tokens_per_head=None))


def test_a_prompt_holds_its_references_and_its_pointers_lead_to_the_answer_in_it() -> None:
    with reader() as decoder:
        batch = PromptedObjective(decoder, [PAGE], [PAGE], (PHASE,)).batch(3)
        table = table_of(batch).tolist()
        made = prompted(decoder, batch, table, range(len(batch.contexts)))
        assert len(made) == len(batch.contexts)
        for n, (whole, context) in enumerate(zip(made, batch.contexts, strict=True)):
            text, own = decoder.tokenizer.decode(whole.ids), batch.references[batch.about[n]]
            assert all(decoder.tokenizer.decode(batch.references[r]) in text for r in table[n])
            assert whole.ids[whole.target_start :] == context.ids[context.target_start :]
            pairs = zip(whole.pointers, context.pointers, strict=True)
            assert [[whole.ids[p] for p in there] for there, _ in pairs] == [[own[p] for p in c] for c in context.pointers]
            assert [whole.ids[p] for p in whole.sentence] == [own[p] for p in context.sentence]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_is_watched_is_the_attention_that_the_model_reports(implementation: str) -> None:
    """Against the weights of transformers' eager attention, of every first query head of a kv head."""
    rows = [[1, *range(40, 60)], [1, *range(70, 80)]]
    places = torch.tensor([[20, 3], [10, 10]])
    with reader(implementation) as decoder:
        layout = decoder.layout(rows, padding_side="right", memory=False)
        watching = Watching((0, 1), places)
        plain = decoder.forward(layout).logits
        assert torch.equal(decoder.forward(layout, watching).logits, plain)
        decoder.detach()
        decoder.model.set_attn_implementation("eager")
        weights = decoder.model(
            input_ids=layout.input_ids, attention_mask=layout.attention_mask, output_attentions=True
        ).attentions
    for layer, found in watching.found.items():
        expected = torch.stack([weights[layer][b, ::2, places[b]].transpose(0, 1) for b in range(2)])
        assert torch.allclose(found, expected, atol=1e-5)


def test_the_loss_of_a_pointer_is_the_logarithm_of_the_mean_that_heads_pay() -> None:
    paid = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]])
    assert float(paid_loss(paid, [(0, 0, [0, 1], 1.0)])) == pytest.approx(-float(torch.tensor((0.8 + 0.2) / 2).log()))
    assert float(paid_loss(paid, [(0, 0, [2], 1.0), (0, 0, [], 5.0)])) == pytest.approx(-float(torch.tensor(0.5).log()))
    assert float(paid_loss(paid, [(0, 0, [], 1.0)])) == 0.0


def test_the_control_learns_its_questions_and_writes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with reader() as decoder:
        objective = PromptedObjective(decoder, [PAGE], [PAGE], (PHASE,))
        monkeypatch.setattr(Decoder, "stack_with_states", lambda *args, **kwargs: pytest.fail("found memory written"))
        plain, asked = Decoder.layout, list[int]()
        monkeypatch.setattr(Decoder, "layout", lambda self, rows, **how: asked.append(len(rows)) or plain(self, rows, **how))
        batch, optimizer = objective.batch(3), torch.optim.Adam(decoder.model.parameters(), 1e-2)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss, figures = objective.loss(decoder, batch, 3)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert {"text_target", "text_exact", "pointer"} <= set(figures)
        assert losses[-1] < losses[0] - 0.5
        assert sum(asked) == 8 * CONTEXTS < 8 * len(batch.contexts)
