"""What may be kept for an update, by all parameters of a model together."""

from __future__ import annotations

import gc

import pytest

from regrow.storage import memory
from regrow.storage.memory import Memory


class Member:
    def __init__(self, kept: int, unfinished: int = 0) -> None:
        self.kept_bytes = kept
        self.unfinished = unfinished

    def forget_unfinished(self) -> None:
        self.kept_bytes -= self.unfinished
        self.unfinished = 0


def test_a_claim_counts_what_all_members_keep() -> None:
    limited = Memory(100)
    members = [Member(30), Member(50)]
    for member in members:
        limited.join(member)
    limited.claim(20)
    with pytest.raises(RuntimeError, match="at least 101 bytes of inputs and output gradients, above the limit of 100"):
        limited.claim(21)


def test_members_forget_what_they_can_do_without_before_a_claim_is_refused() -> None:
    limited = Memory(100)
    members = [Member(30, unfinished=10), Member(50, unfinished=5)]
    for member in members:
        limited.join(member)
    limited.claim(20)
    assert [m.kept_bytes for m in members] == [30, 50]
    limited.claim(35)
    assert [m.kept_bytes for m in members] == [20, 45]
    with pytest.raises(RuntimeError, match="at least 101 bytes"):
        limited.claim(36)


def test_a_member_that_is_gone_counts_no_more() -> None:
    limited = Memory(100)
    member = Member(90)
    limited.join(member)
    del member
    gc.collect()
    limited.claim(100)


def test_without_a_limit_a_quarter_of_the_free_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e6 < Memory().limit < 1e13
    monkeypatch.setattr(memory.Path, "read_text", lambda self: "MemTotal: 9 kB\nMemAvailable:   4000 kB\n")
    assert Memory().limit == 1_024_000
    monkeypatch.setattr(memory.Path, "read_text", lambda self: "nothing of that kind")
    assert 1e6 < Memory().limit < 1e13
