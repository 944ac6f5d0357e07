"""`memory3 cost`, `plan` and `simulate`: what each form of knowledge costs, the cheapest for its use, and use played over time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory3.cli.common import (
    CodebookFile,
    CodecName,
    Device,
    Dtype,
    Json,
    Model,
    TokensPerHead,
    check_picture_file,
    codec_of,
    decoder_of,
    progress,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memory3.cost import Format, Priced, Prices, Timed
    from memory3.hierarchy.planning import Plan, Text
    from memory3.hierarchy.sizes import Sizes

Rank = Annotated[int | None, typer.Option(min=1, help="Rank of adapters: low-rank training as a further format.")]
Passes = Annotated[int, typer.Option(min=1, help="Times that training sees a reference; the paper counts one.")]
TrainLength = Annotated[int, typer.Option(min=1, help="Tokens of a training sequence.")]
Together = Annotated[int, typer.Option("--references", min=1, help="Texts that stand in one prompt; the paper counts one.")]
PriceHour = Annotated[float | None, typer.Option(min=0.0, help="Price of an hour of the machine: costs in money.")]
PriceGbMonth = Annotated[float, typer.Option(min=0.0, help="Price of keeping 1e9 bytes for 30 days.")]
Tflops = Annotated[
    float | None, typer.Option(min=0.0, help="What the machine computes, in 1e12 FLOPs a second: costs in seconds.")
]
Picture = Annotated[Path | None, typer.Option("--out", help="Picture to draw: .png, .svg, .pdf.")]


def cost(
    model: Model = None,
    preset: Annotated[str | None, typer.Option(help="Sizes of the paper instead of a model: paper-2.4b or paper-0.9b.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="JSON of a MemorySpec: which layers and heads; default the model's.")
    ] = None,
    tokens_per_head: TokensPerHead = None,
    reference_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a reference.")] = None,
    chunk_length: Annotated[int | None, typer.Option(min=1, help="Tokens that read it.")] = None,
    references: Together = 1,
    codec: CodecName = None,
    codebook: CodebookFile = None,
    rank: Rank = None,
    train_length: TrainLength = 2048,
    passes: Passes = 1,
    measured: Annotated[bool, typer.Option("--measured", help="Seconds and bytes of this machine instead of FLOPs.")] = False,
    tflops: Tflops = None,
    price_hour: PriceHour = None,
    price_gb_month: PriceGbMonth = 0.0,
    days: Annotated[float, typer.Option(min=0.001, help="With prices, how long knowledge is kept.")] = 365.0,
    batch: Annotated[int, typer.Option(min=1, help="With --measured, references handled together.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Say what text, memory and parameters cost to write and to read, and for how many uses each is cheapest."""
    from memory3.cost import formats, intervals
    from memory3.hierarchy.sizes import changed

    check_picture_file(out)
    _check_units(preset, measured, tflops, price_hour, price_gb_month, rank)
    sizes = changed(
        _sizes(model, preset, spec),
        tokens_per_head=tokens_per_head,
        reference_length=reference_length,
        chunk_length=chunk_length,
    )
    chosen = sizes.codec(codec or "raw", codebook)
    if measured:
        found: Sequence[Format | Timed] = _measured(sizes, model, codec, codebook, batch, passes, device, dtype)
    else:
        found = formats(
            sizes.shape,
            sizes.spec,
            record_bytes=sizes.record_bytes(chosen),
            rank=rank,
            references=references,
            train_length=train_length,
            passes=passes,
        )
    prices = None if price_hour is None else _prices(price_hour, price_gb_month, days)
    costs, unit = in_unit(found, tflops, prices)
    made = {
        "model": preset or sizes.name,
        "shape": vars(sizes.shape),
        "memory_layers": len(sizes.spec.layers or ()),
        "memory_heads": sizes.spec.pairs,
        "tokens_per_head": sizes.spec.slots,
        "reference_length": sizes.spec.reference_length,
        "chunk_length": sizes.spec.chunk_length,
        "codec": chosen.name,
        "unit": unit,
        "formats": [
            {"name": f.name, "write": c.write, "read": c.read, "bytes": f.bytes} for f, c in zip(found, costs, strict=True)
        ],
        "intervals": [
            {"name": i.name, "least": i.least, "most": None if i.most == float("inf") else i.most} for i in intervals(costs)
        ],
    }
    if out is not None:
        from memory3.hierarchy.picture import draw_costs

        draw_costs(costs, unit, _title(made), out)
    print(json.dumps(made)) if as_json else _print_costs(made)


