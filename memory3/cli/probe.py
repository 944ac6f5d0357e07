"""`memory3 probe …`: knowledge made testable, one thin function per question; heavy imports happen inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memory3.cli.common import (
    Banks,
    Device,
    Dtype,
    Json,
    Model,
    RetrieverName,
    Seed,
    check_picture_file,
    config_of,
    decoder_of,
    progress,
    recall_of,
)

probe_app = typer.Typer(
    no_args_is_help=True, help="Which facts can be taken from memory, which heads copy, what carried an answer (docs/probe.md)."
)


@probe_app.command()
def facts(
    file: Annotated[Path, typer.Argument(help="JSONL, one fact a line: id, relation, text, realizations.")],
    without: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Unknown: some token of every realization is at most this likely.")
    ] = 0.5,
    given: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Served: every token behind a prefix is at least this likely.")
    ] = 0.9,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Which facts are separable, imitable, specific: with no prefix, their text, another realization, their memory."""
    from memory3.probe.facts import facts_of
    from memory3.probe.knowledge import Thresholds, described, document, judged, table

    thresholds, read = Thresholds(without, given), facts_of(file)
    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        verdicts = judged(decoder, read, thresholds, tell)
        name = decoder.name
    if as_json:
        print(json.dumps(document(verdicts, name), ensure_ascii=False))
        return
    print("\n".join(map(described, verdicts)))
    print(f"\n{table(verdicts)}")


@probe_app.command()
def heads(
    pattern: Annotated[str, typer.Option(help="induction, or previous: the edges that are cut.")] = "induction",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a random text, which stands twice.")] = 24,
    texts: Annotated[int, typer.Option(min=1, help="Random texts.")] = 8,
    model: Model = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Find the induction heads of a model by what cutting their edges costs."""
    from memory3.probe.heads import document, heads_of, table

    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        found = heads_of(decoder, pattern, length=length, texts=texts, seed=seed, tell=tell)
        name = decoder.name
    print(json.dumps(document(found, name, length, seed)) if as_json else table(found))


@probe_app.command()
def answer(
    question: Annotated[str, typer.Argument(help="The question.")],
    bank: Banks = None,
    out: Annotated[Path | None, typer.Option(help="Picture of the subgraph.")] = None,
    retriever: RetrieverName = None,
    count: Annotated[int | None, typer.Option(min=1, help="References of one recall; default the spec's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 16,
    edges: Annotated[int, typer.Option(min=1, help="Most single edges from memory, and as many inside the context.")] = 24,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Answer a question from memory, and say which memory heads and attention edges carried the answer."""
    from memory3.probe.answers import circuit_of, described, document

    check_picture_file(out)
    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        recall, config = recall_of(bank, decoder, retriever=retriever, count=count, counted=False), config_of(decoder, None)
        found = circuit_of(decoder, question, recall, config=config, max_new_tokens=max_tokens, edges=edges, tell=tell)
        name = decoder.name
    print(json.dumps(document(found, name), ensure_ascii=False) if as_json else described(found))
    if out is not None:
        from memory3.probe.picture import draw_circuit

        draw_circuit(found, out)
