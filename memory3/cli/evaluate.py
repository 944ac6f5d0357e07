"""`memory3 eval …`: one thin function per measurement; heavy imports happen inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory3.cli.common import (
    Banks,
    Device,
    Dtype,
    Embedder,
    EmbedderDtype,
    Json,
    Model,
    RetrieverName,
    Seed,
    check_files,
    check_picture_file,
    decoder_of,
    progress,
    recall_of,
    training,
)

if TYPE_CHECKING:
    from memory3.embedding import SentenceEmbedder

eval_app = typer.Typer(no_args_is_help=True, help="Measure reading, retrieval, speed and choices, each beside its control.")

Folder = Annotated[Path, typer.Option("--data", help="Folder with qa.parquet (and passages.parquet).")]
Limit = Annotated[int, typer.Option(min=1, help="Most questions.")]
Picture = Annotated[Path | None, typer.Option(help="Picture of the table.")]
Work = Annotated[Path, typer.Option(help="Where tables of passages are kept, to go on or to measure again.")]
Overlap = Annotated[
    bool, typer.Option("--overlap-filter/--no-overlap-filter", help="Drop references that repeat the text that is asked.")
]
WORK = Path("runs/retrieval")


def _reading(what: str, doc: str) -> Callable[..., None]:
    """A measurement on dev questions whose gold reference is given."""

    def command(
        data: Folder,
        model: Model = None,
        limit: Limit = 500,
        out: Picture = None,
        seed: Seed = 0,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        from memory3.evaluate.reading import measure

        check_picture_file(out)
        with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
            measure(decoder, data, what, limit, out, seed, tell)

    command.__doc__ = doc
    return command


for _name, _doc in {
    "reading": "Each format on dev questions, the gold reference among others.",
    "slots": "The curve over tokens per head.",
    "selections": "Each selection at the model's own budget.",
    "context": "Writing in context beside plain writing.",
}.items():
    eval_app.command(_name)(_reading(_name, _doc))


@eval_app.command()
def heads(
    data: Folder,
    model: Model = None,
    limit: Limit = 500,
    out: Annotated[Path | None, typer.Option(help="File of the chosen heads.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Which heads find references by their own attention."""
    from memory3.evaluate.heads import measure_heads

    check_files(out)
    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        measure_heads(decoder, data, limit, out, seed, tell)


