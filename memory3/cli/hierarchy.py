"""`memory3 cost`: what each form of knowledge costs, and the cheapest by its use."""

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
    codec_of,
    decoder_of,
    progress,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memory3.cost import Format, Priced, Prices, Timed
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
    from memory3.evaluate.picture import check_picture
    from memory3.hierarchy.sizes import changed

    if out is not None:
        check_picture(out)
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