def _check_units(
    preset: str | None, measured: bool, tflops: float | None, hour: float | None, gb_month: float, rank: int | None
) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    from memory3.spec import SpecError

    if measured and (preset is not None or tflops is not None or rank is not None):
        other = "--preset" if preset is not None else "--tflops" if tflops is not None else "--rank"
        raise SpecError(
            f"found --measured with {other}, expected it alone: a model's text, memory and full training are measured"
        )
    if hour is not None and not measured and not tflops:
        raise SpecError("found --price-hour alone, expected --measured or --tflops with it: how long the machine works")
    if gb_month and hour is None:
        raise SpecError("found --price-gb-month alone, expected --price-hour with it: storage is weighed against work")


def _sizes(model: str | None, preset: str | None, spec: Path | None) -> Sizes:
    from memory3.cost import preset as preset_shape
    from memory3.hierarchy.sizes import Sizes, sizes_of
    from memory3.spec import MemorySpec, SpecError

    given = None if spec is None else spec_of(spec)
    if preset is None:
        return sizes_of(model, given)
    if model is not None:
        raise SpecError(f"found both --model {model} and --preset {preset}, expected one of them")
    shape = preset_shape(preset)
    return Sizes(preset, shape, (given or MemorySpec()).resolved(shape.layers, shape.kv_heads))


def _measured(
    sizes: Sizes,
    model: str | None,
    codec: str | None,
    codebook: Path | None,
    batch: int,
    passes: int,
    device: str | None,
    dtype: str | None,
) -> Sequence[Timed]:
    from memory3.hierarchy.measuring import measured_formats

    with decoder_of(model, None, device, dtype) as decoder, progress("measuring") as tell:
        reading = decoder.using(sizes.spec)
        return measured_formats(reading, codec_of(codec, codebook, reading, model), batch=batch, passes=passes, tell=tell)


def _prices(hour: float, gb_month: float, days: float) -> Prices:
    from memory3.cost import Prices

    return Prices(hour, gb_month, days)


def in_unit(
    found: Sequence[Format | Timed], tflops: float | None, prices: Prices | None
) -> tuple[Sequence[Format | Timed | Priced], str]:
    """The formats in FLOPs, seconds or money, and the name of the unit."""
    from memory3.cost import Format, timed

    seconds = [timed(f, 1e12 * tflops) if isinstance(f, Format) and tflops else f for f in found]
    if prices is not None:
        return [prices.of(s) for s in seconds if not isinstance(s, Format)], "money"
    return seconds, "FLOP" if isinstance(seconds[0], Format) else "s"


def _title(made: dict[str, Any]) -> str:
    return (
        f"{made['model']}: {made['memory_heads']} memory heads in {made['memory_layers']} layers, "
        f"{made['tokens_per_head']} of {made['reference_length']} tokens, codec {made['codec']}"
    )


def _print_costs(made: dict[str, Any]) -> None:
    from memory3.cost import three_digits as digits

    where = {i["name"]: i for i in made["intervals"]}
    print(_title(made))
    print(f"{'':12} {'write, ' + made['unit']:>14} {'read, ' + made['unit']:>14} {'bytes':>10}  cheapest for uses")
    for row in made["formats"]:
        part, uses = where.get(row["name"]), "never"
        if part is not None:
            end = "on" if part["most"] is None else f"to {digits(part['most'])}"
            uses = f"from {digits(part['least'])} {end}"
        print(f"{row['name']:12} {digits(row['write']):>14} {digits(row['read']):>14} {row['bytes']:10,}  {uses}")


