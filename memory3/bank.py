"""A bank: memories, their texts and an index, in one folder (docs/bank.md).

Records go to disk before the rows that point at them, so a kill leaves at most bytes that nothing points at.
One process writes at a time; any number read, and see each batch whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch

from memory3.catalogue import FOLDER, KEPT_VERSIONS, Catalogue, Entry, Span
from memory3.codebook import CODEBOOK
from memory3.codec import RawCodec
from memory3.documents import files_of
from memory3.embedding import Embedder, VectorSpace
from memory3.guard import LOCK, WAIT_S, Guard, replaced_bank
from memory3.journal import Deletion
from memory3.manifest import MANIFEST, Manifest
from memory3.reader import BankReader, MemoryWriter, encodable, lengths_of, version_name
from memory3.record import Codec, short
from memory3.shards import NO_RECORD, Place, Shards, bytes_under
from memory3.spec import BankError, BankMismatch, Memory, Reference
from memory3.states import Version
from memory3.uses import ENCODED, KNOWN, USES, Uses

__all__ = ["Bank"]

MAX_SHARD_BYTES = 256 * 2**20
SHARDS = "shards"


class Bank(BankReader):
    """A folder of memories that one model wrote.

    Args:
        path: the folder.
        decoder: the model that reads or writes; `None` opens the bank to look at it, not to write.
        create: make the bank where there is none.
        codec: codec of a new bank, by default raw in the dtype of the model; for an existing one it must match.
        max_shard_bytes: size limit of the key-value files of a new bank.
        embedder: gives a new bank vectors, so that it can be searched by meaning; for an existing one it must match. By
            default an existing bank loads its own by name, when it needs it.
        at: look at an earlier state, a tag or a version as `versions` gives it; nothing can be written then.

    Raises:
        BankError: missing, damaged, a folder of something else, or a state that is not kept.
        BankMismatch: written by another model, tokenizer, rotation, spec, codec, embedder or format.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        decoder: MemoryWriter | None = None,
        create: bool = False,
        *,
        codec: Codec | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        embedder: Embedder | None = None,
        at: str | None = None,
    ) -> None:
        if "://" in str(path):
            raise BankError(
                f"{path} is an address on object storage, expected a folder: write the bank here, then memory3 bank push BANK {path}"
            )
        self.path = Path(path)
        self.at: str | None = None
        self._guard = Guard(self.path, self._finish_deletion)
        if not (self.path / MANIFEST).is_file():
            self._create(create, decoder, codec, max_shard_bytes, embedder)
        self._guard.remember()
        manifest = Manifest.load(self.path)
        self.uses = Uses(self.path / USES)
        self._shards = Shards(self.path / SHARDS, manifest.record_bytes, manifest.records_per_shard)
        catalogue = Catalogue(self.path / FOLDER)
        super().__init__(str(self.path), decoder, manifest, catalogue, self._shards, embedder, at)
        if codec is not None and codec != self.manifest.codec:
            raise BankMismatch(
                f"{self.path} has codec {self.manifest.codec.described}, expected {codec.described}: "
                f"leave the codec out, or write a new bank: memory3 write … --bank NEW"
            )

    def total_bytes(self) -> int:
        """Bytes of all files of the folder."""
        return bytes_under(self.path)

    def shard_bytes(self) -> int:
        """Bytes of all records, of those too that no row points at."""
        return self._shards.total_bytes()

    def table_bytes(self) -> int:
        """Bytes of texts, sources and index."""
        return bytes_under(self.path / FOLDER)

    # Write

    def add(self, references: Sequence[Reference], memories: Sequence[Memory]) -> int:
        """Store a batch of references with their memories; how many memories were new.

        Content that the bank has already only gains its new (source, span) rows, and its memory where it was text alone. Records are
        on disk before rows.

        Raises:
            BankError: the memories do not fit the bank, the disk is full, or another process writes.
        """
        if len(references) != len(memories):
            raise BankError(f"found {len(memories)} memories for {len(references)} references, expected one each")
        by_id = {r.id: (_storable(r), m) for r, m in zip(reversed(references), reversed(memories), strict=True)}
        self._refuse_without_model()
        with self.exclusive():
            codec, shape, places = self.manifest.codec, self.manifest.shape, self._catalogue.locate(by_id)
            texts = set(self.texts_among(id for id, place in places.items() if place == NO_RECORD))
            order = dict.fromkeys(r.id for r in references)
            wanted = {id: by_id[id] for id in order if id not in places or id in texts}
            records = {id: codec.encode(memory, shape, id) for id, (_, memory) in wanted.items()}
            new = [reference for id, (reference, _) in wanted.items() if id not in places]
            if new:
                self._append(new, lambda: self._shards.append([records.pop(r.id) for r in new]))
            if records:
                self.uses.note_encoded(records)
                self.keep(records)
            self._catalogue.add_spans(references)
        return len(wanted)

    def add_texts(self, references: Sequence[Reference]) -> int:
        """Store a batch of references as text alone, to be encoded when they are read; how many were new.

        Raises:
            BankError: a reference that saw its surroundings, that is empty or over-long (none of the batch is stored then), the disk
                is full, or another process writes.
        """
        by_id = {r.id: _storable(r) for r in reversed(references)}
        if any(r.context for r in references):
            raise BankError(
                "found a reference that saw its surroundings, expected one that can be encoded alone: write it whole"
            )
        self._refuse_without_model()
        with self.exclusive():
            new = [by_id[id] for id in self.missing(r.id for r in references)]
            if new:
                self._append(new, lambda: [NO_RECORD] * len(new), encodable(self.decoder, new))
            self._catalogue.add_spans(references)
        return len(new)

    def add_sources(self, references: Sequence[Reference]) -> int:
        """Note further places of texts that the bank has; how many were new. `BankError` for texts it does not have."""
        self._refuse_without_model()
        with self.exclusive():
            self._refuse_unknown(self.missing(_storable(r).id for r in references))
            return self._catalogue.add_spans(references)

    # Tiers

    def records_of(self, ids: Collection[str]) -> list[tuple[Place, str]]:
        """Records that hold key-values of these, and whose each is; of those too that no row points at."""
        return self._shards.records_of(ids)

    def texts_among(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that are text: neither with key-values nor in an adapter's parameters; in order, each once."""
        wanted = list(dict.fromkeys(ids))
        places, given = (self._catalogue.locate(wanted), self._catalogue.adapters_of(wanted)) if wanted else ({}, {})
        return [id for id in wanted if places.get(id) == NO_RECORD and id not in given]

    def keep(self, records: Mapping[str, bytes], instead_of: Sequence[str] = ()) -> int:
        """Move texts up into memory, with the records that `load` made of them; how many.

        What was deleted or moved meanwhile is left out. Memories of `instead_of` fall back to text first, and the places of their records
        are used.

        Raises:
            BankError: the disk is full, or another process writes.
            BankMismatch: the model is in another dtype than the bank, so the records are not what its model would write.
        """
        if records:
            self.refuse_other_dtype()
        with self.exclusive():
            wanted = self.texts_among(records)
            free = list(self._dropped(instead_of).values())
            reused = dict(zip(wanted, free, strict=False))
            self._shards.erase(free[len(reused) :])
            self._shards.replace({place: records[id] for id, place in reused.items()})
            rest = wanted[len(reused) :]
            places = dict(zip(rest, self._shards.append([records[id] for id in rest]), strict=True)) if rest else {}
            if wanted:
                self._catalogue.move(reused | places)
        return len(wanted)

    def drop(self, ids: Iterable[str]) -> int:
        """Let memories fall back to text; how many. `compact` gives their space back. Those that saw their surroundings stay."""
        with self.exclusive():
            places = self._dropped(ids)
            self._shards.erase(places.values())
        return len(places)

    def give(self, ids: Sequence[str], adapter: str | None) -> None:
        """Move references into the parameters of an adapter, named by its fingerprint: who has it reads them no more; who does not
        reads them as text. `None`: back to text.

        Raises:
            BankError: unknown ids, or a memory that saw its surroundings.
        """
        with self.exclusive():
            places = self._catalogue.locate(ids)
            self._refuse_unknown(id for id in ids if id not in places)
            if bound := set(self.in_context()) & set(ids):
                raise BankError(
                    f"memory {min(bound)} saw its surroundings, expected one that can be encoded alone: leave it out"
                )
            written = {id: place for id, place in places.items() if place != NO_RECORD}
            self.uses.note_written(written)
            if places:
                self._catalogue.give(list(places), adapter)
            self._shards.erase(written.values())

    def _dropped(self, ids: Iterable[str]) -> dict[str, Place]:
        """Move rows away from their records; where these were."""
        there = self._catalogue.locate(wanted) if (wanted := list(dict.fromkeys(ids))) else {}
        bound = set(self.in_context()) if there else set()
        places = {id: place for id, place in there.items() if place != NO_RECORD and id not in bound}
        if places:
            self.uses.note_written(places)
            self._catalogue.move(dict.fromkeys(places, NO_RECORD))
        return places

    # Forget

    def delete(self, ids: Iterable[str]) -> int:
        """Remove memories with their texts, sources and index entries, and zero their records; how many.

        What is removed is gone from every file of the bank, older versions of the tables included. After a kill, the next
        writer finishes the work. `BankError` for unknown ids.
        """
        wanted = list(dict.fromkeys(ids))
        with self.exclusive():
            self._refuse_unknown(self.missing(wanted))
            if wanted:  # what is deleted leaves every earlier state; where nothing is, they stay
                self._forget(wanted)
        return len(wanted)

    def delete_source(self, *sources: str) -> int:
        """Remove documents, with all their rows, pages and chapters; a memory goes with the last of its (source, span) rows.

        How many memories went. `BankError` where a source has nothing in the bank.
        """
        with self.exclusive():
            spans = self._catalogue.spans_of(sources)
            known = {file for _, source, _, _ in spans for file in files_of(source)}
            unknown = [source for source in sources if source not in known]
            if unknown:
                raise BankError(
                    f"{self.path} has nothing of {unknown[0]!r}: the sources are listed by memory3 bank list {self.path}"
                )
            return self.forget_spans(spans)

    def delete_where(self, condition: str) -> int:
        """Remove the memories that an SQL condition on `id`, `text`, `tokens` and `created` selects; how many."""
        with self.exclusive():
            return self.delete(row["id"] for row in self._catalogue.where(condition))

    def forget_spans(self, spans: Sequence[Span]) -> int:
        """Remove (source, span) rows, and the memories that are left without any; how many memories went."""
        with self.exclusive():
            orphans = self._catalogue.left_without(spans)
            if spans:
                self._forget(orphans, spans)
        return len(orphans)

    def refresh(self, keep_versions: bool = True) -> None:
        """Bring the indexes up to date. Searches find new rows before that too, more slowly.

        Older versions of the tables stay for an hour, for readers that are at work; with `keep_versions=False` they go.
        """
        with self.exclusive():
            self._catalogue.optimise(KEPT_VERSIONS if keep_versions else timedelta(0))

    def compact(self) -> int:
        """Give the space of records that no row points at back to the disk; how many bytes.

        Records are copied to new files first and the rows moved in one commit, so readers go on and a kill costs nothing but
        the space of the copies, which the next `compact` finds.
        """
        with self.exclusive():
            before = self._shards.total_bytes()
            places = self._catalogue.every_place()
            if before > len(places) * self.record_bytes:
                old = self._shards.numbers()
                ids = sorted(places, key=places.__getitem__)
                moved = self._shards.copy_to_new([places[id] for id in ids])
                if ids:
                    self._catalogue.move(dict(zip(ids, moved, strict=True)))
                self._shards.remove(old)
            self._catalogue.optimise()
            self.uses.tidy(self.missing)
            return before - self._shards.total_bytes()

    def embed(
        self, embedder: Embedder | None, batch_size: int = 256, on_progress: Callable[[int, int | None], None] | None = None
    ) -> int:
        """Give every memory a vector of this embedder, so that the bank can be searched by meaning; how many were made.

        Each batch is committed by itself, so the same call goes on after a kill. Vectors of another embedder go first. `None`
        takes all vectors away.
        """
        with self.exclusive():
            made, total = 0, len(self)
            space, there = None if embedder is None else VectorSpace.of(embedder), self.space
            if there is not None and not there.same_as(space):
                self._catalogue.make_space(None)
                there = None
            if space is not None and there is None:
                self._catalogue.make_space(space)
            self._embedder = embedder
            while embedder is not None and (some := self._catalogue.without_vector(batch_size)):
                self._catalogue.fill_vectors([id for id, _ in some], embedder.embed([text for _, text in some]))
                made += len(some)
                if on_progress:
                    on_progress(made, total)
            self._catalogue.optimise()
            return made

    def tag(self, name: str) -> str:
        """Keep the present state under a name; its version. `BankError` where the name is taken."""
        with self.exclusive():
            return version_name(self._catalogue.states.tag(name))

    def untag(self, name: str) -> None:
        """Keep a state no longer; `BankError` where no state has the name."""
        with self.exclusive():
            self._catalogue.states.untag(name)

    def count_uses(self, ids: Sequence[str], since: Version, encoded: Iterable[str] = (), known: Iterable[str] = ()) -> None:
        """Note in the use history that these were recalled from the bank as it was at `since`, and which of them were encoded for it or
        known to the model; looks at earlier states do not count.
        """
        if self.at is None:
            ways = {ENCODED: encoded, KNOWN: known}
            self.uses.count(ids, lambda ids: [] if self.version == since else self.missing(ids), ways)

    def exclusive(self, wait_s: float = WAIT_S) -> AbstractContextManager[None]:
        """Be the only writer inside the block, across processes; may be nested. A deletion that a kill interrupted is
        finished first. Another writer is waited for so many seconds.

        Raises:
            BankError: another writer is at work, or the folder cannot be written.
            BankMismatch: the bank was rebuilt since it was opened.
        """
        if self.at is not None:
            raise BankError(
                f"{self.path} was opened at {self.at}, an earlier state, to be looked at: open it without `at` to write"
            )
        return self._guard.exclusive(wait_s)

    def locked(self) -> AbstractContextManager[None]:
        """Keep writers out inside the block, and change nothing; `BankError` where one is at work."""
        return self._guard.locked()

    def _check(self) -> None:
        self._guard.check()

    def _create(
        self,
        create: bool,
        decoder: MemoryWriter | None,
        codec: Codec | None,
        max_shard_bytes: int,
        embedder: Embedder | None,
    ) -> None:
        """Lay out an empty bank; the manifest comes last, so a folder with one is complete."""
        if not create:
            raise BankError(f"no bank at {self.path}; write one: memory3 write SOURCES --bank {self.path}")
        if replaced_bank(self.path).exists():
            raise BankError(
                f"no bank at {self.path}, but a rebuild of it was interrupted: run it again, memory3 bank rebuild {self.path}"
            )
        if decoder is None:
            raise BankError(
                f"no bank at {self.path}, and none can be made without a model: give the decoder that will write it"
            )
        manifest = Manifest.new(decoder.identity(), codec or RawCodec.of(decoder.dtype), max_shard_bytes)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _OURS)
        except OSError as error:
            raise BankError(f"{self.path} cannot be made ({error.strerror}): give a folder that can be written") from error
        if foreign:
            raise BankError(f"{self.path} is no bank, it holds {foreign[0]!r} and more: give an empty or a new folder")
        space = None if embedder is None else VectorSpace.of(embedder)
        with self.exclusive():
            if not (self.path / MANIFEST).is_file():
                Catalogue(self.path / FOLDER, create=True, space=space)
                manifest.save(self.path)

    def _append(
        self, references: Sequence[Reference], stored: Callable[[], Sequence[Place]], counted: Sequence[int] | None = None
    ) -> None:
        lengths = lengths_of(self.decoder, references) if counted is None else counted
        vectors = [None] * len(lengths) if self.space is None else self.embedder.embed([r.text for r in references])
        self._catalogue.add_memories([Entry(*row) for row in zip(references, lengths, stored(), vectors, strict=True)])

    def _forget(self, ids: Sequence[str], spans: Sequence[Span] = ()) -> None:
        """Delete under the protection of a journal, from every version; an earlier one that failed is finished first."""
        self._finish_deletion()
        Deletion(spans, self._catalogue.locate(ids)).save(self.path)
        self._finish_deletion()

    def _finish_deletion(self) -> None:
        """Do what the journal says; it goes when nothing of it is left to do."""
        deletion = Deletion.load(self.path)
        if deletion is None:
            return
        self._catalogue.delete_spans(deletion.spans)
        self._catalogue.delete(list(deletion.places))
        self._shards.erase({*deletion.places.values(), *(place for place, _ in self.records_of(deletion.places))})
        self._catalogue.purge()
        self.uses.forget(deletion.places)
        Deletion.clear(self.path)

    def refuse_other_dtype(self) -> None:
        """Raise `BankMismatch` where the model is in another dtype than the bank: what it encodes is not what should be kept."""
        self._refuse_without_model()
        mine, there = short(self.decoder.dtype if self.decoder else torch.float32), self.manifest.identity["dtype"]
        if mine != there:
            raise BankMismatch(
                f"{self.path} was written in {there}, this model is in {mine}: load it with --dtype {there} to write"
            )

    def _refuse_without_model(self) -> None:
        if self.decoder is None:
            raise BankError(
                f"{self.path} was opened without a model, to be looked at: open it with the model that wrote it to write"
            )


_OURS = {LOCK, FOLDER, SHARDS, f"{MANIFEST}.new", CODEBOOK, f"{CODEBOOK}.new"}


def _storable(reference: Reference) -> Reference:
    """The reference itself; `BankError` where its text or source is no valid Unicode."""
    try:
        f"{reference.text}{reference.source}".encode()
    except UnicodeEncodeError as error:
        raise BankError(
            f"found a reference at {reference.source!r}:{reference.start} with a lone surrogate ({error.reason}), expected Unicode"
        ) from None
    return reference