@eval_app.command()
def retrieval(
    data: Folder,
    model: Model = None,
    limit: Annotated[
        int, typer.Option(min=1, help="internal: most questions of each dataset; the others are asked all.")
    ] = 500,
    out: Picture = None,
    work: Work = WORK,
    retriever: Annotated[list[str] | None, typer.Option(help="Only these; by default all.")] = None,
    embedder: Embedder = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Is the right reference found among all passages?"""
    from memory3.evaluate.retrieval import measure_retrieval

    check_picture_file(out)
    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        found = measure_retrieval(decoder, data, work, _embedder(embedder, device, dtype), retriever, limit, tell)
    if out is not None:
        from memory3.evaluate.picture import draw_retrieval

        draw_retrieval(found, out)


@eval_app.command()
def found(
    data: Folder,
    model: Model = None,
    limit: Limit = 300,
    work: Work = WORK,
    retriever: RetrieverName = None,
    count: Annotated[int | None, typer.Option(min=1, help="References; by default the spec's.")] = None,
    embedder: Embedder = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Answers from references that are found among all passages, in the tables of `eval retrieval`, beside gold ones."""
    from memory3.evaluate.found import measure_found

    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        searching = _embedder(embedder, device, dtype)
        measure_found(decoder, data, work, searching, retriever or "hybrid", limit, count, seed, tell)


@eval_app.command()
def fusion(
    data: Folder,
    model: Model = None,
    limit: Limit = 500,
    work: Work = WORK,
    embedder: Embedder = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """The constant of reciprocal rank fusion, on train questions."""
    from memory3.evaluate.fusion import measure_fusion

    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        measure_fusion(decoder, data, work, _embedder(embedder, device, dtype), limit, seed, tell)


@eval_app.command()
def ann(
    data: Folder,
    limit: Annotated[int, typer.Option(min=1, help="Vectors.")] = 500,
    work: Work = WORK,
    embedder: Embedder = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: EmbedderDtype = None,
) -> None:
    """The approximate index at --limit vectors, beside exact search."""
    from memory3.evaluate.ann import measure_ann

    with progress("measuring") as tell:
        measure_ann(data, work, _embedder(embedder, device, dtype), limit, seed, tell)


def _embedder(name: str | None, device: str | None, dtype: str | None) -> SentenceEmbedder:
    from memory3.embedding import OFFLINE, SentenceEmbedder

    return SentenceEmbedder(name or OFFLINE, device, dtype or "float32")


def _arms(task: str, doc: str) -> Callable[..., None]:
    """A benchmark in every arm, with the same references."""

    def command(
        data: Annotated[str, typer.Option(help="File or folder (Parquet, JSONL, CSV), or hub:NAME.")],
        bank: Banks = None,
        gold: Annotated[
            bool, typer.Option("--gold", help="The passage of each row among those of others, instead of a bank.")
        ] = False,
        retriever: RetrieverName = None,
        count: Annotated[int | None, typer.Option(min=1, help="References; by default the spec's.")] = None,
        overlap: Overlap = True,
        split: Annotated[str | None, typer.Option(help="Only rows of this split; by default all but train.")] = None,
        dataset: Annotated[list[str] | None, typer.Option(help="Only rows of this dataset; may be given often.")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Most questions, or stretches of text.")] = None,
        length: Annotated[int | None, typer.Option(min=2, help="lm: tokens of a stretch, by default 512.")] = None,
        untrained: Annotated[
            str, typer.Option(help="Model before training: a folder, `random` weights of the same shape, or `none`.")
        ] = "random",
        out: Picture = None,
        model: Model = None,
        seed: Seed = 0,
        device: Device = None,
        dtype: Dtype = None,
        as_json: Json = False,
    ) -> None:
        from memory3.evaluate.outcomes import document
        from memory3.evaluate.qa import Settings, measure_arms, report
        from memory3.remote import open_bank

        _check_arms(task, gold, retriever, dataset, length)
        check_picture_file(out)
        with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
            settings = Settings(
                data,
                [open_bank(address, decoder) for address in bank or ()],
                gold,
                retriever,
                count,
                _most_overlap(overlap),
                split,
                tuple(dataset or ()),
                limit,
                length or Settings.length,
                seed,
                None if untrained == "none" else untrained,
            )
            outcomes = measure_arms(task, decoder, settings, tell)
            model = decoder.name
        found = {"task": task, "model": model, "settings": settings.facts(), "arms": document(outcomes)}
        print(json.dumps(found) if as_json else report(task, settings, outcomes))
        if out is not None:
            report(task, settings, outcomes, out)

    command.__doc__ = doc
    return command


def _check_arms(task: str, gold: bool, retriever: str | None, dataset: list[str] | None, length: int | None) -> None:
    """Refuse options that would be ignored."""
    from memory3.spec import SourceError

    if gold and retriever:
        raise SourceError("found both --gold and --retriever, expected one of them: gold references are not searched for")
    if task == "lm" and dataset:
        raise SourceError("found --dataset for lm, expected none: it reads all text of --data, or of one --split")
    if task != "lm" and length:
        raise SourceError(f"found --length for {task}, expected none: questions are asked whole")


for _name, _doc in {
    "qa": "Questions in every arm: exact match and F1, or accuracy where rows have choices.",
    "lm": "Bits per byte of held-out text in every arm; a chunk reads what the chunk before recalled.",
    "factor": "One true and three false completions: accuracy by likelihood, in every arm.",
    "halueval": "Right against hallucinated answers: accuracy by likelihood, in every arm.",
}.items():
    eval_app.command(_name)(_arms(_name, _doc))


@eval_app.command()
def use(
    prompts: Annotated[Path, typer.Argument(help="File with one prompt a line.")],
    bank: Banks = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each.")] = 256,
    retriever: RetrieverName = None,
    overlap: Overlap = True,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """On long generations: is memory used after the first chunk?"""
    from memory3.answering import questions_of
    from memory3.evaluate.use import use_by_chunk, use_table

    with decoder_of(model, None, device, dtype) as decoder, progress("generating") as tell:
        recall = recall_of(bank, decoder, retriever=retriever, max_overlap=_most_overlap(overlap), counted=False)
        found = use_by_chunk(decoder, questions_of(prompts), recall, tokens=tokens, tell=tell)
    print(use_table(found))


def _most_overlap(filtered: bool) -> float | None:
    from memory3.recall import EVALUATION_OVERLAP

    return EVALUATION_OVERLAP if filtered else None


@eval_app.command()
def speed(
    length: Annotated[int, typer.Option(min=1, help="Tokens of a training sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a training step.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 5,
    model: Model = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """A continual step beside a warmup step; decoding and the rest is in `memory3 bench`."""
    from memory3.evaluate.speed import measure_speed

    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        measure_speed(decoder, length=length, batch=batch, repeats=repeats, seed=seed, tell=tell)


@eval_app.command()
def masking(
    data: Annotated[Path, typer.Option(help="Folder with qa.parquet: questions far from their answers.")],
    keep: Annotated[float, typer.Option(help="Heads to keep: a number of them, or a share below 1.")] = 0.5,
    window: Annotated[int, typer.Option(min=1, help="Tokens farther than this are hidden.")] = 64,
    out: Annotated[Path | None, typer.Option(help="File for the memory spec that keeps the best heads.")] = None,
    limit: Limit = 200,
    model: Model = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Choose memory heads by what hiding distant tokens from each costs (Remark 4)."""
    from memory3.evaluate.masking import measure_masking, question_samples

    check_files(out)
    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        samples = question_samples(decoder, data, limit, seed, window)
        measure_masking(decoder, samples, int(keep) if keep.is_integer() else keep, out, window, tell)


@eval_app.command()
def utility(
    questions: Annotated[Path, typer.Argument(help="JSONL with question and answers, or a text file.")],
    bank: Banks = None,
    out: Annotated[Path | None, typer.Option(help="JSON of the ranking.")] = None,
    drop: Annotated[Path | None, typer.Option(help="Ids below --least, one a line, for `bank delete`.")] = None,
    least: Annotated[float, typer.Option(help="Least utility, in nats per token.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most uses.")] = None,
    retriever: RetrieverName = None,
    overlap: Overlap = True,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Rank the references of a bank by what they are worth to questions or a text (Remark 7)."""
    from memory3.evaluate.utility import measure_utility

    check_files(out, drop)
    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        recall = recall_of(bank, decoder, retriever=retriever, max_overlap=_most_overlap(overlap), counted=False)
        measure_utility(decoder, recall, questions, out, drop, least, limit, tell)


@eval_app.command()
def ablation(
    name: Annotated[str, typer.Argument(help="warmup, layers, tokens, selection, references or chunk.")],
    data: Annotated[list[str], typer.Option(help="Folder with qa.parquet; for warmup and chunk documents.")],
    out: Annotated[Path | None, typer.Option(help="Folder of table, values, picture and checkpoints.")] = None,
    bank: Annotated[str | None, typer.Option(help="chunk: whose references are recalled.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most questions, or stretches of text; by default 300, for warmup 64.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train each variant for so many steps.")] = None,
    tokens_per_head: Annotated[int | None, typer.Option(min=1, help="layers, selection: of the trained readers.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="warmup: depth of the model, by default 4.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Most wall time of the trainings of this call.")] = None,
    text_field: Annotated[
        str | None, typer.Option(help="warmup, chunk: field or column that holds the text, by default text.")
    ] = None,
    model: Model = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """What one choice of the method is worth, its alternatives side by side; an option that does not apply is refused."""
    from memory3.evaluate.ablations import Inputs, measure_ablation
    from memory3.loading import load

    with training(as_json=True) as (preparing, report), progress("measuring") as tell:
        inputs = Inputs(
            tuple(data),
            out,
            bank,
            limit,
            steps,
            tokens_per_head,
            size=size,
            minutes=minutes,
            seed=seed,
            text_field=text_field,
            model=model,
            device=device,
            dtype=dtype,
            tell=tell,
            preparing=preparing,
            report=report,
        )
        measure_ablation(name, lambda: load(model, device=device, dtype=dtype), inputs)


@eval_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def harness(context: typer.Context) -> None:
    """lm-evaluation-harness with `--model memory3`; everything behind goes to `lm_eval`."""
    from memory3.evaluate.harness import run_harness

    run_harness(context.args)
