"""storage="auto": each layer in the storage that wins its race, said and saved; and storages by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow import Sparsifier, methods, sparsify
from regrow.core.method import Method, Need
from regrow.engine import race
from regrow.engine.timing import Call, Race, Topologies
from regrow.nn import SparseGRU, SparseLinear, SparseModule
from regrow.parts.allocation import uniform
from support.loops import Branch
from support.pairs import NETS, Run, tensors

Winner = Callable[[nn.Module], bool]


class Judge:
    """What stands for the race: compressed wins where `wins` says so, and elsewhere ties; every race is noted."""

    def __init__(self, wins: Winner) -> None:
        self.wins, self.otherwise = wins, 2e-3
        self.ran: list[tuple[nn.Module, dict[str, int], tuple[int, ...]]] = []

    def __call__(self, module: nn.Module, topologies: Topologies, call: Call, candidates: Mapping[str, Any]) -> Race:
        assert list(candidates) == ["compressed"] and not isinstance(module, SparseModule)
        self.ran.append((module, {n: t.nnz for n, t in topologies.items()}, tuple(call.args[0].shape)))
        return Race({"dense": [2e-3] * 7, "compressed": [1e-3 if self.wins(module) else self.otherwise] * 7})


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[[Winner], Judge]:
    def install(wins: Winner) -> Judge:
        made = Judge(wins)
        monkeypatch.setattr(race, "race", made)
        return made

    return install


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


def static(density: float = 0.25) -> Method:
    return methods.static(density)


def start(model: nn.Module, method: Method | None = None, **options: Any) -> Sparsifier:
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return sparsify(model, opt, method or static(), **{"storage": "auto", **options})


def wide(module: nn.Module) -> bool:
    return module.weight.shape[0] == 24


# What is picked


def test_each_layer_gets_the_storage_that_wins(judge: Any, caplog: pytest.LogCaptureFixture):
    judge(wide)
    model = mlp()
    with caplog.at_level(logging.INFO, logger="regrow"):
        sparsifier = start(model, example=torch.randn(8, 12))
    expected = {"0.weight": "compressed", "2.weight": "compressed", "4.weight": "masked"}
    assert sparsifier.storages == expected
    assert [type(m) for m in model if hasattr(m, "weight")] == [SparseLinear, SparseLinear, nn.Linear]
    nnz = {name: t.nnz for name, t in sparsifier.topologies.items()}
    assert nnz["0.weight"] == model[0].weight.numel() and nnz["4.weight"] == int((model[4].weight != 0).sum())
    assert [line.split()[-1] for line in repr(sparsifier).splitlines()[2:]] == list(expected.values())
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith("0.weight: compressed, since a training step takes 1 ms compressed and 2 ms dense at den")
    assert said[2].startswith("4.weight: masked, since a training step takes 2 ms compressed and 2 ms dense at density")


def test_layers_race_at_their_own_topology_and_inputs(judge: Any):
    judged = judge(wide)
    model = mlp()
    sparsifier = start(model, example=torch.randn(8, 12))
    nnz = {name: t.nnz for name, t in sparsifier.topologies.items()}
    assert judged.ran == [
        (model[0], {"weight": nnz["0.weight"]}, (8, 12)),
        (model[2], {"weight": nnz["2.weight"]}, (8, 24)),
        (model[4], {"weight": nnz["4.weight"]}, (8, 24)),
    ]


def test_equal_layers_race_once(judge: Any):
    judged = judge(wide)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
    start(model, methods.static(0.25, allocate=uniform), example=torch.randn(8, 12))
    # No gradient flows to the input of the first.
    assert [module for module, *_ in judged.ran] == [model[0], model[1]]


METHODS = {
    "rigl": lambda: methods.rigl(0.3, interval=3, until=30),
    "set": lambda: methods.set_(0.3, interval=3, until=30),
    "static": lambda: methods.static(0.3),
}


@pytest.mark.parametrize("net", ["linear", "conv", "gru", "attention"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wins", [True, False])
def test_a_run_is_that_of_the_storage_picked(wins: bool, method: str, net: str, judge: Any):
    judge(lambda module: wins)
    example = torch.randn(12, *NETS[net][1], dtype=torch.float64)
    one = Run("auto", METHODS[method](), net, "adam", example=example).go(1, 8)
    other = Run("compressed" if wins else "masked", METHODS[method](), net, "adam").go(1, 8)
    assert set(one.sparsifier.storages.values()) == {"compressed" if wins else "masked"}
    assert one.sparsifier.topologies == other.sparsifier.topologies
    ours, theirs = one.tensors(), other.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_mixed_storages_train_as_one_does(judge: Any):
    judge(lambda module: isinstance(module, nn.Conv2d))
    one = Run("auto", METHODS["rigl"](), "conv", example=torch.randn(12, 2, 6, 6, dtype=torch.float64)).go(1, 12)
    assert set(one.sparsifier.storages.values()) == {"masked", "compressed"}
    one.require_equal(Run("masked", METHODS["rigl"](), "conv").go(1, 12))
    assert one.sparsifier.updates > 0


@pytest.mark.parametrize("wins", [True, False])
def test_a_record_of_explored_positions_goes_on(wins: bool, judge: Any):
    judge(lambda module: wins)
    method = METHODS["set"]()
    method = method._replace(needs=method.needs | Need.EXPLORED)
    one = Run("auto", method, example=torch.randn(12, 12, dtype=torch.float64))
    assert one.sparsifier.explored == one.sparsifier.density
    assert one.go(1, 7).sparsifier.explored == Run("masked", method).go(1, 7).sparsifier.explored


def test_snip_races_at_the_topology_that_its_batches_make(judge: Any):
    judged = judge(wide)
    model = mlp()
    batches = [(torch.randn(8, 12), torch.randint(5, (8,)))]
    sparsifier = start(
        model,
        methods.snip(0.25),
        example=torch.randn(8, 12),
        batches=batches,
        loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
    )
    assert [nnz["weight"] for _, nnz, _ in judged.ran] == [t.nnz for t in sparsifier.topologies.values()]
    assert len(set(sparsifier.storages.values())) == 2


def test_the_weights_of_one_module_are_decided_together(judge: Any, caplog: pytest.LogCaptureFixture):
    judged = judge(lambda module: True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(6, 7, batch_first=True), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0])

    model = Net()
    with caplog.at_level(logging.INFO, logger="regrow"):
        sparsifier = start(model, example=torch.randn(2, 3, 6))
    assert [list(nnz) for _, nnz, _ in judged.ran] == [["weight_ih_l0", "weight_hh_l0"], ["weight"]]
    assert isinstance(model.gru, SparseGRU) and set(sparsifier.storages.values()) == {"compressed"}
    assert "gru.weight_ih_l0[0], gru.weight_ih_l0[1]" in caplog.messages[0]


@pytest.mark.parametrize(("otherwise", "picked"), [(2e-3, "compressed"), (4e-3, "masked")])
@pytest.mark.parametrize("better", [0, 2])
def test_a_tied_weight_races_in_all_its_modules(better: int, otherwise: float, picked: str, judge: Any):
    """1 + 2 or 1 + 4 ms compressed, 2 + 2 ms dense."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    judged = judge(lambda module: module is model[better])
    judged.otherwise = otherwise
    sparsifier = start(model, example=torch.randn(2, 6))
    assert {module for module, *_ in judged.ran} == {model[0], model[2]}
    assert sparsifier.storages == {"0.weight": picked}


