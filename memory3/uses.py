"""How often each memory was recalled, lately more than long ago: the use history of a bank, in a file of its own.

A count must never stand in the way of a recall: where the file is locked, damaged, on a full or a read-only disk, the count is lost
and the recall goes on. A history holds ids and numbers, no text. SQLite keeps it whole across processes and kills.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import expm1, log
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from memory3.spec import BankError, SpecError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

USES = "uses.sqlite"
HALF_LIFE_DAYS = 30.0
DAY_S = 86400.0
_AT_ONCE = 500
PATIENCE_S = 10.0
"""How long a deletion waits for other processes; a count does not wait."""

_TABLES = """
create table if not exists uses (id text primary key, score real not null, at real not null, recalls integer not null) without rowid;
create table if not exists about (name text primary key, value real not null) without rowid;
create table if not exists ways (id text not null, way text not null, times integer not null, primary key (id, way)) without rowid;
"""
ENCODED, KNOWN = "encoded", "known"
"""Ways of a recall that differ from reading a record: the text was encoded for it; the model knew it, and read nothing."""
_WAY = "insert into ways values (:id, :way, :n) on conflict (id, way) do update set times = times + :n"
_COUNT = """
insert into uses values (:id, :n, :now, :n) on conflict (id) do update set
score = decayed(score, :now - at) + :n, at = max(at, :now), recalls = recalls + :n
"""


@dataclass(frozen=True)
class Use:
    """Recalls of one memory.

    Args:
        score: recalls, each halved for every half-life that has passed since.
        recalls: all of them, as they were counted.
        encoded: times that its text was encoded, as far as the bank was told: for a recall, or when it was written before it fell
            back to text.
        known: recalls by a model that had it in an adapter.
    """

    score: float
    recalls: int
    encoded: int = 0
    known: int = 0


@dataclass(frozen=True)
class History:
    """The use history of a bank at one moment.

    Args:
        uses: by id; memories that were never recalled have no row.
        began: Unix time of the first count, `None` where there was none.
        now: Unix time of this look.
        half_life_days: after so many days a recall counts half.
    """

    uses: dict[str, Use]
    began: float | None
    now: float
    half_life_days: float = HALF_LIFE_DAYS


class Uses:
    """The use history that lies in a file.

    Args:
        path: the file; made at the first count.
        clock: Unix time.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock

    def count(
        self,
        ids: Iterable[str],
        gone: Callable[[list[str]], list[str]] = lambda ids: [],
        ways: Mapping[str, Iterable[str]] = MappingProxyType({}),
    ) -> bool:
        """Count a recall of each id, as often as it occurs, and for each way the ids that were read so; whether it could be noted.

        `gone` says, after the commit, which of the ids the bank does not have any more: what is deleted while it is recalled must
        leave no trace. Whoever deletes later than this look finds the count; whoever deleted before it is seen by it.
        """
        counts, now = Counter(ids), self._clock()
        try:
            with self._changed(patience_s=0) as open_:
                open_.execute("insert or ignore into about values ('began', ?)", (now,))
                open_.executemany(_COUNT, [{"id": id, "n": n, "now": now} for id, n in counts.items()])
                rows = [{"id": id, "way": way, "n": n} for way, some in ways.items() for id, n in Counter(iter(some)).items()]
                open_.executemany(_WAY, rows)
            self._delete(gone(list(counts)))
        except (sqlite3.Error, OSError, BankError):  # the last where the bank itself goes away meanwhile
            return False
        return True

    def history(self, ids: Sequence[str] | None = None) -> History:
        """All counts, or those of some ids, decayed to this moment.

        Raises:
            BankError: the file is damaged.
        """
        now = self._clock()
        if not self.path.is_file():
            return History({}, None, now)
        try:
            # "rw" makes no file, and reads alone where nothing can be written; "ro" cannot take back what a kill left half done.
            with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=PATIENCE_S)) as open_:
                about = dict(open_.execute("select name, value from about"))
                rows = _some(open_, "select id, score, at, recalls from uses", ids)
                ways = _ways(open_, ids)
        except sqlite3.Error as error:
            raise BankError(
                f"{self.path} cannot be read ({error}), expected a use history: remove it to begin a new one"
            ) from None
        half_life = about.get("half_life_days", HALF_LIFE_DAYS)
        uses = {
            id: Use(decayed(score, now - at, half_life), recalls, ways.pop((id, ENCODED), 0), ways.pop((id, KNOWN), 0))
            for id, score, at, recalls in rows
        }
        uses |= {id: Use(0.0, 0, times) for (id, way), times in ways.items() if way == ENCODED}
        return History(uses, about.get("began"), now, half_life)

    def note_written(self, ids: Iterable[str]) -> None:
        """Note that the memories of these were encoded once, where nothing says so yet: they are about to go."""
        with suppress(sqlite3.Error, OSError), self._changed(patience_s=0) as open_:
            open_.executemany("insert or ignore into ways values (?, ?, 1)", [(id, ENCODED) for id in ids])

    def note_encoded(self, ids: Iterable[str]) -> None:
        """Note that texts were encoded without a recall."""
        with suppress(sqlite3.Error, OSError), self._changed(patience_s=0) as open_:
            open_.executemany(_WAY, [{"id": id, "way": ENCODED, "n": 1} for id in ids])

    def set_half_life(self, days: float) -> None:
        """Let a recall count half after so many days, from now on; `SpecError` where that is no number above 0, `BankError` where it cannot be noted."""
        if not 0 < days < float("inf"):
            raise SpecError(f"found a half-life of {days} days, expected more than 0, and not for ever")
        now = self._clock()
        try:
            with self._changed() as open_:
                open_.execute("update uses set score = decayed(score, ? - at), at = max(at, ?)", (now, now))
                open_.execute("insert or replace into about values ('half_life_days', ?)", (days,))
        except (sqlite3.Error, OSError) as error:
            raise BankError(f"{self.path} cannot be written ({error}), expected a folder that can: try again there") from None

    def take(self, history: History, names: Mapping[str, Sequence[str]]) -> None:
        """Begin with the counts of another bank, under the names that its memories have here; where that fails, without."""
        here = [(id, use) for old, use in history.uses.items() for id in names.get(old, ())]
        rows = [(id, use.score, history.now, use.recalls) for id, use in here if use.recalls]
        ways = [(id, way, n) for id, use in here for way, n in ((ENCODED, use.encoded), (KNOWN, use.known)) if n]
        with suppress(sqlite3.Error, OSError), self._changed() as open_:
            open_.executemany("insert or replace into uses values (?, ?, ?, ?)", rows)
            open_.executemany("insert or replace into ways values (?, ?, ?)", ways)
            if history.began is not None:
                about = [("began", history.began), ("half_life_days", history.half_life_days)]
                open_.executemany("insert or replace into about values (?, ?)", about)

    def forget(self, ids: Iterable[str]) -> None:
        """Remove the history of memories, from the bytes of the file too; a damaged history goes as a whole.

        Raises:
            BankError: other processes write without end, or the disk cannot be written.
        """
        if not self.path.is_file():
            return
        try:
            self._delete(list(ids))
        except (sqlite3.OperationalError, OSError) as error:
            raise BankError(f"{self.path} cannot be written ({error}), expected to forget there too: try again") from None
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)

    def tidy(self, gone: Callable[[list[str]], list[str]]) -> None:
        """Forget what the bank does not have: a process may have been killed between a count and its second look."""
        with suppress(BankError):  # `verify` says that a history is damaged
            self.forget(gone(list(self.history().uses)))

    def _delete(self, ids: list[str]) -> None:
        if ids:
            with self._changed() as open_:
                for table in ("uses", "ways"):
                    open_.executemany(f"delete from {table} where id = ?", [(id,) for id in ids])

    def holders_of(self, ids: Iterable[str]) -> dict[str, list[str]]:
        """Which of these ids stand in the bytes of the history, or of the journal that a kill left beside it, by name of the file."""
        found, wanted = dict[str, list[str]](), sorted(ids)
        for file in (self.path, self.journal):
            with suppress(FileNotFoundError):  # a journal is there for the moment of a count
                data = file.read_bytes()
                found[file.name] = [id for id in wanted if id.encode() in data]
        return found

    @property
    def journal(self) -> Path:
        """Where SQLite keeps what a transaction may have to take back."""
        return self.path.with_name(f"{self.path.name}-journal")

    @contextmanager
    def _changed(self, patience_s: float = PATIENCE_S) -> Iterator[sqlite3.Connection]:
        """A transaction. Nothing is synced: after a power cut a history may be damaged, and begins anew.

        What is deleted is overwritten with zeros, and the journal of a transaction is removed at its end.
        """
        with closing(sqlite3.connect(self.path, timeout=patience_s, isolation_level=None)) as open_:
            for pragma in ("synchronous = off", "secure_delete = on"):
                open_.execute(f"pragma {pragma}")
            open_.execute("begin immediate")
            for table in _TABLES.strip().split("\n"):
                open_.execute(table)
            [(half_life,)] = open_.execute(
                "select coalesce(max(value), ?) from about where name = 'half_life_days'", (HALF_LIFE_DAYS,)
            )
            open_.create_function("decayed", 2, lambda score, age_s: decayed(score, age_s, half_life), deterministic=True)
            yield open_
            open_.execute("commit")


