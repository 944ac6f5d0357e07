"""A bank to object storage or to a hub repository, and back: checked file by file, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory3.archive import LISTING, Listing, checked_listing, copied, files_of, fresh_bank, listing_of
from memory3.bank import Bank
from memory3.manifest import MANIFEST
from memory3.remote import fetched, is_remote, store_of, unreachable
from memory3.spec import BankError

HUB = "hf://"
CARD = "README.md"
_MOST_SOURCES = 50

OnProgress = Callable[[int, int | None], None]


def push(bank: Bank, target: str, *, licence: str | None = None, on_progress: OnProgress | None = None) -> int:
    """Put a bank on object storage (`s3://BUCKET/PATH`) or into a hub repository (`hf://OWNER/NAME`); bytes that were sent.

    The bank is locked against writers meanwhile. What was pushed before is brought to the present state: only what changed
    is sent, and what the bank no longer has is removed, deleted memories too. A hub keeps the history of a repository, so what
    was once pushed there stays in it until the history is squashed.

    Args:
        bank: the bank.
        target: where to.
        licence: identifier for the card of a hub repository, `cc-by-sa-4.0` for instance.
        on_progress: called with the bytes done and their total.

    Raises:
        BankError: out of reach, another bank is there, or another process writes.
    """
    with bank.exclusive():
        files = files_of(bank)
        listing = listing_of(files)
        if target.startswith(HUB):
            return _push_to_hub(bank, files, listing, target.removeprefix(HUB), licence)
        if not is_remote(target):
            raise BankError(f"found the target {target!r}, expected s3://BUCKET/PATH or {HUB}OWNER/NAME")
        return _push_to_store(bank, files, listing, target.rstrip("/"), on_progress)


def pull(source: str, path: Path, on_progress: OnProgress | None = None) -> Bank:
    """Make a bank in a new folder out of what `push` put somewhere; names, sizes and checksums are checked.

    Raises:
        BankError: out of reach, no bank there, damage, or a folder that exists.
    """
    with fresh_bank(path) as fresh:
        if source.startswith(HUB):
            _pull_from_hub(source.removeprefix(HUB), fresh)
        elif is_remote(source):
            _pull_from_store(source.rstrip("/"), fresh, on_progress)
        else:
            raise BankError(f"found the source {source!r}, expected s3://BUCKET/PATH or {HUB}OWNER/NAME")
    return Bank(path)


def card(bank: Bank, repository: str, licence: str | None = None) -> str:
    """The page of a hub repository, from the manifest: model, spec, counts, sources, licence."""
    found, identity = bank.stats(), bank.manifest.identity
    sources = bank.sources()
    shown = [f"| {source.replace('|', '/')} | {count} |" for source, count in list(sources.items())[:_MOST_SOURCES]]
    more = len(sources) - len(shown)
    front = ["---", *([f"license: {licence}"] if licence else []), "tags: [memory3, explicit-memory]", "---"]
    rows = {
        "model": f"{found['model']} (weights `{identity['weights']}`, tokenizer `{identity['tokenizer']}`)",
        "memory layers": ", ".join(map(str, found["layers"])),
        "kept tokens per head": found["tokens_per_head"] or "all",
        "references": f"{found['references']:,}, {found['bytes_per_reference']:,} bytes each",
        "codec": found["codec"],
        "embedder": found["embedder"] or "none: it is searched by words",
        "created": f"{found['created']} by memory3 {found['created_by']}",
        "licence": licence or "not stated",
    }
    return "\n".join(
        [
            *front,
            f"# {repository}",
            "",
            "Explicit memories: sparse attention key-values of the texts below, for one model. Only that model can read them.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "```",
            f"memory3 bank pull {HUB}{repository} bank",
            'memory3 ask "…" --bank bank --model MODEL',
            "```",
            "",
            "| source | references |",
            "|---|---|",
            *shown,
            *([f"| … and {more} more | |"] if more else []),
            "",
        ]
    )


def _push_to_store(bank: Bank, files: dict[str, Path], listing: Listing, target: str, on_progress: OnProgress | None) -> int:
    """Records and data first, then what points at them, at last what nothing points at any more goes."""
    import obstore

    store = store_of(target)
    try:
        there = {str(o["path"]) for some in obstore.list(store) for o in some}
        known = _listed(store, target) if LISTING in there else {}
        if MANIFEST in there and fetched(store, target, MANIFEST) != files[MANIFEST].read_bytes():
            raise BankError(f"{target} holds another bank, expected this one or nothing: give another address, or remove it")
        if there and MANIFEST not in there and not any(name in listing for name in there):
            raise BankError(f"{target} holds {min(there)!r} and no bank, expected nothing or this bank: give another address")
        changed = sorted((n for n in listing if n not in there or known.get(n) != listing[n]), key=_rank)
        total, sent = sum(listing[name][0] for name in changed), 0
        for name in changed:
            obstore.put(store, name, files[name])
            sent += listing[name][0]
            if on_progress:
                on_progress(sent, total)
        obstore.put(store, LISTING, json.dumps(listing).encode())
        for name in sorted(there - set(listing) - {LISTING}):
            obstore.delete(store, name)
    except BankError:
        raise
    except Exception as error:  # obstore's own classes differ between versions
        raise unreachable(target, error) from None
    return sent


def _rank(name: str) -> tuple[int, str]:
    kinds = ("shards/", "/data/", "/_indices/", "/_deletions/", "/_transactions/", "/_versions/", MANIFEST)
    return next((n for n, kind in enumerate(kinds) if kind in name), 0), name


def _listed(store: Any, address: str) -> Listing:
    return checked_listing(fetched(store, address, LISTING), address)


def _pull_from_store(source: str, fresh: Path, on_progress: OnProgress | None) -> None:
    import obstore

    store = store_of(source)
    listing = _listed(store, source)
    total, done = sum(size for size, _ in listing.values()), 0
    for name, (size, digest) in listing.items():
        try:
            blocks = obstore.get(store, name).stream()
            found = copied((bytes(block) for block in blocks), fresh / name, size)
        except FileNotFoundError:
            found = "nothing"
        except BankError:
            raise
        except Exception as error:
            raise unreachable(source, error) from None
        if found != digest:
            raise BankError(f"{name} at {source} is missing or damaged (its checksum differs): push the bank again")
        done += size
        if on_progress:
            on_progress(done, total)


def _push_to_hub(bank: Bank, files: dict[str, Path], listing: Listing, repository: str, licence: str | None) -> int:
    from huggingface_hub import HfApi

    hub = HfApi()
    with tempfile.TemporaryDirectory(dir=bank.path.absolute().parent, prefix=f".{bank.path.name}.memory3-pushing") as staging:
        for name, file in files.items():
            target = Path(staging, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            _linked(file, target)
        Path(staging, LISTING).write_text(json.dumps(listing), "utf-8")
        Path(staging, CARD).write_text(card(bank, repository, licence), "utf-8")
        try:
            hub.create_repo(repository, repo_type="dataset", exist_ok=True)
            hub.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=staging,
                commit_message=f"{len(bank)} memories",
                delete_patterns="*",
            )
        except Exception as error:  # the hub's errors share no class with those of the network
            raise _not_on_hub(repository, error) from None
    return sum(size for size, _ in listing.values())


def _pull_from_hub(repository: str, fresh: Path) -> None:
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(dir=fresh.parent, prefix=f".{fresh.name}.memory3-pulling") as staging:
        try:
            snapshot_download(repository, repo_type="dataset", local_dir=staging)
        except Exception as error:
            raise _not_on_hub(repository, error) from None
        page = Path(staging, LISTING)
        if not page.is_file():
            raise BankError(f"{HUB}{repository} has no {LISTING}, expected a bank that `memory3 bank push` put there")
        for name, (size, digest) in checked_listing(page.read_bytes(), repository).items():
            file = Path(staging, name)
            if file.is_symlink() or not file.is_file():
                raise BankError(f"{HUB}{repository} lacks {name}, expected it by its listing: push the bank again")
            with file.open("rb") as data:
                if copied(iter(lambda: data.read(2**20), b""), fresh / name, size) != digest:
                    raise BankError(f"{name} of {HUB}{repository} is damaged (its checksum differs): push the bank again")


def _not_on_hub(repository: str, error: BaseException) -> BankError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BankError(f"{HUB}{repository} cannot be reached ({reason}): check the name, the network, and `hf auth login`")


def _linked(file: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
