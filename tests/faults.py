"""The fault campaign: kills, flipped bytes, full disks, readers beside a writer. `make faults` runs it in full.

    python tests/faults.py [--small] [--seed N]

It ends with a table. Nothing may be lost, no wrong byte served, nothing deleted may be left, and every error must be one of ours.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fakes import FakeDecoder, same

from memory3.bank import Bank
from memory3.spec import Memory3Error, Reference
from memory3.verifying import traces_of

HERE = Path(__file__).parent
TMPFS_BYTES = 6 * 2**20


@dataclass
class Tally:
    """What a part of the campaign saw; all but `faults` and `refused` must be 0."""

    name: str
    faults: int = 0
    refused: int = 0
    lost: int = 0
    wrong: int = 0
    left: int = 0
    unclear: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing bad happened."""
        return not (self.lost or self.wrong or self.left or self.unclear)

    def row(self) -> str:
        """A row of the final table."""
        return f"{self.name:28} {self.faults:7} {self.refused:8} {self.lost:6} {self.wrong:6} {self.left:6} {self.unclear:8}"


HEADER = f"{'':28} {'faults':>7} {'refused':>8} {'lost':>6} {'wrong':>6} {'left':>6} {'unclear':>8}"


def text_of(number: int) -> str:
    """A text that no other one holds."""
    return f"The note number {number:06d} speaks of zq{number * 7919 % 1000003:06d} only."


def reference(number: int) -> Reference:
    return Reference(text_of(number), f"notes-{number % 5}.txt", number * 100, number * 100 + 50)


def add(bank: Bank, numbers: list[int]) -> None:
    references = [reference(n) for n in numbers]
    bank.add(references, FakeDecoder().encode([r.text for r in references]))


def check(bank: Bank, there: set[int], gone: set[int], tally: Tally) -> None:
    """Hold a bank against what was committed: each memory with its bytes and text, nothing of what was deleted."""
    known = set(bank.ids())
    for n in there:
        id = reference(n).id
        if id not in known:
            tally.lost += 1
            continue
        [memory], [spans] = bank.read([id]), bank.references([id]).values()
        if not same(memory, FakeDecoder().encode([text_of(n)])[0]) or spans[0].text != text_of(n):
            tally.wrong += 1
    tally.left += sum(reference(n).id in known for n in gone)
    for n in random.Random(0).sample(sorted(gone), min(3, len(gone))):
        traces = traces_of(bank, text_of(n))
        if traces:
            print(f"of {text_of(n)!r} is left: {traces}", file=sys.stderr)
        tally.left += bool(traces)


# ---- kills ----

