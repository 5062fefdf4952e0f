"""The first topologies: random ones, scores, given ones, and those of a trained model against plain NumPy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import regrow
from regrow import methods
from regrow.app.vocabulary import STARTS
from regrow.core.draws import Stream
from regrow.core.method import Method, Need
from regrow.core.topology import Topology
from regrow.engine.probe import NoProbe
from regrow.parts import starts
from regrow.parts.allocation import apportion, explicit, globally, uniform
from regrow.parts.drops import lowest
from regrow.parts.growth import gradient, highest
from regrow.parts.schedules import constant, cubic
from regrow.parts.scores import magnitude, random, saliency
from regrow.parts.starts import by_score, dense, random_topology
from regrow.parts.structures import rows
from regrow.parts.updates import chain, drop_and_grow, every, prune
from support.fakes import Fake, together
from support.pairs import positions, require_inert_tails, tensors
from support.paper import Array, Arrays, Batch, backward, batches, network, sgd, share_out, top


def fresh(*sizes: int, seed: int = 0) -> list[Fake]:
    weights = [Fake(torch.arange(1.0, n + 1), name=f"w{i}") for i, n in enumerate(sizes)]
    for weight in weights:
        weight.generator = Stream(seed, weight.name, 0)
    return weights


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 9))
def test_a_random_start_has_exact_counts_and_keeps_values(sizes: list[int], density: float, seed: int) -> None:
    """Properties 9 and 18."""
    weights = fresh(*sizes, seed=seed)
    random_topology(density, uniform).make(together(*weights), NoProbe())
    counts = apportion([float(n) for n in sizes], int(density * sum(sizes) + 0.5), sizes)
    assert [w.topology.nnz for w in weights] == counts
    for weight in weights:
        assert torch.equal(weight.dense, torch.arange(1.0, weight.topology.numel + 1) * weight.topology.mask.view(-1))


def test_a_random_start_is_the_subset_of_its_stream() -> None:
    (weight,) = fresh(50)
    random_topology(0.2, uniform).make(together(weight), NoProbe())
    assert weight.topology.indices.tolist() == Stream(0, "w0", 0).subset(50, 10).tolist()


def test_every_position_is_equally_likely() -> None:
    """Property 18: mean activity uniform by chi-square; two seeds give different topologies."""
    seen = np.zeros(20)
    for seed in range(1000):
        (weight,) = fresh(20, seed=seed)
        random_topology(0.3, uniform).make(together(weight), NoProbe())
        seen[weight.topology.indices.numpy()] += 1
    # Without replacement: each place has variance 1000 x 0.3 x 0.7, summing to a chi-square of 19 degrees of freedom.
    chi_square = ((seen - 300) ** 2 / 210).sum() * 19 / 20
    assert chi_square < 43.8


def test_dense_leaves_everything_active() -> None:
    weights = fresh(7, 3)
    dense().make(together(*weights), NoProbe())
    assert [w.topology.positions for w in weights] == [None, None]
    assert not dense().needs_gradient


def test_a_random_start_of_density_one_costs_no_positions() -> None:
    (weight,) = fresh(7)
    random_topology(1.0, uniform).make(together(weight), NoProbe())
    assert weight.topology.positions is None


def test_a_start_without_density_takes_the_explicit_ones() -> None:
    weights = fresh(10, 20)
    random_topology(None, explicit({"w0": 0.5, "w1": 0.1})).make(together(*weights), NoProbe())
    assert [w.topology.nnz for w in weights] == [5, 2]


def test_by_score_keeps_the_highest_in_each_and_anywhere() -> None:
    """Property 30: global and layer-wise options give exact K."""
    for allocate, expected in ((uniform, [[2, 3], [4, 5, 6, 7]]), (globally, [[], [2, 3, 4, 5, 6, 7]])):
        weights = [Fake([1, 2, 3, 4], name="a"), Fake(torch.arange(11.0, 19), name="b")]
        start = by_score(0.5, magnitude, allocate)
        assert not start.needs_gradient
        start.make(together(*weights), NoProbe())
        assert [w.topology.indices.tolist() for w in weights] == expected


def test_by_score_says_whether_it_needs_a_gradient() -> None:
    assert by_score(0.5, saliency, globally, needs_gradient=True).needs_gradient


def test_saliency_is_the_product_of_value_and_gradient() -> None:
    """Property 30: |w g|, at active entries."""
    weight = Fake([1, -2, 3, 0], [0, 1, 2], [5, 7, -1, 100])
    assert saliency(weight).tolist() == [5, 14, 3]
    assert magnitude(weight).tolist() == [1, 2, 3]


def test_saliency_of_half_precision_does_not_underflow() -> None:
    """Scores are float32 or wider: the product of two small halves must not become a tie at zero."""
    for dtype in (torch.float16, torch.bfloat16):
        weight = Fake([0.0, 0.0])
        weight.dense = torch.tensor([1e-3, 1e-3], dtype=dtype)
        weight.grad = torch.tensor([1e-5, 1.004e-5], dtype=torch.float32).to(dtype)
        small, large = saliency(weight).double().tolist()
        exact = (weight.dense.double() * weight.grad.double()).tolist()
        assert [small, large] == pytest.approx(exact, rel=1e-6)


def test_a_random_score_is_that_of_the_stream() -> None:
    (weight,) = fresh(6)
    assert random(weight).tolist() == Stream(0, "w0", 0).uniform(6).tolist()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(kind: str, seed: int, make: Callable[[Any], torch.optim.Optimizer] = sgd) -> tuple[nn.Module, Any]:
    """A dense network after three steps, with the optimizer that made them."""
    model = network(kind, seed)
    optimizer = make(model) if make is sgd else make(model.parameters())
    for batch in batches(kind, seed, 3):
        backward(model, batch)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def weights_of(model: nn.Module) -> Arrays:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.dim() > 1}


def gradients_of(model: nn.Module, data: list[Batch]) -> Arrays:
    """The mean over batches, by plain autograd."""
    names = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    found = [torch.autograd.grad(loss_of(model, b), list(names.values())) for b in data]
    return {n: np.mean([g[i].numpy() for g in found], axis=0) for i, n in enumerate(names)}


def best_rows(score: Array, entries: int, among: Array) -> Array:
    """A mask of whole outputs, by mean score, whose entries are nearest to a number; fewer where two are."""
    size = score[0].size
    order = top(score.reshape(len(score), -1).mean(1), len(score), among)
    taken = min(range(1, len(order) + 1), key=lambda k: (abs(k * size - entries), k))
    mask = np.zeros(score.shape, bool)
    mask[order[:taken]] = True
    return mask


def best(score: Array, count: int, among: Array) -> Array:
    mask = np.zeros(score.size, bool)
    mask[top(score.ravel(), count, np.flatnonzero(among))] = True
    return mask.reshape(score.shape)


def expected(name: str, density: float, fraction: float, w: Arrays, g: Arrays) -> tuple[Arrays, Arrays]:
    """Masks and values of a start, from its description."""
    total = math.floor(density * sum(x.size for x in w.values()) + 0.5)
    if "global" in name:
        owner = np.repeat(list(w), [x.size for x in w.values()])
        pooled = np.concatenate([np.abs(x).ravel() for x in w.values()])
        kept = owner[np.argsort(-pooled, kind="stable")[:total]]
        counts = [int((kept == n).sum()) for n in w]
    else:
        counts = share_out([x.size for x in w.values()], total, [x.size for x in w.values()])
    masks, values = {}, {}
    for i, (n, x) in enumerate(w.items()):
        by_rows, everything = "structured" in name and i < len(w) - 1, np.ones(x.shape, bool)
        size, outputs = x[0].size, np.arange(len(x))
        mask = best_rows(np.abs(x), counts[i], outputs) if by_rows else best(np.abs(x), counts[i], everything)
        masks[n], values[n] = mask, x * mask
        if "grow" not in name:
            continue
        stay = mask.sum() - math.floor(fraction * mask.sum() + 1e-9)
        if by_rows:
            held = np.flatnonzero(mask.reshape(len(x), -1).any(1))
            kept = best_rows(np.abs(x), stay, held) if stay else ~everything
            free = np.flatnonzero(~kept.reshape(len(x), -1).any(1))
            left = int(mask.sum() - kept.sum())
            grown = best_rows(np.abs(g[n]), left, free) if left else ~everything
            assert grown.sum() == left == left // size * size
        else:
            kept = best(np.abs(x), stay, mask)
            grown = best(np.abs(g[n]), int(mask.sum() - stay), ~kept)
        masks[n], values[n] = kept | grown, x * kept
    return masks, values


def dense_values(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {k: v for k, v in tensors(model, *optimizers).items() if not k.endswith(":grad")}


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", STARTS)
def test_a_trained_model_is_pruned_as_described(name: str, kind: str, storage: Any) -> None:
    """Properties 9, 10 and 37: exact counts, the largest magnitudes with their values, grown entries at zero."""
    for seed, density in ((0, 0.3), (1, 0.5), (2, 0.07)):
        model, optimizer = trained(kind, seed)
        data = batches(kind, seed)[3:6]
        masks, values = expected(name, density, 0.5, weights_of(model), gradients_of(model, data))
        start = STARTS[name](density)
        assert start.needs_gradient == ("grow" in name)
        more = {"batches": data, "loss": loss_of} if start.needs_gradient else {}
        method = methods.static(density)._replace(start=start)
        sparsifier = regrow.sparsify(model, optimizer, method, storage=storage, **more)
        found = dense_values(model, optimizer)
        for n, topology in sparsifier.topologies.items():
            assert (topology.mask.numpy() == masks[n]).all(), (n, seed)
            assert (found[f"{n}:value"].numpy() == values[n].ravel()).all()
            momentum = found[f"{n}:momentum_buffer"].numpy()
            assert not momentum[values[n].ravel() == 0].any()
            assert momentum[values[n].ravel() != 0].all()
        total = math.floor(density * sum(m.size for m in masks.values()) + 0.5)
        assert "structured" in name or sum(int(m.sum()) for m in masks.values()) == total
        assert not all(m.all() for m in masks.values())


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("name", [n for n in STARTS if "grow" in n])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_start_takes_the_first_step(name: str, fraction: float, storage: Any) -> None:
    """Property 24: without batches the first gradient is used for the start; nothing else moves."""
    model, optimizer = trained("conv", 4)
    data = batches("conv", 4)
    w, g = weights_of(model), gradients_of(model, data[5:6])
    masks, values = expected(name, 0.4, fraction, w, g)
    start = getattr(starts, name)(0.4, fraction)
    method = methods.rigl(0.4, until=9, interval=3)._replace(start=start)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1}
    sparsifier = regrow.sparsify(model, optimizer, method, storage=storage, allow_dense=True)
    assert not sparsifier.started
    backward(model, data[5])
    optimizer.step()
    assert sparsifier.started and sparsifier.step == 1
    found = dense_values(model, optimizer)
    for n, topology in sparsifier.topologies.items():
        assert (topology.mask.numpy() == masks[n]).all(), n
        assert (found[f"{n}:value"].numpy() == values[n].ravel()).all()
        assert not found[f"{n}:momentum_buffer"].numpy()[values[n].ravel() == 0].any()
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def test_without_batches_compressed_storage_says_that_the_model_is_dense() -> None:
    model, optimizer = trained("mlp", 0)
    method = methods.static(0.3)._replace(start=starts.prune_and_grow_global(0.3))
    with pytest.raises(ValueError, match=r"starts from a dense model's gradient, unless batches= and loss= are given"):
        regrow.sparsify(model, optimizer, method, storage="compressed")
    plain = methods.static(0.3)._replace(start=starts.prune_global(0.3))
    with pytest.raises(ValueError, match=r"static reads no gradient at its start: leave out batches= and loss="):
        regrow.sparsify(model, optimizer, plain, batches=batches("mlp", 0), loss=loss_of)


def test_adam_newcomers_of_a_trained_model_begin_alike_in_both_storages() -> None:
    """Properties 11 and 12: first moments at zero, second ones at the mean over what was kept."""
    found = {}
    for storage in ("masked", "compressed"):
        model, optimizer = trained("mlp", 0, lambda p: torch.optim.Adam(p, lr=0.01))
        w, before = weights_of(model), tensors(model, optimizer)
        data = batches("mlp", 0)[3:5]
        masks, values = expected("prune_and_grow_uniform", 0.4, 0.5, w, gradients_of(model, data))
        method = methods.static(0.4)._replace(start=starts.prune_and_grow_uniform(0.4))
        regrow.sparsify(model, optimizer, method, storage=storage, batches=data, loss=loss_of)
        found[storage] = dense_values(model, optimizer)
        for n, mask in masks.items():
            kept = values[n].ravel() != 0
            grown = mask.ravel() & ~kept
            second, old = found[storage][f"{n}:exp_avg_sq"].numpy(), before[f"{n}:exp_avg_sq"].numpy()
            assert grown.any()
            assert not found[storage][f"{n}:exp_avg"].numpy()[~kept].any()
            assert (second[kept] == old[kept]).all()
            np.testing.assert_allclose(second[grown], old[kept].mean(), rtol=1e-12)
            assert not second[~mask.ravel()].any()
    assert all(torch.equal(v, found["compressed"][k]) for k, v in found["masked"].items())


@pytest.mark.parametrize("name", ["prune_uniform", "prune_global"])
def test_ties_and_zeros_do_not_change_the_count(name: str) -> None:
    """Property 37: values of three sizes, most of them zero; a threshold would keep too many, or all."""
    model = network("mlp", 0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 4).round().clamp(-1, 1) * (torch.arange(p.numel()).view(p.shape) % 3 == 0))
    w = weights_of(model)
    masks, _ = expected(name, 0.6, 0, w, {})
    assert sum(int((x != 0).sum()) for x in w.values()) < 0.4 * sum(x.size for x in w.values())
    sparsifier = regrow.sparsify(model, sgd(model), methods.static(0.6)._replace(start=STARTS[name](0.6)))
    assert sum(t.nnz for t in sparsifier.topologies.values()) == math.floor(0.6 * 240 + 0.5)
    assert all((t.mask.numpy() == masks[n]).all() for n, t in sparsifier.topologies.items())


def test_the_last_weight_may_lose_whole_outputs_too() -> None:
    """Property 48: `last`."""
    model, optimizer = trained("mlp", 0)
    w = weights_of(model)["4.weight"]
    start = starts.prune_structured(0.5, last=rows)
    sparsifier = regrow.sparsify(model, optimizer, methods.static(0.5)._replace(start=start))
    kept = np.sort(top(np.abs(w).mean(1), 2, np.arange(4)))
    assert sparsifier.topologies["4.weight"].mask.all(1).nonzero().view(-1).tolist() == kept.tolist()
    assert sparsifier.topologies["4.weight"].nnz == 18
    model, optimizer = trained("mlp", 0)
    data = {"batches": batches("mlp", 0)[:1], "loss": loss_of}
    start = starts.prune_and_grow_structured(0.5, 1.0, last=rows)
    g = gradients_of(model, batches("mlp", 0)[:1])["4.weight"]
    sparsifier = regrow.sparsify(model, optimizer, methods.static(0.5)._replace(start=start), **data)
    grown = np.sort(top(np.abs(g).mean(1), 2, np.arange(4)))
    assert sparsifier.topologies["4.weight"].mask.all(1).nonzero().view(-1).tolist() == grown.tolist()


def granet_like(density: float) -> Method:
    """A ramp down to `density`, and at each of its steps a drop and a growth."""
    ramp = prune(cubic(2 * density, density, 7), magnitude, globally)
    return Method(
        "granet-like",
        dense(),
        every(2, chain(ramp, drop_and_grow(constant(0.4), lowest(magnitude), highest(gradient))), until=8),
        timing="after",
        needs=Need.GRADIENT,
    )


METHODS: dict[str, Callable[[float], Method]] = {
    "static": methods.static,
    "set": lambda d: methods.set_(d, until=8, interval=2),
    "rigl": lambda d: methods.rigl(d, until=8, interval=2),
    "snfs": lambda d: methods.snfs(d, until=8, interval=2),
    "srigl": lambda d: methods.srigl(d, until=8, interval=2, ablation=0.0),
    "granet": granet_like,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STARTS)
def test_any_method_goes_on_from_a_trained_model(name: str, method: str) -> None:
    """Properties 1, 9 and 11, and both storages make the same run; compressed values have no more room than needed."""
    logs: dict[str, list[Any]] = {}
    for storage in ("masked", "compressed"):
        model, optimizer = trained("conv", 7)
        data = batches("conv", 7, 14)
        recipe = METHODS[method](0.3)._replace(start=STARTS[name](0.6 if method == "granet" else 0.3))
        more = {"batches": data[:2], "loss": loss_of} if recipe.start.needs_gradient else {}
        sparsifier = regrow.sparsify(model, optimizer, recipe, storage=storage, allow_dense=True, **more)
        first = {n: t.nnz for n, t in sparsifier.topologies.items()}
        if storage == "compressed":
            room = {n: sum(first.values()) if method == "snfs" else first[n] for n in first}
            sizes = {n: math.prod(w.shape) for w in sparsifier.weights for n in [w.name]}
            assert {n: model.get_parameter(n).numel() for n in first} == {n: min(room[n], sizes[n]) for n in first}
        logs[storage] = []
        for batch in data[2:]:
            backward(model, batch)
            optimizer.step()
            masks = {n: t.mask.numpy() for n, t in sparsifier.topologies.items()}
            logs[storage].append(masks)
            if method not in ("snfs", "granet"):
                assert {n: int(m.sum()) for n, m in masks.items()} == first
            found = dense_values(model, optimizer)
            for n, mask in masks.items():
                held = [found[f"{n}:{key}"] for key in ("value", "momentum_buffer")]
                assert not any(x.numpy()[~mask.ravel()].any() for x in held)
            if storage == "compressed":
                assert set(positions(model)) == set(masks)
                require_inert_tails(model, optimizer)
        total = sum(int(m.sum()) for m in masks.values())
        assert total == (math.floor(0.3 * sparsifier.numel + 0.5) if method == "granet" else sum(first.values()))
        moved = any((logs[storage][0][n] != masks[n]).any() for n in masks)
        assert moved == (method != "static")
    for ours, theirs in zip(logs["masked"], logs["compressed"], strict=True):
        assert all((ours[n] == theirs[n]).all() for n in ours)


def given_topologies(seed: int = 3) -> dict[str, Topology]:
    model = network("conv", 0)
    return regrow.sparsify(model, sgd(model), methods.static(0.4), seed=seed).topologies


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_given_topologies_are_taken_with_the_model_s_own_values(method: str, storage: Any) -> None:
    """Property 35: equal masks, the values of this model where they are active and zero elsewhere."""
    topologies = given_topologies()
    model, optimizer = trained("conv", 1)
    before = {n: torch.from_numpy(w) for n, w in weights_of(model).items()}
    start = starts.given(topologies)
    assert not start.needs_gradient
    sparsifier = regrow.sparsify(model, optimizer, METHODS[method](0.1)._replace(start=start), storage=storage)
    assert sparsifier.topologies == topologies
    found = tensors(model)
    for n, topology in topologies.items():
        assert torch.equal(found[f"{n}:value"], (before[n] * topology.mask).view(-1))
    for batch in batches("conv", 1):
        backward(model, batch)
        optimizer.step()
    assert {n: t.nnz for n, t in sparsifier.topologies.items()} == {n: t.nnz for n, t in topologies.items()}
    assert (sparsifier.topologies == topologies) == (method == "static")


def test_given_topologies_suit_a_model_on_the_meta_device() -> None:
    topologies = {"weight": Topology((5, 7), torch.tensor([0, 3, 20, 34]))}
    with torch.device("meta"):
        model = nn.Linear(7, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = methods.static(0.1)._replace(start=starts.given(topologies))
    sparsifier = regrow.sparsify(model, optimizer, method, storage="compressed")
    assert sparsifier.topologies == topologies
    assert model.weight.shape == (4,)


TWO = {"0.weight": (3, 4), "1.weight": (2, 3)}


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (
            {"0.weight": (3, 4)},
            r"given: of 2 weights 1 have no topology \(1.weight\) and 0 topologies no weight \(none\): sparsify",
        ),
        (
            TWO | {"2.weight": (2, 2)},
            r"given: of 2 weights 0 have no topology \(none\) and 1 topologies no weight \(2.weight\)",
        ),
        (TWO | {"1.weight": (3, 2)}, r"given: 1.weight has shape \(2, 3\), and its topology \(3, 2\)"),
    ],
)
def test_topologies_of_another_model_are_refused_before_anything_changes(
    shapes: Mapping[str, tuple[int, ...]], told: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    topologies = {n: Topology(shape, torch.tensor([0])) for n, shape in shapes.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"^{told}"):
        regrow.sparsify(model, optimizer, methods.static(0.5)._replace(start=starts.given(topologies)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", STARTS)
def test_bad_values_of_a_start_are_refused_by_name(name: str) -> None:
    """Property 48."""
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"^{name}: density must lie in \(0, 1\], got {density:g}"):
            STARTS[name](density)
    if "grow" in name:
        with pytest.raises(ValueError, match=rf"^{name}: the drop fraction must lie in \[0, 1\], got 1.5"):
            getattr(starts, name)(0.5, 1.5)
    with torch.device("meta"):
        model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = methods.static(0.1)._replace(start=STARTS[name](0.1))
    with pytest.raises(
        ValueError, match=rf"^{name}: 1 of 1 weights lie on the meta device and have no values \(weight\)"
    ):
        regrow.sparsify(model, optimizer, method, storage="compressed", allow_dense=True)
    real = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(real.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"makes none of the 600 sparsified ones active"):
        regrow.sparsify(real, optimizer, method._replace(start=STARTS[name](1e-5)))


def test_a_start_that_fails_leaves_the_model_as_it_was() -> None:
    """The second weight is the one that cannot be: the first has not changed."""
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 50))
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    for start in (starts.prune_uniform(0.2), starts.prune_structured(0.2, last=rows)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"1.weight: 1 of 300 scores are NaN"):
            regrow.sparsify(model, optimizer, methods.static(0.2)._replace(start=start))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