# What is not raced


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def raced(judged: Judge, caplog: pytest.LogCaptureFixture, make: Callable[[], Sparsifier]) -> dict[str, str]:
    """Storages, after a start in which nothing raced; what was said is in `caplog`."""
    with caplog.at_level(logging.INFO, logger="regrow"):
        storages = make().storages
    assert not judged.ran
    return dict(storages)


def test_a_module_without_sparse_form_is_masked(judge: Any, caplog: pytest.LogCaptureFixture):
    judged = judge(lambda module: True)
    storages = raced(judged, caplog, lambda: start(nn.Sequential(Odd(6, 6)), example=torch.randn(2, 6)))
    assert storages == {"0.weight": "masked"}
    assert caplog.messages == ["0.weight: masked, since there is no sparse form of Odd"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: methods.gmp(0.3, until=30, interval=3), "gmp holds a value at every position during training"),
        (lambda: methods.snfs(0.3, until=30, interval=3), "snfs reads the gradient at every position at every step"),
        (lambda: methods.snip(0.3), "snip starts from a dense model's gradient"),
        (lambda: methods.l0()._replace(needs=Need.NOTHING), "l0 computes weights from values that it trains"),
    ],
)
def test_methods_that_are_dense_are_masked(make: Any, why: str, judge: Any, caplog: pytest.LogCaptureFixture):
    judged = judge(lambda module: True)
    model = mlp()
    model.forward = None  # it need not run
    storages = raced(judged, caplog, lambda: start(model, make(), example=torch.randn(2, 12)))
    assert set(storages.values()) == {"masked"}
    assert len(caplog.messages) == 3 and caplog.messages[0].startswith(f"0.weight: masked, since {why}")