def plan(
    bank: Annotated[str, typer.Option(help="Folder of the bank.")],
    model: Model = None,
    uses: Annotated[
        Path | None,
        typer.Option(help='Expected uses, {"id": "…", "uses": 3} a line; by default from the recall history of the bank.'),
    ] = None,
    horizon: Annotated[float, typer.Option(min=0.001, help="Days to plan for.")] = 30.0,
    half_life: Annotated[
        float | None, typer.Option(help="First set the half-life of this bank's recalls, in days; the bank keeps it.")
    ] = None,
    written: Annotated[
        bool, typer.Option("--written", help="Memories of the bank are paid for: only what is still to come counts.")
    ] = False,
    references: Together = 1,
    rank: Rank = None,
    train_length: TrainLength = 2048,
    passes: Passes = 1,
    tflops: Tflops = None,
    price_hour: PriceHour = None,
    price_gb_month: PriceGbMonth = 0.0,
    out: Annotated[Path | None, typer.Option(help="Plan to write, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Picture to draw: .png, .svg, .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Find the cheapest form of every reference of a bank for the uses that it can expect."""
    from memory3.bank import Bank
    from memory3.hierarchy.planning import plan as plan_bank
    from memory3.hierarchy.planning import texts_of, uses_in, uses_of
    from memory3.hierarchy.sizes import sizes_of_bank

    check_picture_file(picture)
    _check_units(None, False, tflops, price_hour, price_gb_month, None)
    prices = None if price_hour is None else _prices(price_hour, price_gb_month, horizon)
    options = {"references": references, "rank": rank, "train_length": train_length, "passes": passes}
    with Bank(bank) as opened:
        sizes = sizes_of_bank(opened, model)
        if half_life is not None:
            opened.uses.set_half_life(half_life)
        texts = texts_of(opened)
        expected = uses_of(opened, horizon) if uses is None else uses_in(uses, texts)
        created, record_bytes, kept = opened.manifest.created, opened.record_bytes, opened.places()
    unit = "money" if prices else "s" if tflops else "FLOP"

    def forms(text: Text) -> Sequence[Format | Timed | Priced]:
        return in_unit(_forms(sizes, text, record_bytes, written and text.id in kept, options), tflops, prices)[0]

    made = plan_bank(texts, expected, forms, bank=created, days=horizon, unit=unit)
    if out is not None:
        made.save(out)
    if picture is not None:
        from memory3.hierarchy.picture import draw_plan

        draw_plan(made, f"{bank}: {len(texts):,} references", picture)
    print(json.dumps(_planned(made))) if as_json else _print_plan(made)


def _forms(sizes: Sizes, text: Text, record_bytes: int, written: bool, options: dict[str, Any]) -> list[Format]:
    from dataclasses import replace

    from memory3.cost import formats

    spec = replace(sizes.spec, reference_length=max(1, text.tokens))
    found = formats(sizes.shape, spec, record_bytes=record_bytes, text_bytes=text.bytes, **options)
    return [replace(f, write_flops=0.0) if written and f.name == "memory" else f for f in found]


def _planned(made: Plan) -> dict[str, Any]:
    return {
        "unit": made.unit,
        "days": made.days,
        "references": len(made.references),
        "uses": sum(r.uses for r in made.references),
        "cost": made.planned,
        "tiers": [
            {"name": name, "references": count, "uses": uses, "cost_of_all": made.alone[name]}
            for name, (count, uses) in made.tiers.items()
        ],
    }


def _print_plan(made: Plan) -> None:
    from memory3.cost import three_digits as digits

    print(f"{'':12} {'references':>10} {'uses':>12} {'all so, ' + made.unit:>16}")
    for name, (count, uses) in made.tiers.items():
        print(f"{name:12} {count:10,} {digits(uses):>12} {digits(made.alone[name]):>16}")
    print(f"the plan costs {digits(made.planned)} {made.unit} over {made.days:g} days; the most used:")
    for row in made.references[:5]:
        print(f"  {row.id}  {digits(row.uses):>8} uses  {row.tier}")


def simulate(
    bank: Annotated[str | None, typer.Option(help="Bank whose references and records are played; default made up.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Uses to play, `time` and `id` a row (.jsonl, .csv, .parquet); default Zipf with drift.")
    ] = None,
    references: Annotated[int, typer.Option(min=1, help="Without a bank or trace, references.")] = 1000,
    uses: Annotated[int, typer.Option(min=1, help="Without a trace, uses of it.")] = 20_000,
    exponent: Annotated[float, typer.Option(min=0.0, help="Without a trace, exponent of Zipf's law.")] = 1.0,
    drift: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Without a trace, chance per use that two references change ranks.")
    ] = 0.01,
    days: Annotated[float, typer.Option(min=0.001, help="Without a trace, its length.")] = 120.0,
    model: Model = None,
    preset: Annotated[str | None, typer.Option(help="Sizes of the paper instead of a model: paper-2.4b or paper-0.9b.")] = None,
    codec: CodecName = None,
    codebook: CodebookFile = None,
    rank: Rank = None,
    budget: Annotated[float, typer.Option(help="Part of the bank's memories that may be kept.")] = 0.1,
    passes: Annotated[
        float, typer.Option(help="Times that training sees a reference until it is known; a burden of its own.")
    ] = 50.0,
    measured: Annotated[bool, typer.Option("--measured", help="Seconds of this machine instead of FLOPs.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="With --measured, references handled together.")] = 16,
    price_hour: Annotated[float, typer.Option(help="Price of an hour of the machine.")] = 2.0,
    price_gb_month: PriceGbMonth = 0.08,
    tflops: Annotated[float, typer.Option(help="What the machine computes, in 1e12 FLOPs a second.")] = 400.0,
    half_life: Annotated[float, typer.Option(help="Adaptive: days in which a use loses half of its weight.")] = 30.0,
    horizon: Annotated[float, typer.Option(help="Adaptive: days over which a consolidation has to pay.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of the trace.")] = 0,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Play a trace of use over a bank: adaptive tiers beside single formats, LRU, lazy encoding and the offline optimum."""
    from memory3.bank import Bank
    from memory3.cost import formats
    from memory3.hierarchy.policies import Adaptive
    from memory3.hierarchy.simulation import document, headed, settings
    from memory3.hierarchy.simulation import simulate as play
    from memory3.hierarchy.sizes import sizes_of_bank
    from memory3.hierarchy.trace import read_trace, zipf
    from memory3.tiers import costs_of, rent_of

    check_picture_file(out)
    _check_units(preset, measured, None, None, 0.0, rank)
    policy = Adaptive(half_life, horizon)
    if bank is None:
        sizes = _sizes(model, preset, None)
        record_bytes, count = sizes.record_bytes(sizes.codec(codec or "raw", codebook)), None
    else:
        with Bank(bank) as opened:
            sizes, record_bytes, count = sizes_of_bank(opened, model), opened.record_bytes, len(opened)
    if measured:
        found: Sequence[Format | Timed] = _measured(sizes, model, codec, codebook, batch, 1, None, None)
    else:
        found = formats(sizes.shape, sizes.spec, record_bytes=record_bytes, rank=rank)
    rent, head = rent_of(record_bytes, price_gb_month, price_hour, 1e-12 if measured else tflops), None
    if trace is not None:
        played = read_trace(trace, count)
    else:
        made: dict[str, Any] = {"drift": drift, "days": days, "seed": seed}
        played = zipf(count or references, uses, exponent=exponent, **made)
        head = headed(count or references, uses, costs_of(found), **made)
    with progress("playing") as tell:
        outcomes = list(play(settings(found, played, rent=rent, passes=passes, share=budget, head=head), policy, tell))
    if out is not None:
        from memory3.hierarchy.curves import draw_simulation

        draw_simulation(outcomes, *(("s", 1.0) if measured else ("TFLOP", 1e12)), out)
    result = {
        "model": preset or sizes.name,
        "unit": "s" if measured else "FLOP",
        "record_bytes": record_bytes,
        "half_life_days": half_life,
        "horizon_days": horizon,
        "seed": None if trace else seed,
    } | document(outcomes)
    print(json.dumps(result)) if as_json else _print_simulation(result)


def _print_simulation(made: dict[str, Any]) -> None:
    from memory3.cost import three_digits as digits

    print(f"costs in {made['unit']}; ratio to the optimum: {made['algorithm']}")
    for setting in made["settings"]:
        room = "no limit" if setting["slots"] is None else f"room for {setting['slots']:,}"
        best = setting["optimum"]
        print(f"\n{setting['name']}: {setting['uses']:,} uses of {setting['references']:,} references, {room}")
        print(
            f"{'':15} {'cost':>10} {'ratio':>7} {'reading':>10} {'encoding':>10} {'storage':>10} {'consolidation':>13} {'inside':>7}"
        )
        print(f"{'optimum':15} {digits(best['bound']):>10} {1:7.3f} {'':>46} {best['consolidated']:7,}")
        for line in setting["lines"]:
            paid = " ".join(f"{digits(line[kind]):>10}" for kind in ("reading", "encoding", "storage"))
            print(
                f"{line['policy']:15} {digits(line['cost']):>10} {line['ratio']:7.3f} {paid} "
                f"{digits(line['consolidation']):>13} {line['consolidated']:7,}"
            )
