"""Write, ask, generate, train, eval, demo: one thin function per command; heavy imports happen inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory3.cli.common import (
    At,
    Banks,
    CodebookFile,
    CodecName,
    Device,
    Dtype,
    Embedder,
    Json,
    MaxTokens,
    MinScore,
    Model,
    RetrieverName,
    Sample,
    Seed,
    TokensPerHead,
    codec_of,
    config_of,
    decoder_of,
    embedder_of,
    progress,
    recall_of,
)
from memory3.spec import Memory3Error

if TYPE_CHECKING:
    from memory3.decoder import Decoder
    from memory3.recall import Recall

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Explicit memory for language models."
)
INCOMPLETE = 3
"""Exit code of a write that left documents out."""


@app.command()
def write(
    sources: Annotated[list[str], typer.Argument(help="Files or folders; - is text on stdin.")],
    bank: Annotated[str, typer.Option(help="Folder of the bank; made where there is none.")],
    model: Model = None,
    tokens_per_head: TokensPerHead = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text, in JSONL, CSV and Parquet.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="References of one forward pass.")] = 64,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop before the folder of the bank grows beyond; with --lazy a lasting limit, under which memories fall back to text.",
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Forget what the bank has of these files that they do not say any more.")
    ] = False,
    context: Annotated[
        bool, typer.Option("--context", help="Encode each document as one sequence: memories see the text before them.")
    ] = False,
    lazy: Annotated[
        bool,
        typer.Option(
            "--lazy",
            help="Store texts alone: each is encoded when it is recalled, and kept where that pays (memory3 bank tiers).",
        ),
    ] = False,
    codec: CodecName = None,
    codebook: CodebookFile = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Encode documents into memories and store them in a bank; exit code 3 where some could not be read."""
    from dataclasses import asdict

    from memory3.bank import Bank
    from memory3.splitting import references
    from memory3.writing import write as write_references

    unreadable: list[Memory3Error] = []
    read: list[str] = []
    with decoder_of(model, tokens_per_head, device, dtype) as decoder:
        # Sources first: a bank is not made for documents that are not there.
        found = references(list(sources), decoder, text_field=text_field, on_unreadable=unreadable.append, on_read=read.append)
        chosen = codec_of(codec, codebook, decoder, model)
        target = Bank(bank, decoder, create=True, codec=chosen, embedder=embedder_of(embedder, bank))
        with target as opened, progress("writing") as tell:
            report = write_references(
                decoder,
                found,
                opened,
                batch_size=batch_size,
                max_bytes=max_bytes,
                read=read,
                update=update,
                context=context,
                lazy=lazy,
                on_progress=tell,
            )
    for error in unreadable:
        print(f"left out: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({**asdict(report), "unreadable": [str(error) for error in unreadable]}, ensure_ascii=False))
    else:
        print(
            f"{report.references} references written, {report.skipped} known already: {report.bytes:,} bytes, "
            f"{report.bytes_per_reference:,} per reference, {report.seconds:.1f} s"
        )
        if update:
            print(f"{report.removed} memories forgotten that these files do not say any more")
        elif report.stale:
            print(f"{report.stale} references are of an earlier state of these files: `--update` forgets them")
    if unreadable:
        raise typer.Exit(INCOMPLETE)


@app.command()
def ask(
    question: Annotated[str | None, typer.Argument(help="The question.")] = None,
    bank: Banks = None,
    model: Model = None,
    questions: Annotated[
        Path | None, typer.Option(help="File with one question a line, as text or as JSON with `question`.")
    ] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Closed book.")] = False,
    text: Annotated[bool, typer.Option("--text", help="The references as plain text in the prompt (RAG).")] = False,
    retriever: RetrieverName = None,
    at: At = None,
    min_score: MinScore = None,
    count: Annotated[int | None, typer.Option(min=1, help="References of one recall; default the spec's.")] = None,
    max_tokens: MaxTokens = 48,
    temperature: Sample = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    tokens_per_head: TokensPerHead = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Answer questions from memory, and say which references were read."""
    from memory3.answering import answer, questions_of
    from memory3.spec import SourceError

    if (question is None) == (questions is None):
        found = "neither a question nor" if question is None else "both a question and"
        raise SourceError(f"found {found} --questions, expected one of them")
    if no_memory and text:
        raise SourceError("found both --no-memory and --text, expected one of them: closed book, or the references as text")
    with decoder_of(model, tokens_per_head, device, dtype) as decoder:
        recall = None if no_memory else recall_of(bank, decoder, at, retriever=retriever, min_score=min_score, count=count)
        options = {"config": config_of(decoder, temperature), "max_new_tokens": max_tokens, "seed": seed}
        if question is not None:
            asked = _ask_one(decoder, question, recall, text, as_json, options)
            _warn_if_silent([asked])
            return
        assert questions is not None
        every = questions_of(questions)
        with progress("answering") as tell:
            for start in range(0, len(every), batch_size):
                documents = answer(decoder, every[start : start + batch_size], recall, as_text=text, **options)
                for made in documents:
                    print(
                        json.dumps(made, ensure_ascii=False) if as_json else f"{made['question']}\t{made['answer']}", flush=True
                    )
                _warn_if_silent(documents)
                tell(min(start + batch_size, len(every)), len(every))


def _ask_one(
    decoder: Decoder, question: str, recall: Recall | None, text: bool, as_json: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Stream one answer, then its citations; or the document alone."""
    from memory3.answering import NOTHING, answer, document, question_prompt, searched
    from memory3.generation import generate

    if as_json or text:
        [made] = answer(decoder, [question], recall, as_text=text, **options)
        print(json.dumps(made, ensure_ascii=False) if as_json else made["answer"])
        if not as_json:
            _print_citations(made)
        return made
    [found] = searched([question], recall, as_text=False)
    if found is not None and not found.hits and not found.known:
        print(NOTHING)
        return document(question, None, found)
    completion, started = None, False
    for token in generate(decoder, question_prompt(decoder, question), recall=recall, effect=recall is not None, **options):
        shown = token.text if started else token.text.lstrip()
        started = started or bool(shown)
        print(shown, end="", flush=True)
        completion = token.completion
    print()
    made = document(question, completion, found)
    _print_citations(made)
    return made


def _print_citations(made: dict[str, Any]) -> None:
    for n, c in enumerate(made["citations"], 1):
        share = "" if c["share"] is None else f"{c['share']:5.0%}  "
        words = " ".join(c["text"].split())
        print(f"  [{n}] {share}{c['source']}:{c['start']}-{c['end']}  {words[:90]}{'…' if len(words) > 90 else ''}")
    memory = made["memory"]
    if memory["logit_shift"] is not None:
        mass = " ".join(f"{layer}:{m:.2f}" for layer, m in memory["attention_mass"].items())
        encoded = f"{memory['encoded']} encoded from text, " if memory["encoded"] else ""
        print(
            f"  memory: {memory['references']} references, {encoded}{memory['bytes_read']:,} bytes read, "
            f"attention mass per layer {mass or '-'}, logit shift {memory['logit_shift']:.3f} nats"
        )


def _warn_if_silent(documents: list[dict[str, Any]]) -> None:
    """The guard against silent ineffectiveness."""
    for made in documents:
        shift = made["memory"]["logit_shift"]
        if shift is not None and not made["memory"]["references"] and not any(r["known"] for r in made["recalls"]):
            print("warning: nothing was recalled: this answer is closed book (--min-score says so instead)", file=sys.stderr)
        if made["memory"]["references"] and shift is not None and shift < 1e-4:
            print(
                f"warning: the recalled memories changed nothing (logit shift {shift:.1e} nats): this model does not read memory; "
                "train it with `memory3 train`, or use --text",
                file=sys.stderr,
            )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - is stdin.")],
    bank: Banks = None,
    model: Model = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Without recall.")] = False,
    retriever: RetrieverName = None,
    at: At = None,
    min_score: MinScore = None,
    max_tokens: MaxTokens = 128,
    temperature: Sample = None,
    seed: Seed = 0,
    tokens_per_head: TokensPerHead = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Continue a text, recalling every 64 tokens."""
    from memory3.answering import document
    from memory3.generation import generate as stream_one

    text = sys.stdin.read() if prompt == "-" else prompt
    with decoder_of(model, tokens_per_head, device, dtype) as decoder:
        recall = None if no_memory else recall_of(bank, decoder, at, retriever=retriever, min_score=min_score)
        completion = None
        options = {"config": config_of(decoder, temperature), "max_new_tokens": max_tokens, "seed": seed}
        for token in stream_one(decoder, text, recall=recall, effect=recall is not None, **options):
            if not as_json:
                print(token.text, end="", flush=True)
            completion = token.completion
        made = document(text, completion, None)
        made["prompt"] = made.pop("question")
        made["text"] = completion.text if completion else made["answer"]
        del made["answer"]
        print(json.dumps(made, ensure_ascii=False) if as_json else "")
        if not as_json:
            _print_citations(made)
        _warn_if_silent([made])


@app.command()
def demo(
    notes: Annotated[Path, typer.Option(help="Documents of the bank.")] = Path("examples/notes"),
    questions: Annotated[Path, typer.Option(help="JSONL with question and answers.")] = Path("examples/questions.jsonl"),
    bank: Annotated[Path, typer.Option(help="Folder of the bank.")] = Path("demo-bank"),
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write a bank from the notes, ask ten questions with and without memory, draw what one answer read."""
    from memory3.evaluate.demo import run_demo

    with decoder_of(model, None, device, dtype) as decoder:
        run_demo(decoder, notes, questions, bank, picture)
