"""The fault campaign in small; `make faults` runs it in full."""

from __future__ import annotations

from faults import campaign


def test_no_fault_loses_a_memory_serves_a_wrong_byte_or_leaves_what_was_deleted() -> None:
    tallies = campaign(small=True, seed=1)
    assert len(tallies) >= 3
    assert [tally for tally in tallies if not tally.clean] == []
    assert all(tally.faults for tally in tallies)