WORKER = """
import random, sys
from faults import add, reference
from fakes import FakeDecoder
from memory3.bank import Bank
bank, rng, number = Bank(sys.argv[1], FakeDecoder()), random.Random(int(sys.argv[2])), int(sys.argv[3])
there = [int(n) for n in sys.argv[4].split(",") if n]
def say(*words): print(*words, flush=True)
say("ready")
while True:
    draw = rng.random()
    if draw < 0.55 or len(there) < 8:
        some = list(range(number, number + rng.randint(1, 6)))
        number = some[-1] + 1
        say("adding", *some)
        add(bank, some)
        say("added", *some)
        there += some
    elif draw < 0.85:
        some = rng.sample(there, 2)
        say("deleting", *some)
        bank.delete(reference(n).id for n in some)
        say("deleted", *some)
        there = [n for n in there if n not in some]
    else:
        bank.compact()
        say("compacted")
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}


def kills(folder: Path, count: int, rng: random.Random) -> Tally:
    """Kill a process that writes, deletes and compacts at any moment; what it had committed must be there, whole."""
    tally, path = Tally("kills"), folder / "killed"
    add(Bank(path, FakeDecoder(), create=True, max_shard_bytes=9000), list(range(8)))
    there, gone, number = set(range(8)), set[int](), 8
    for n in range(count):
        listed = ",".join(map(str, sorted(there)))
        command = [sys.executable, "-c", WORKER, str(path), str(rng.randrange(10**6)), str(number), listed]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert worker.stdout is not None
        worker.stdout.readline()
        time.sleep(rng.uniform(0.02, 1.2))
        worker.kill()
        said = [line.split() for line in worker.communicate()[0].splitlines()]
        unsure: set[int] = set()
        for verb, *numbers in said:
            these = {int(x) for x in numbers}
            number = max([number, *(x + 1 for x in these)])
            unsure = these if verb in ("adding", "deleting") else set()
            there, gone = (
                (there | these, gone)
                if verb == "added"
                else (there - these, gone | these)
                if verb == "deleted"
                else (there, gone)
            )
        tally.faults += 1
        try:
            bank = Bank(path, FakeDecoder())
            bank.refresh()  # a writer finishes what the kill interrupted
            check(bank, there - unsure, gone, tally)
            known = set(bank.ids())
            in_doubt = {x for x in unsure if reference(x).id in known}
            if said and said[-1][0] == "deleting":  # begun in the journal or not at all: both or none
                tally.lost += len(in_doubt) not in (0, len(unsure))
            there = (there - unsure) | in_doubt
            gone |= {x for x in unsure - in_doubt if said and said[-1][0] == "deleting"}
        except Memory3Error as error:
            print(f"kill {n}: {error}", file=sys.stderr)
            tally.lost += 1
        except Exception as error:
            print(f"kill {n}: {type(error).__name__}: {error}", file=sys.stderr)
            tally.unclear += 1
    return tally


# ---- flipped bytes ----


def flips(folder: Path, count: int, rng: random.Random) -> Tally:
    """Flip one bit of any file; every memory is then served as it was, or refused with one of our errors."""
    tally, path = Tally("flipped bits"), folder / "flipped"
    bank = Bank(path, FakeDecoder(), create=True, max_shard_bytes=9000)
    add(bank, list(range(24)))
    bank.refresh(keep_versions=False)
    bank.close()
    truth = {reference(n).id: n for n in range(24)}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    for _ in range(count):
        file = rng.choice(files)
        place, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        tally.faults += 1
        refused = 0
        try:
            opened = Bank(path, FakeDecoder())
            for id in opened.ids():
                refused += _served(opened, id, truth, tally)
            opened.search("zq007919", 3)
        except Memory3Error:
            refused = 1
        except BaseException as error:
            print(f"{file.relative_to(path)} byte {place}: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
            tally.unclear += 1
        tally.refused += bool(refused)
        file.write_bytes(whole)
    check(Bank(path, FakeDecoder()), set(range(24)), set(), tally)
    return tally


def _served(bank: Bank, id: str, truth: dict[str, int], tally: Tally) -> bool:
    """Whether a memory was refused; served wrong counts."""
    try:
        [memory], [spans] = bank.read([id]), bank.references([id]).values()
    except Memory3Error:
        return True
    n = truth.get(id)
    right = n is not None and spans[0].text == text_of(n) and same(memory, FakeDecoder().encode([text_of(n)])[0])
    tally.wrong += not right
    return False


# ---- full disk ----


def full_disk(count: int, rng: random.Random) -> Tally | None:
    """Fill a small tmpfs up to a few kilobytes and write; `None` where no tmpfs can be mounted."""
    tally = Tally("full disk")
    with tempfile.TemporaryDirectory() as mount:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", mount], capture_output=True
        ).returncode:
            return None
        try:
            for n in range(count):
                _one_full_disk(Path(mount), n, count, rng, tally)
        finally:
            subprocess.run(["umount", "-l", mount], check=False)
    return tally


def _one_full_disk(mount: Path, n: int, count: int, rng: random.Random, tally: Tally) -> None:
    path, filler = mount / "bank", mount / "filler"
    bank = Bank(path, FakeDecoder(), create=True, max_shard_bytes=9000)
    add(bank, list(range(10)))
    there, gone = set(range(10)), set[int]()
    free = shutil.disk_usage(mount).free
    left = int(free * n / count * 0.02) + rng.randrange(4096)  # from nothing to a few hundred kilobytes
    with filler.open("wb") as file:
        file.write(bytes(max(0, free - left)))
    tally.faults += 1
    try:
        for start in range(10, 400, 30):
            some = list(range(start, start + 30))
            add(bank, some)
            there |= set(some[1:])  # the first is to go: once that is noted it may go later, as after a kill
            bank.delete([reference(start).id])
            gone |= {start}
    except Memory3Error:
        tally.refused += 1
    except Exception as error:
        print(f"full disk {n}: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
        tally.unclear += 1
    filler.unlink()
    try:
        after = Bank(path, FakeDecoder())
        after.refresh()
        check(after, there, gone, tally)
    except Memory3Error as error:
        print(f"full disk {n}, afterwards: {error}", file=sys.stderr)
        tally.lost += 1
    shutil.rmtree(path)


# ---- readers beside a writer ----

READER = """
import random, sys, time
from faults import reference, text_of
from fakes import FakeDecoder, same
from memory3.bank import Bank
from memory3.spec import BankError
bank, rng, until = Bank(sys.argv[1], FakeDecoder()), random.Random(int(sys.argv[2])), time.monotonic() + float(sys.argv[3])
decoder, reads, gone, wrong, unclear = FakeDecoder(), 0, 0, 0, 0
while time.monotonic() < until:
    try:
        hits = bank.search("note number", 5) if rng.random() < 0.5 else []
        ids = [h.id for h in hits] or rng.sample(bank.ids(), 3)
        for id in ids:
            try:
                text = bank.references([id])[id][0].text
                wrong += not same(bank.read([id])[0], decoder.encode([text])[0])
                reads += 1
            except BankError as error:  # deleted since the search: said so, and true
                gone += 1
                unclear += "has no memory" not in str(error)
    except Exception as error:
        unclear += 1
        print(type(error).__name__, str(error)[:200], file=sys.stderr)
