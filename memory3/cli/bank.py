"""`memory3 bank …`: look at a bank, take things out of it, check it, move it. Only `rebuild` needs a model."""

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
    Embedder,
    EmbedderDtype,
    Json,
    Model,
    TokensPerHead,
    codec_of,
    decoder_of,
    progress,
)

if TYPE_CHECKING:
    from memory3.bank import Bank

bank_app = typer.Typer(no_args_is_help=True, help="Look at a bank, forget, check, compact, export and import.")
FAULTY = 4
"""Exit code of a verify that found something."""

Address = Annotated[
    str, typer.Argument(metavar="BANK", help="Folder of the bank, or its address on object storage: s3://BUCKET/PATH.")
]
Folder = Annotated[str, typer.Argument(metavar="BANK", help="Folder of the bank.")]
Where = Annotated[str | None, typer.Option(help="SQL on the columns id, text, tokens and created: \"text LIKE '%tower%'\".")]


@bank_app.command()
def stats(bank: Address, as_json: Json = False) -> None:
    """Say what is in a bank and what it weighs."""
    from memory3.remote import open_bank
    from memory3.tiers import report

    with open_bank(bank) as opened:
        found = opened.stats() | report(opened)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if name != "tiers":
            print(f"{name:20} {value:,}" if isinstance(value, int) else f"{name:20} {value}")
    _print_tiers(found)


