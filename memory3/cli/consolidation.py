"""`memory3 consolidate` and `apply`: the most used memories into parameters, and every reference where a plan wants it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory3.cli.common import Device, Dtype, Json, Model, Seed, decoder_of, progress, training

if TYPE_CHECKING:
    from memory3.bank import Bank
    from memory3.decoder import Decoder

MOST_REPLAYED = 2000
"""Of each `--replay`, so many references are taken, the first: a run sees fewer."""


def consolidate(
    bank: Annotated[str, typer.Option(help="Folder of the bank.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapters, one inside for each choice of layers.")],
    model: Model = None,
    ids: Annotated[Path | None, typer.Option(help="File with the ids of the references, one a line.")] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="The most used references, so many, by the recall history of the bank.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of `memory3 plan --out`: what it puts into parameters.")] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="above (above the last memory layer: banks stay readable), all (banks must be rebuilt), or both, to compare."
        ),
    ] = "above",
    replay: Annotated[
        list[str] | None,
        typer.Option(
            help="File or folder of other text to keep; may be given several times. Default the bank's other references."
        ),
    ] = None,
    horizon: Annotated[float, typer.Option(min=0.001, help="Days that the saving is counted for.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    rate: Annotated[float, typer.Option(min=1e-9, help="Peak learning rate.")] = 5e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="References of a step.")] = 8,
    replay_weight: Annotated[float, typer.Option(min=0.0, help="Weight of the replay; 0 goes without, the control.")] = 1.0,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Put the most used memories into parameters, and say what is known before and after, and what it cost."""
    from memory3.bank import Bank
    from memory3.hierarchy.comparison import Options, compared, sides_of
    from memory3.hierarchy.consolidation import LAYERS
    from memory3.spec import SpecError

    if layers not in (*LAYERS, "both"):
        raise SpecError(f"found --layers {layers!r}, expected {', '.join(LAYERS)} or both")
    if sum(choice is not None for choice in (ids, top, plan)) != 1:
        raise SpecError("found no choice of references or several, expected one of --ids, --top and --plan")
    modes = list(LAYERS) if layers == "both" else [layers]
    with training(as_json) as (tell, report), Bank(bank) as opened:
        chosen, uses = _chosen(opened, ids, top, plan, horizon)
        with _lent(model, device) as decoder:
            opened.manifest.check(bank, decoder.identity())
            sides = sides_of(opened, chosen, None if replay is None else _texts(replay, decoder), seed)
        options = Options(out, _named(model), steps, rate, rank, replay_weight, batch, seed)
        made = compared(
            lambda: _lent(model, device), opened, sides, modes, options, uses=uses, days=horizon, tell=tell, report=report
        )
    print(json.dumps(made)) if as_json else _print(made)


def apply(
    plan: Annotated[Path, typer.Argument(help="Plan that `memory3 plan --out` made of this bank.")],
    bank: Annotated[str, typer.Option(help="Folder of the bank.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter of `memory3 consolidate` that knows what is planned for parameters.")
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Bring every reference of a bank into the form that a plan has for it."""
    from dataclasses import asdict

    from memory3.bank import Bank
    from memory3.hierarchy.applying import apply as apply_plan
    from memory3.hierarchy.planning import Plan

    with decoder_of(model, None, device, dtype) as decoder, Bank(bank, decoder) as opened, progress("encoding") as tell:
        done = apply_plan(Plan.load(plan, opened), opened, adapter, tell)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    print(
        f"{done.encoded} texts encoded, {done.dropped} memories are text now ({done.freed_bytes:,} bytes freed), {done.given} references "
        "are in parameters now"
    )
    if done.waiting:
        print(
            f"{done.waiting} references are planned for parameters and stay memories: memory3 consolidate --bank {bank} --plan {plan} "
            "--out DIR, then give --adapter DIR/above"
        )


def _chosen(bank: Bank, ids: Path | None, top: int | None, plan: Path | None, horizon: float) -> tuple[list[str], float | None]:
    """Ids, and the uses that they can expect together where the bank has a history."""
    from memory3.hierarchy.comparison import ids_in, most_used, planned_ids
    from memory3.hierarchy.planning import uses_of
    from memory3.spec import BankError

    if ids is not None:
        chosen = ids_in(ids)
    elif plan is not None:
        chosen = planned_ids(plan, bank)
    else:
        chosen = most_used(bank, top or 1, horizon)
    try:
        expected = uses_of(bank, horizon)
    except BankError:
        return chosen, None
    return chosen, sum(expected.get(id, 0.0) for id in chosen)


def _lent(model: str | None, device: str | None) -> Decoder:
    """In float32: half precision would round most updates away."""
    from memory3.loading import load

    return load(model, device=device, dtype="float32")


def _named(model: str | None) -> str | None:
    """A folder by its full path, so that the adapter finds it from anywhere."""
    return str(Path(model).resolve()) if model is not None and Path(model).is_dir() else model


def _texts(replay: list[str], decoder: Decoder) -> list[str]:
    from memory3.splitting import references

    return [reference.text for source in replay for reference in islice(references(source, decoder), MOST_REPLAYED)]


def _print(made: dict[str, Any]) -> None:
    from memory3.cost import three_digits as digits

    print(
        f"{made['references']} references, {made['tokens']:,} tokens; {made['control']} others as control, {made['replayed']} texts replayed"
    )
    print(f"{'layers':8} {'':20} {'':14} {'count':>6} {'probability':>22} {'exact':>22}")
    for row in made["recall"]:
        if row["count"]:
            figures = " ".join(f"{_with_interval(row, name):>22}" for name in ("probability", "exact"))
            print(f"{row['layers'] or 'before':8} {row['arm']:20} {row['kind']:14} {row['count']:6} {figures}")
    print(f"loss on {made['unrelated']} other texts: {made['unrelated_loss']:.3f} nats a token before")
    for mode in made["modes"]:
        paid, saving = mode["paid"], mode["saving"]
        banks = "banks stay readable" if mode["banks_readable"] else "banks need memory3 bank rebuild"
        print(
            f"{mode['layers']}: {paid['parameters']:,} parameters from layer {paid['first_layer']} on, {mode['adapter']}; {banks}"
        )
        print(f"  loss on the other texts: {mode['unrelated_loss']:.3f}")
        again = f" and {digits(saving['rebuild_flops'])} to write the bank again" if saving["rebuild_flops"] else ""
        print(
            f"  paid {digits(paid['flops'])} FLOP in {paid['steps']} steps, {paid['seconds']:.0f} s, {paid['tokens']:,} tokens{again}"
        )
        print(
            f"  a use saves "
            f"{digits(saving['per_use_flops'])} FLOP and {saving['per_use_bytes']:,} bytes, so {digits(saving['break_even_uses'])} uses "
            f"of each reference pay for it ({digits(saving['break_even_text_uses'])} against text)"
        )
        if saving["flops"] is not None:
            print(
                f"  {digits(made['uses'])} uses expected in {made['days']:g} days save {digits(saving['flops'])} FLOP and {digits(saving['bytes'])} bytes"
            )


def _with_interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"
