from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.core.draws import Stream

WORD = 2**64 - 1

GOLDEN = """
import numpy as np
import torch
from torch import nn
import regrow
from regrow import methods
from regrow.core.draws import Stream
model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
sparsifier = regrow.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), methods.static(0.3), seed=3)
print(Stream(0, "fc.weight", 100).integers(1000, 6).tolist())
print(Stream(7, "a.b", 3).uniform(3).tolist())
print(Stream(0, "fc.weight", 100).subset(50, 8).tolist())
print(Stream(1, "fc.weight", 0).subset(12, 9).tolist())
print(Stream(0, "fc.weight", 100).normal(3).tolist())
print(Stream(0, "fc.weight", 100).signs(np.arange(16)).tolist())
for topology in sparsifier.topologies.values():
    print(topology.indices.tolist())
"""

PRINTED = """\
[330, 165, 689, 477, 646, 954]
[0.664107579128688, 0.31090125671586477, 0.02556277074199098]
[4, 11, 15, 23, 27, 30, 39, 46]
[0, 1, 3, 4, 5, 6, 7, 10, 11]
[-0.97528076171875, 0.578033447265625, 0.458770751953125]
[1, 1, -1, -1, 1, 1, 1, -1, 1, 1, -1, 1, 1, -1, -1, -1]
"""


def philox(key: int, count: int) -> list[int]:
    """Philox 4x64-10 of Salmon et al. 2011, section 3.2, from counter 1 on."""
    words: list[int] = []
    for block in range(1, -(-count // 4) + 1):
        x0, x1, x2, x3 = block, 0, 0, 0
        k0, k1 = key & WORD, key >> 64
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1, x2, x3 = (b >> 64) ^ x1 ^ k0, b & WORD, (a >> 64) ^ x3 ^ k1, a & WORD
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
        words += [x0, x1, x2, x3]
    return words[:count]


def key(seed: int, name: str, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}\0{step}".encode(), digest_size=16).digest(), "little")


def golden_lines(hash_seed: str) -> list[str]:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", GOLDEN], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines(keepends=True)


def test_draws_are_the_same_in_every_process() -> None:
    """Property 18: identical across processes and PYTHONHASHSEED; a change of any stream is noticed here."""
    lines = golden_lines("1234")
    assert "".join(lines[:6]) == PRINTED
    assert lines[6:] == ["[0, 1, 2, 9, 20, 22, 24, 25]\n", "[3, 10, 14, 15, 17, 18, 19]\n"]


@given(st.integers(0, 2**40), st.text(max_size=12), st.integers(0, 10**9), st.integers(1, 40))
def test_words_are_those_of_the_published_generator(seed: int, name: str, step: int, count: int) -> None:
    words = philox(key(seed, name, step), count)
    assert Stream(seed, name, step).integers(97, count).tolist() == [w % 97 for w in words]
    assert Stream(seed, name, step).uniform(count).tolist() == [(w >> 11) / 2**53 for w in words]


def test_seed_name_and_step_each_make_another_stream() -> None:
    """Property 18: two seeds give different draws."""
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", 1), (0, "a", 11)]
    draws = [tuple(Stream(*k).integers(2**62, 2).tolist()) for k in keys]
    assert len(set(draws)) == len(keys)


@given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 99))
def test_a_subset_has_exactly_count_ascending_members(total: int, fraction: float, seed: int) -> None:
    """Property 18: exact counts."""
    count = round(fraction * total)
    chosen = Stream(seed, "w", 0).subset(total, count)
    assert chosen.dtype == np.int64
    assert chosen.size == count
    assert (np.diff(chosen) > 0).all()
    assert count == 0 or (chosen[0] >= 0 and chosen[-1] < total)