def _some(open_: sqlite3.Connection, query: str, ids: Sequence[str] | None) -> list[Any]:
    """Rows of a query, of all ids or of some."""
    if ids is None:
        return open_.execute(query).fetchall()
    parts = (ids[n : n + _AT_ONCE] for n in range(0, len(ids), _AT_ONCE))
    return [row for some in parts for row in open_.execute(f"{query} where id in ({', '.join('?' * len(some))})", some)]


def _ways(open_: sqlite3.Connection, ids: Sequence[str] | None) -> dict[tuple[str, str], int]:
    """Times of each id and way; a history from before this was counted has none."""
    if not open_.execute("select 1 from sqlite_master where name = 'ways'").fetchone():
        return {}
    return {(id, way): times for id, way, times in _some(open_, "select id, way, times from ways", ids)}


def decayed(score: float, age_s: float, half_life_days: float = HALF_LIFE_DAYS) -> float:
    """What is left of a score after a time; clocks that ran backwards take nothing."""
    return float(score * 0.5 ** (max(0.0, age_s) / DAY_S / half_life_days))


PRIOR = 0.5
"""Uses that a reference is taken to have had before it was watched, at the mean rate of its bank (Jeffreys)."""

R = TypeVar("R", float, "NDArray[np.float64]")


def exposure(age_days: float, half_life_days: float = HALF_LIFE_DAYS) -> float:
    """Days that a reference was watched, faded like its uses; less than a day counts as a day: two uses in a minute are no thousand a
    day.
    """
    life = half_life_days / log(2)
    return life * -expm1(-max(age_days, 1.0) / life)