print(reads, gone, wrong, unclear)
"""


def readers(folder: Path, seconds: float, rng: random.Random) -> Tally:
    """Three readers and one writer at once: each read is whole and right, or the memory is gone and said to be."""
    tally, path = Tally("three readers, one writer"), folder / "read"
    bank = Bank(path, FakeDecoder(), create=True, max_shard_bytes=9000)
    add(bank, list(range(30)))
    there, number = list(range(30)), 30
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(n), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for n in range(3)
    ]
    until = time.monotonic() + seconds + 2
    while time.monotonic() < until:
        tally.faults += 1
        draw = rng.random()
        if draw < 0.5:
            add(bank, list(range(number, number + 5)))
            there += range(number, number + 5)
            number += 5
        elif draw < 0.85:
            some = rng.sample(there, 3)
            bank.delete(reference(n).id for n in some)
            there = [n for n in there if n not in some]
        else:
            bank.compact()
    for reader in started:
        out, _ = reader.communicate()
        reads, _, wrong, unclear = map(int, out.split())
        tally.wrong += wrong
        tally.unclear += unclear + (reads == 0)
    check(Bank(path, FakeDecoder()), set(there), set(), tally)
    return tally


def campaign(small: bool, seed: int) -> list[Tally]:
    """All parts; a part that cannot run here is named on stderr."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: list[Callable[[], Tally | None]] = [
            lambda: kills(folder, 3 if small else 50, rng),
            lambda: flips(folder, 25 if small else 200, rng),
            lambda: full_disk(3 if small else 20, rng),
            lambda: readers(folder, 4 if small else 60, rng),
        ]
        done = []
        for part in parts:
            done.append(part())
            if not small and done[-1] is not None:
                print(done[-1].row(), file=sys.stderr, flush=True)
    if done[2] is None:
        print("full disk: left out, no tmpfs can be mounted here", file=sys.stderr)
    return [tally for tally in done if tally is not None]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tallies = campaign(arguments.small, arguments.seed)
    print(HEADER)
    for tally in tallies:
        print(tally.row())
    return 0 if all(tally.clean for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
