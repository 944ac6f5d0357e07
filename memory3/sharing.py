"""A bank to object storage or to a hub repository, and back: checked file by file, whole or not at all."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memory3.archive import LISTING, Listing, checked_listing, copied, files_of, fresh_bank, is_ours, listing_of
from memory3.bank import Bank
from memory3.manifest import MANIFEST
from memory3.remote import fetched, is_remote, store_of, unreachable
from memory3.spec import BankError

HUB = "hf://"
CARD = "README.md"
_MOST_SOURCES = 50
_VERSION = re.compile(r"index\.lance/memories\.lance/_versions/(\d+)\.manifest")

OnProgress = Callable[[int, int | None], None]


def push(
    bank: Bank, target: str, *, licence: str | None = None, public: bool = False, on_progress: OnProgress | None = None
) -> int:
    """Put a bank on object storage (`s3://BUCKET/PATH`) or into a hub repository (`hf://OWNER/NAME`); bytes that were sent.

    The bank is locked against writers meanwhile. What was pushed before is brought to the present state: only what changed
    is sent, and what the bank no longer has is removed, deleted memories too. A hub keeps the history of a repository, so what
    was once pushed there stays in it until the history is squashed.

    Args:
        bank: the bank; pushes replace each other, so one place is its home.
        target: where to.
        licence: identifier for the card of a hub repository, `cc-by-sa-4.0` for instance.
        public: make a new hub repository one that everybody sees.
        on_progress: called with the bytes done and their total.

    Raises:
        BankError: out of reach, something else or a later state of the bank is there, or another process writes.
    """
    with bank.exclusive():
        files = files_of(bank)
        listing = listing_of(files)
        if target.startswith(HUB):
            return _push_to_hub(bank, files, listing, target.removeprefix(HUB), licence, public)
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
        ours = {name for name in there if is_ours(name)}
        held = fetched(store, target, MANIFEST) if MANIFEST in ours else None
        _refuse_foreign(files, there - {LISTING}, ours, held, target)
        known = _listed(store, target) if LISTING in there else {}
        changed = sorted((n for n in listing if n not in ours or known.get(n) != listing[n]), key=_rank)
        total, sent = sum(listing[name][0] for name in changed), 0
        for name in changed:
            obstore.put(store, name, files[name])
            sent += listing[name][0]
            if on_progress:
                on_progress(sent, total)
        obstore.put(store, LISTING, json.dumps(listing).encode())
        for name in sorted(ours - set(listing)):
            obstore.delete(store, name)
    except BankError:
        raise
    except Exception as error:  # obstore's own classes differ between versions
        raise unreachable(target, error) from None
    return sent


def _refuse_foreign(files: dict[str, Path], there: set[str], ours: set[str], held: bytes | None, target: str) -> None:
    """Only nothing, or this bank in a state that is not later than this one, may be replaced."""
    if held is None:
        if there - ours or (ours and not ours & set(files)):
            raise BankError(f"{target} holds {min(there)!r} and no bank, expected nothing or this bank: give another address")
        return
    if held != files[MANIFEST].read_bytes():
        raise BankError(f"{target} holds another bank, expected this one or nothing: give another address, or remove it")
    later, here = _newest_version(ours), _newest_version(set(files))
    if later > here:
        raise BankError(
            f"{target} holds a later state of this bank (version {later}, here {here}), expected an earlier one: pull it, and "
            "change that copy"
        )


def _newest_version(names: set[str]) -> int:
    """Lance names manifests so that the newest comes first: 2**64 - 1 less the version."""
    found = [int(match[1]) for name in names if (match := _VERSION.fullmatch(name))]
    return 2**64 - 1 - min(found, default=2**64 - 1)


def _rank(name: str) -> tuple[int, str]:
    kinds = ("shards/", "/data/", "/_indices/", "/_deletions/", "/_transactions/", "/_versions/", MANIFEST)
    return next((n for n, kind in enumerate(kinds) if kind in name), 0), name


def _listed(store: Any, address: str) -> Listing:
    return checked_listing(fetched(store, address, LISTING), address)


def _pull_from_store(source: str, fresh: Path, on_progress: OnProgress | None) -> None:
    store = store_of(source)
    listing = _listed(store, source)
    total, done = sum(size for size, _ in listing.values()), 0
    for name, (size, digest) in listing.items():
        if copied(_blocks(store, source, name), fresh / name, size) != digest:
            raise BankError(f"{name} at {source} is missing or damaged (its checksum differs): push the bank again")
        done += size
        if on_progress:
            on_progress(done, total)


def _blocks(store: Any, source: str, name: str) -> Iterator[bytes]:
    """An object in pieces; nothing where it is missing."""
    import obstore

    try:
        for block in obstore.get(store, name).stream():
            yield bytes(block)
    except FileNotFoundError:
        return
    except Exception as error:
        raise unreachable(source, error) from None


def _push_to_hub(
    bank: Bank, files: dict[str, Path], listing: Listing, repository: str, licence: str | None, public: bool
) -> int:
    """One commit, so that the repository holds a bank whole or not at all."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub, target = HfApi(), f"{HUB}{repository}"
    texts = {LISTING: json.dumps(listing), CARD: card(bank, repository, licence)}
    try:
        hub.create_repo(repository, repo_type="dataset", exist_ok=True, private=not public)
        there = set(hub.list_repo_files(repository, repo_type="dataset"))
        ours = {name for name in there if is_ours(name)}
        held = None
        if MANIFEST in ours:
            held = Path(hub.hf_hub_download(repository, MANIFEST, repo_type="dataset")).read_bytes()
        _refuse_foreign(files, there - {LISTING, CARD, ".gitattributes"}, ours, held, target)
        added = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        added += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        gone = [CommitOperationDelete(name) for name in sorted(ours - set(files))]
        hub.create_commit(repository, [*added, *gone], repo_type="dataset", commit_message=f"{len(bank)} memories")
    except BankError:
        raise
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