def test_allow_dense_lets_them_race_where_there_is_a_topology(judge: Any, caplog: pytest.LogCaptureFixture):
    judge(lambda module: True)
    gmp = methods.gmp(0.3, until=30, interval=3)
    assert set(start(mlp(), gmp, example=torch.randn(2, 12), allow_dense=True).storages.values()) == {"compressed"}
    judged = judge(lambda module: True)

    def snip() -> Sparsifier:
        return start(mlp(), methods.snip(0.3), example=torch.randn(2, 12), allow_dense=True)

    assert set(raced(judged, caplog, snip).values()) == {"masked"}


def test_an_optimizer_that_reads_dense_weights_keeps_them(judge: Any, caplog: pytest.LogCaptureFixture):
    judge(lambda module: True)
    model = mlp()
    opts = [torch.optim.Muon([model[2].weight])]
    opts.append(torch.optim.SGD([p for p in model.parameters() if p is not model[2].weight], lr=0.1))
    with caplog.at_level(logging.INFO, logger="regrow"):
        sparsifier = sparsify(model, opts, static(), storage="auto", example=torch.randn(2, 12))
    assert sparsifier.storages == {"0.weight": "compressed", "2.weight": "masked", "4.weight": "compressed"}
    assert caplog.messages[0] == "2.weight: masked, since Muon cannot step active values by themselves (ValueError)"


def test_what_the_example_does_not_reach_is_masked(judge: Any, caplog: pytest.LogCaptureFixture):
    judge(lambda module: True)

    with caplog.at_level(logging.INFO, logger="regrow"):
        sparsifier = start(Branch(), example=torch.randn(2, 6))
    assert sparsifier.storages == {"used.weight": "compressed", "idle.weight": "masked"}
    assert caplog.messages[1] == "idle.weight: masked, since the example does not reach it"


def test_a_model_on_the_meta_device_is_compressed(judge: Any, caplog: pytest.LogCaptureFixture):
    judged = judge(lambda module: False)
    with torch.device("meta"):
        model = mlp()
    assert set(raced(judged, caplog, lambda: start(model, example=torch.randn(2, 12))).values()) == {"compressed"}
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="gmp holds a value at every position"):
        start(model, methods.gmp(0.3, until=30, interval=3), example=torch.randn(2, 12))


# What is left behind