def posterior_rate(faded: R, exposed_days: float, mean: float) -> R:
    """Uses per day, from uses that fade: the mean of a Gamma distribution whose prior has the mean of the bank.

    A reference with `c` faded uses, seen for `e` faded days, has `(c + a) / (e + a / mean)`, with `a = 1/2`: the first uses do not raise
    a reference to the sky, and what was never used is not impossible.
    """
    return (faded + PRIOR) / (exposed_days + PRIOR / mean)


def expected_uses(history: History, created: dict[str, float], days: float) -> dict[str, float]:
    """Uses of every memory in the coming days, if it is used as it was.

    A memory that was recalled at a rate of `r` a day for `t` days has an expected score of `r * E` with the decayed exposure
    `E = (1 - exp(-k t)) / k`, and its variance is `r * E2` with `E2 = (1 - exp(-2 k t)) / (2 k)`, where `k = ln 2 / half-life`.
    The rate of one memory alone would say 0 for what was never recalled. So it is drawn towards the mean rate `m` of all, by Bühlmann's
    credibility `Z = a / (a + m * E2 / E**2)`, `a` the variance between rates beyond chance: `rate = m + Z * (score / E - m)`. That is
    the best linear estimate, and for counts without decay the posterior mean under a Gamma prior of these two moments. Source:
    H. Bühlmann, Experience rating and credibility, ASTIN Bulletin 4(3), 1967.

    Args:
        history: of the bank.
        created: Unix time when each memory of the bank was written.
        days: how far to look ahead; none of the rates is decayed.

    Raises:
        BankError: nothing was recalled yet.
        SpecError: no time ahead.
    """
    if not days > 0:
        raise SpecError(f"found a horizon of {days} days, expected more than 0")
    known = {id: use.score for id, use in history.uses.items() if id in created and (use.recalls or use.score)}
    if history.began is None or not known:
        raise BankError(
            "found no recalls in the history of this bank, expected some: use it first, or give the expected uses of a file"
        )
    k = log(2) / history.half_life_days
    # A day at least: what was written and recalled within one minute is no thousand uses a day, and use has a daily rhythm.
    ages = {id: max(1.0, (history.now - max(history.began, at)) / DAY_S) for id, at in created.items()}
    exposures = {id: -expm1(-k * t) / k for id, t in ages.items()}
    chances = {id: -expm1(-2 * k * t) / (2 * k) for id, t in ages.items()}
    weight = sum(exposures.values())
    mean = sum(known.values()) / weight
    noise = {id: mean * chances[id] / exposures[id] ** 2 for id in created}
    beyond = sum(e * ((known.get(id, 0.0) / e - mean) ** 2 - noise[id]) for id, e in exposures.items()) / weight
    between = max(0.0, beyond)

    def rate(id: str) -> float:
        return mean + between / (between + noise[id]) * (known.get(id, 0.0) / exposures[id] - mean)

    return {id: days * rate(id) for id in created}