@bank_app.command()
def tiers(
    bank: Folder,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=0, help="Most bytes of the folder: memories that save least fall back to text. 0: no limit."),
    ] = None,
    price_gb_month: Annotated[
        float | None, typer.Option(min=0.0, help="Price of keeping 1e9 bytes for 30 days: memories that save less fall back.")
    ] = None,
    price_hour: Annotated[float | None, typer.Option(min=0.0, help="Price of an hour of the machine.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.0, help="What that machine computes, in 1e12 FLOPs a second.")] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Say what is kept as text, as memory and in parameters and what that saved; set the limits that decide it."""
    from dataclasses import replace

    from memory3.bank import Bank
    from memory3.hierarchy.sizes import sizes_of_bank
    from memory3.spec import SpecError
    from memory3.tiers import Settings, limit, rent_of, report

    prices = (price_gb_month, price_hour, tflops)
    if any(p is not None for p in prices) and not all(p is not None for p in prices):
        raise SpecError("found a part of the prices, expected --price-gb-month, --price-hour and --tflops together")
    with Bank(bank) as opened:
        wanted, fallen = Settings.load(opened.path), None
        if max_bytes is not None:
            wanted = replace(wanted, max_bytes=max_bytes or None)
        if price_gb_month is not None and price_hour is not None and tflops is not None:
            shape = wanted.shape or sizes_of_bank(opened, model).shape
            rent = rent_of(opened.record_bytes, price_gb_month, price_hour, tflops)
            wanted = replace(wanted, shape=shape, rent=rent)
        if max_bytes is not None or tflops is not None:
            fallen = limit(opened, wanted)
        found = report(opened) | {"fallen": fallen or 0}
    if as_json:
        print(json.dumps(found))
        return
    _print_tiers(found)
    if fallen is not None:
        print(f"{fallen} memories fell back to text")


def _print_tiers(found: dict[str, Any]) -> None:
    from memory3.cost import three_digits as digits

    print("  ".join(f"{name}: {count:,}" for name, count in found["tiers"].items()))
    if found["recalls"] and found["flops_paid"] is not None:
        print(
            f"{found['recalls']:,} recalls cost {digits(found['flops_paid'])} FLOP with all encodings, {digits(found['flops_as_text'])} as text "
            "in the prompt"
        )


@bank_app.command("list")
def list_(
    bank: Address,
    where: Where = None,
    source: Annotated[str | None, typer.Option(help="Only what comes from this document.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows.")] = None,
    as_json: Json = False,
) -> None:
    """List memories: id, tokens, sources and the beginning of the text; with --json one document a line."""
    from memory3.remote import open_bank
    from memory3.spec import BankError

    with open_bank(bank) as opened:
        rows = opened.where(where)
        if source is not None:
            there = {span[0] for span in opened.spans_of([source])}
            if not there:
                raise BankError(f"{bank} has nothing of {source!r}, expected a source that `memory3 bank list {bank}` names")
            rows = [row for row in rows if row["id"] in there]
        places = opened.references(row["id"] for row in rows[:limit])
        tier = opened.tier_of_each()
        for row in rows[:limit]:
            sources = [f"{r.source}:{r.start}-{r.end}" for r in places[row["id"]]]
            if as_json:
                print(
                    json.dumps(
                        {
                            "id": row["id"],
                            "tokens": row["tokens"],
                            "tier": tier[row["id"]],
                            "sources": sources,
                            "text": row["text"],
                        },
                        ensure_ascii=False,
                    )
                )
            else:
                print(
                    f"{row['id']}  {row['tokens']:>4}  {tier[row['id']]:6}  {sources[0]}  {' '.join(row['text'].split())[:80]}"
                )


@bank_app.command()
def show(bank: Address, id: Annotated[str, typer.Argument(help="Id of a memory, as `list` and citations give it.")]) -> None:
    """Show one memory: its text, where it comes from, and what was kept of it."""
    from memory3.remote import open_bank

    with open_bank(bank) as opened:
        [spans] = opened.references([id]).values()
        tier = opened.tier_of_each()[id]
        memory = opened.read([id])[0] if id in opened.places() else None
    print(spans[0].text)
    for r in spans:
        print(f"  from {r.source}:{r.start}-{r.end}")
    if memory is None:
        print(f"  {tier}: no key-values are kept, they are made when it is read")
        return
    pairs, kept, head_dim = memory.keys.shape
    print(f"  memory: {pairs} (layer, kv head) pairs x {kept} kept tokens x {head_dim}, {memory.nbytes:,} bytes in RAM")


@bank_app.command()
def delete(
    bank: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of memories.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="A document; may be given several times.")] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Forget memories by id, document or filter: text, index entries, key-values, and older versions that hold them."""
    from memory3.bank import Bank
    from memory3.spec import BankError

    if not (ids or source or where):
        raise BankError("found nothing to delete, expected ids, --source or --where: list them with memory3 bank list")
    with Bank(bank) as opened, opened.exclusive():
        gone = opened.delete(ids) if ids else 0
        gone += opened.delete_source(*source) if source else 0
        gone += opened.delete_where(where) if where else 0
    print(json.dumps({"deleted": gone}) if as_json else f"{gone} {'memory' if gone == 1 else 'memories'} deleted")


@bank_app.command()
def verify(
    bank: Folder,
    absent: Annotated[str | None, typer.Option(help="Also prove that this text is nowhere in the bank any more.")] = None,
    as_json: Json = False,
) -> None:
    """Recompute every checksum and hold catalogue, shards and sources against each other; exit code 4 where something is wrong."""
    from dataclasses import asdict

    from memory3.bank import Bank
    from memory3.verifying import traces_of
    from memory3.verifying import verify as verify_bank

    with Bank(bank) as opened, progress("verifying") as tell:
        found = verify_bank(opened, tell)
        traces = [] if absent is None else traces_of(opened, absent)
    if as_json:
        print(json.dumps({**asdict(found), "traces": traces}, ensure_ascii=False))
    else:
        for problem in found.problems:
            print(f"problem: {problem}")
        for trace in traces:
            print(f"still there: {trace}")
        print(
            f"{found.memories} memories checked, {len(found.problems)} problems, {found.versions} versions of the tables, "
            f"{found.unused_bytes:,} bytes unused"
        )
        if absent is not None and not traces:
            print(f"{absent!r} is nowhere in the bank")
    if found.problems or traces:
        raise typer.Exit(FAULTY)


@bank_app.command()
def compact(bank: Folder, as_json: Json = False) -> None:
    """Give the space of deleted memories back to the disk."""
    from memory3.bank import Bank

    with Bank(bank) as opened:
        freed = opened.compact()
    print(json.dumps({"freed_bytes": freed}) if as_json else f"{freed:,} bytes freed")


@bank_app.command()
def embed(
    bank: Folder,
    embedder: Embedder = None,
    device: Device = None,
    dtype: EmbedderDtype = None,
    as_json: Json = False,
) -> None:
    """Give all memories vectors, so that the bank can be searched by meaning; `--embedder none` takes them away."""
    from memory3.bank import Bank
    from memory3.embedding import OFFLINE, SentenceEmbedder

    made = None if embedder == "none" else SentenceEmbedder(embedder or OFFLINE, device, dtype or "float32")
    with Bank(bank) as opened, progress("embedding") as tell:
        count = opened.embed(made, on_progress=tell)
    name = None if made is None else made.name
    print(json.dumps({"vectors": count, "embedder": name}) if as_json else f"{count} vectors made, embedder: {name}")


@bank_app.command()
def versions(bank: Address, as_json: Json = False) -> None:
    """List the states of a bank that `--at` can show, oldest first, with their tags."""
    from memory3.remote import open_bank

    with open_bank(bank) as opened:
        kept, tags = opened.versions(), opened.tags()
    for made, version in kept:
        names = [name for name, tagged in tags.items() if tagged == version]
        if as_json:
            print(json.dumps({"version": version, "created": made.isoformat(timespec="seconds"), "tags": names}))
        else:
            print(f"{version:12} {made:%Y-%m-%d %H:%M:%S} UTC  {' '.join(names)}".rstrip())


@bank_app.command()
def tag(
    bank: Folder,
    name: Annotated[str, typer.Argument(help="Name of the state.")],
    remove: Annotated[bool, typer.Option("--remove", help="Let the state go.")] = False,
    as_json: Json = False,
) -> None:
    """Keep the present state of a bank under a name, until something is deleted from it."""
    from memory3.bank import Bank

    with Bank(bank) as opened:
        version = None if remove else opened.tag(name)
        if remove:
            opened.untag(name)
    shown = f"{name} is no tag any more" if remove else f"{name} is version {version}"
    print(json.dumps({"tag": name, "version": version}) if as_json else shown)


@bank_app.command("export")
def export(bank: Folder, file: Annotated[Path, typer.Argument(help="The archive to make.")], as_json: Json = False) -> None:
    """Write a bank into one file."""
    from memory3.archive import export_bank
    from memory3.bank import Bank

    with Bank(bank) as opened, progress("exporting") as tell:
        size = export_bank(opened, file, tell)
    print(json.dumps({"bytes": size}) if as_json else f"{size:,} bytes in {file}")


@bank_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An archive that `export` made.")],
    bank: Annotated[Path, typer.Argument(help="Folder of the new bank.")],
    as_json: Json = False,
) -> None:
    """Make a bank out of an archive; sizes, checksums and names are checked."""
    from memory3.archive import import_bank

    with progress("importing") as tell:
        opened = import_bank(file, bank, tell)
    _say_made(opened, bank, as_json)


@bank_app.command()
def push(
    bank: Folder,
    target: Annotated[str, typer.Argument(help="s3://BUCKET/PATH, or hf://OWNER/NAME for a hub repository.")],
    licence: Annotated[str | None, typer.Option(help="Licence for the page of a hub repository: cc-by-sa-4.0, …")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a new hub repository; default private.")] = False,
    as_json: Json = False,
) -> None:
    """Put a bank on object storage or into a hub repository; what was pushed before is brought to the present state."""
    from memory3.bank import Bank
    from memory3.sharing import push as push_bank

    with Bank(bank) as opened, progress("pushing") as tell:
        sent = push_bank(opened, target, licence=licence, public=public, on_progress=tell)
    print(json.dumps({"bytes": sent, "target": target}) if as_json else f"{sent:,} bytes sent to {target}")


@bank_app.command()
def pull(
    source: Annotated[str, typer.Argument(help="s3://BUCKET/PATH or hf://OWNER/NAME.")],
    bank: Annotated[Path, typer.Argument(help="Folder of the new bank.")],
    as_json: Json = False,
) -> None:
    """Make a bank out of what `push` put somewhere; sizes, checksums and names are checked."""
    from memory3.sharing import pull as pull_bank

    with progress("pulling") as tell:
        opened = pull_bank(source, bank, tell)
    _say_made(opened, bank, as_json)


def _say_made(opened: Bank, path: Path, as_json: bool) -> None:
    """What `import` and `pull` say of the new bank."""
    count = len(opened)
    print(json.dumps({"references": count, "path": str(path)}) if as_json else f"{count} memories in {path}")


@bank_app.command()
def rebuild(
    bank: Folder,
    model: Model = None,
    batch_size: Annotated[int, typer.Option(min=1, help="References of one forward pass.")] = 64,
    tokens_per_head: TokensPerHead = None,
    codec: CodecName = None,
    codebook: CodebookFile = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Encode the texts of a bank again, for another model; the old bank stays until the new one is complete."""
    from dataclasses import asdict

    from memory3.rebuilding import rebuild as rebuild_bank

    with decoder_of(model, tokens_per_head, device, dtype) as decoder, progress("rebuilding") as tell:
        chosen = codec_of(codec, codebook, decoder, model)
        done = rebuild_bank(Path(bank), decoder, codec=chosen, batch_size=batch_size, on_progress=tell)
    report = done.report
    if as_json:
        print(json.dumps({**asdict(report), "split": done.split}))
    else:
        print(
            f"{report.references} references encoded again, {done.split} texts split, {report.bytes_per_reference:,} bytes each"
        )


@bank_app.command()
def codebook(
    bank: Address,
    file: Annotated[
        Path, typer.Argument(help="The codebook to make; codebook.safetensors in a model's folder is found by itself.")
    ],
    keys: Annotated[
        str | None, typer.Option(help="Quantiser of keys, as FAISS spells it: OPQ20_80,Residual2x14,PQ8x10.")
    ] = None,
    values: Annotated[str | None, typer.Option(help="Quantiser of values; both by default the paper's, scaled.")] = None,
    references: Annotated[int | None, typer.Option(min=1, help="How many memories are drawn.")] = None,
    centred: Annotated[bool, typer.Option(help="Shift and scale the vectors of each head first.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Train the codebook of `write --codec product` on the memories of a bank that was written without --codec."""
    from memory3.codebook import digest_of
    from memory3.fitting import fit_codebook, save_codebook
    from memory3.remote import open_bank

    with open_bank(bank) as opened:
        book = fit_codebook(opened, keys=keys, values=values, references=references, centred=centred, seed=seed)
    size = save_codebook(book, file)
    made = {**book.about, "keys": str(book.keys.recipe), "values": str(book.values.recipe), "bytes": size}
    made["codebook"] = digest_of(file.read_bytes())
    if as_json:
        print(json.dumps(made))
        return
    print(f"{size:,} bytes in {file}: keys {made['keys']}, values {made['values']}")
    print(f"relative error of memories held out: {book.error:.3f}, trained on {made['vectors']:,} keys and as many values")