def test_the_model_is_left_as_it_was(judge: Any):
    judge(lambda module: False)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5))
    model[1].eval()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    start(twin, storage="masked")
    expected = torch.rand(3)
    torch.manual_seed(3)
    start(model, example=torch.randn(4, 12, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_example_that_the_model_does_not_take_changes_nothing(judge: Any):
    judge(lambda module: True)
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes"):
        start(model, example=torch.randn(4, 13))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    start(model, example=torch.randn(4, 12))


def test_the_real_race_decides_and_trains():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, static(), storage="auto", example=torch.randn(8, 12))
    assert set(sparsifier.storages.values()) <= {"masked", "compressed"}
    model(torch.randn(8, 12)).square().mean().backward()
    opt.step()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_decides_for_all(rank: int, judge: Any, monkeypatch: pytest.MonkeyPatch):
    judged = judge(wide)
    distributed, sent = torch.distributed, []

    def broadcast(times: list[Any]) -> None:
        sent.append(list(times))
        if rank == 1:
            times[:] = [race._Times(*t) for t in ((2.0, 1.0), (1.0, 2.0), (1.0, 2.0))]

    for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": 1}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    storages = list(start(mlp(), example=torch.randn(8, 12)).storages.values())
    assert len(sent) == 1
    if rank == 0:
        assert len(judged.ran) == 3 and storages == ["compressed", "compressed", "masked"]
    else:
        assert not judged.ran and sent == [[None] * 3] and storages == ["compressed", "masked", "masked"]


# Storages by name, and resumption


def test_storages_by_name_or_glob():
    model = mlp()
    sparsifier = start(model, storage={"2.weight": "masked", "[02]*": "compressed"})
    assert sparsifier.storages == {"0.weight": "compressed", "2.weight": "masked", "4.weight": "masked"}
    assert [isinstance(model[i], SparseLinear) for i in (0, 2, 4)] == [True, False, False]


def test_what_is_compressed_by_name_must_be_possible():
    gmp = methods.gmp(0.3, until=30, interval=3)
    with pytest.raises(ValueError, match=r"gmp holds a value .* 2\.weight alone takes 2,304 bytes dense"):
        start(mlp(), gmp, storage={"2": "compressed"})
    assert set(start(mlp(), gmp, storage={"2": "masked"}).storages.values()) == {"masked"}


@pytest.mark.parametrize(
    ("storage", "example", "message"),
    [
        ("auto", None, r'^storage="auto" measures the layers on an input of the model: give one of .* as example=$'),
        ("masked", 1, r"^example= is what storage=\"auto\" measures with, and storage is 'masked': leave it out$"),
        ({"0": "masked"}, 1, r"^example= is what"),
        ("packed", None, r"^sparsify: storage must be one of masked, compressed, auto, got 'packed'$"),
        ({"0": "auto"}, None, r"^sparsify: storage of '0' must be one of masked, compressed, got 'auto'$"),
        (
            {"fc*": "masked"},
            None,
            r"^sparsify: storage names 'fc\*', which matches none of the weights: 0\.weight, 2\.",
        ),
    ],
)
def test_words_that_make_no_sense_are_refused(storage: Any, example: Any, message: str):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        start(model, storage=storage, example=example)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("net", ["conv", "gru"])
def test_a_run_resumes_in_the_storages_that_were_picked(net: str, judge: Any):
    judge(lambda module: not isinstance(module, nn.Linear))
    example = torch.randn(12, *NETS[net][1], dtype=torch.float64)
    whole = Run("auto", METHODS["rigl"](), net, example=example).go(1, 7)
    saved = copy.deepcopy([whole.model.state_dict(), whole.optimizer.state_dict(), whole.sparsifier.state_dict()])
    whole.go(8, 14)
    again = Run(saved[2]["storages"], METHODS["rigl"](), net)
    for part, state in zip((again.model, again.optimizer, again.sparsifier), saved, strict=True):
        part.load_state_dict(state)
    again.go(8, 14)
    assert again.sparsifier.storages == whole.sparsifier.storages
    ours, theirs = tensors(again.model, again.optimizer), tensors(whole.model, whole.optimizer)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items()) and ours.keys() == theirs.keys()
    assert again.sparsifier.topologies == whole.sparsifier.topologies


def test_a_state_of_other_storages_is_refused():
    state = start(mlp(), storage={"2": "compressed"}).state_dict()
    assert state["storages"] == {"0.weight": "masked", "2.weight": "compressed", "4.weight": "masked"}
    other = start(mlp(), storage={"4": "compressed"})
    before = copy.deepcopy(other.state_dict())
    message = (
        r"^this sparsifier state has 2 of 3 weights in another storage \(2\.weight: compressed there, masked here\): "
        r'pass its "storages" as storage= to regrow\.sparsify$'
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.state_dict()["topologies"].keys() == before["topologies"].keys()
    assert other.step == before["step"]
    start(mlp(), storage=state["storages"]).load_state_dict(state)