@pytest.mark.parametrize(("total", "count"), [(6, 2), (6, 3), (6, 4)])
def test_every_subset_is_equally_likely(total: int, count: int) -> None:
    """Property 18: uniform by chi-square, below, at and above half of the positions."""
    subsets = list(combinations(range(total), count))
    seen = dict.fromkeys(subsets, 0)
    draws = 150 * len(subsets)
    for seed in range(draws):
        seen[tuple(Stream(seed, "w", 0).subset(total, count).tolist())] += 1
    chi_square = sum((n - 150) ** 2 / 150 for n in seen.values())
    freedom = len(subsets) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_small_subset_of_a_huge_range_lists_nothing() -> None:
    chosen = Stream(0, "w", 0).subset(2**60, 1000)
    assert chosen.size == 1000
    assert chosen[-1] > 2**59


def test_successive_draws_of_one_stream_differ() -> None:
    stream = Stream(0, "w", 0)
    assert stream.integers(2**62, 3).tolist() != stream.integers(2**62, 3).tolist()


@pytest.mark.parametrize("count", [-1, 11])
def test_an_impossible_subset_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"a subset of 10 members cannot have {count}: ask for 0 to 10"):
        Stream(0, "w", 0).subset(10, count)


@given(st.integers(0, 2**40), st.text(max_size=12), st.integers(0, 10**9), st.integers(0, 40))
def test_normal_draws_are_sums_of_the_words_sixteen_bit_parts(seed: int, name: str, step: int, count: int) -> None:
    """Three words each; what is drawn next begins right behind them."""
    *words, after = philox(key(seed, name, step), 3 * count + 1)
    parts = [w >> shift & 0xFFFF for w in words for shift in (0, 16, 32, 48)]
    sums = [sum(parts[12 * i : 12 * i + 12]) for i in range(count)]
    stream = Stream(seed, name, step)
    assert stream.normal(count).tolist() == [(s - 6 * 0xFFFF) / 2**16 for s in sums]
    assert stream.integers(97, 1).tolist() == [after % 97]


def test_normal_draws_have_the_moments_that_they_claim() -> None:
    """Mean 0, variance 1, fourth moment 2.9, and the tails of a normal law within sampling error."""
    draws = Stream(0, "w", 0).normal(200_000)
    assert [float((draws**k).mean()) for k in (1, 2, 3, 4)] == pytest.approx([0, 1, 0, 2.9], abs=0.03)
    for x, beyond in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert (np.abs(draws) > x).mean() == pytest.approx(beyond, rel=0.3, abs=0.004)
    assert np.abs(draws).max() < 6


def split_mix(seed: int, position: int) -> int:
    """Output number `position` of SplitMix64 (Steele, Lea and Flood 2014), whose state grows by the golden gamma."""
    z = seed + (position + 1) * 0x9E3779B97F4A7C15 & WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


@given(st.integers(0, 2**40), st.text(max_size=12), st.lists(st.integers(0, 2**62), max_size=20))
def test_signs_are_a_published_hash_of_the_position(seed: int, name: str, positions: list[int]) -> None:
    """Whatever the step, and one at a time as all at once."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0signs".encode(), digest_size=8).digest()
    wanted = [1 - 2 * (split_mix(int.from_bytes(digest, "little"), p) >> 63) for p in positions]
    found = [Stream(seed, name, step).signs(np.array(positions, dtype=np.int64)).tolist() for step in (0, 7)]
    assert found == [wanted, wanted]
    assert [Stream(seed, name, 1).signs(np.array([p]))[0] for p in positions] == wanted


def test_signs_are_balanced_and_independent() -> None:
    """Between neighbours, names and seeds they agree half of the time."""
    here = np.arange(100_000)
    signs = [Stream(*k).signs(here).astype(int) for k in ((0, "a", 0), (0, "b", 0), (1, "a", 0))]
    products = [*signs, signs[0] * signs[1], signs[0] * signs[2], signs[0][1:] * signs[0][:-1], signs[0][1::2]]
    assert all(abs(p.mean()) < 0.015 for p in products)


def test_signs_draw_nothing() -> None:
    one, other = Stream(0, "w", 0), Stream(0, "w", 0)
    one.signs(np.arange(9))
    assert one.integers(2**62, 3).tolist() == other.integers(2**62, 3).tolist()
