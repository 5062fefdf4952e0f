"""`regrow bench`: what was measured is what is said, and bad input ends in one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow.app import bench as module
from regrow.app import peers
from regrow.app.bench import bench, breakeven, layer_of
from regrow.engine.timing import Call, Race, masked
from regrow.nn import SparseModule
from support.app import command
from support.twins import topology


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, Call, list[str]]]:
    """Races in which compressed takes 10 x density of dense's time, units half of that, torch.sparse twice that."""
    ran: list[tuple[nn.Module, Call, list[str]]] = []

    def race(layer: nn.Module, topologies: Any, call: Call, candidates: Mapping[str, Any]) -> Race:
        seconds: dict[str, Sequence[float]] = {"dense": [2e-3] * 7}
        for entry, make in candidates.items():
            name, density = entry.rsplit(" ", 1)
            made = make(layer, topologies)
            if isinstance(made, SparseModule):
                nnz = sum(made.index(n).nnz for n in made.shapes)
                if name == "compressed":
                    assert nnz == sum(int(float(density) * torch.Size(s).numel() + 0.5) for s in made.shapes.values())
                else:
                    assert set(made.units) == set(made.shapes)
            times = {"compressed": 1.0, "groups(8)": 0.5}.get(name, 2.0)
            seconds[entry] = [2e-3 * 10 * float(density) * times] * 7
        ran.append((layer, call, list(candidates)))
        return Race(seconds)

    monkeypatch.setattr(module, "race", race)
    return ran


def net() -> nn.Module:
    layers = [nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({0.2: 2.0, 0.1: 1.5, 0.05: 0.5}, pytest.approx(0.075)),
        ({0.2: 2.0, 0.1: 1.0, 0.05: 0.5}, 0.1),
        ({0.2: 0.9, 0.1: 1.2, 0.05: 0.6}, pytest.approx(0.05 + 0.05 * 0.4 / 0.6)),
        ({0.1: 0.9, 0.05: 0.99}, "always"),
        ({0.1: 0.9, 0.05: 1.0}, "never"),
    ],
)
def test_where_compressed_begins_to_win(ratios: dict[float, float], expected: Any) -> None:
    assert breakeven(ratios) == expected


def test_a_report_says_what_was_measured(judged: Any) -> None:
    report = bench(net(), torch.randn(4, 12), densities=(0.05, 0.2, 0.1))
    assert [layer.names for layer in report.layers] == [("0",), ("2", "3"), ("4",)]
    first = report.layers[0]
    assert (first.kind, first.shapes, first.inputs) == ("Linear", ((8, 12),), (4, 12))
    assert list(first.races) == [0.2, 0.1, 0.05]
    assert {d: r.ratio("compressed") for d, r in first.races.items()} == pytest.approx({0.2: 2, 0.1: 1, 0.05: 0.5})
    assert first.wins_below == pytest.approx({"compressed": 0.1, "groups(8)": 0.2})
    lines = str(report).splitlines()
    assert "threads" in lines[0] and "kernels" in lines[0] and "load" in lines[0]
    assert lines[2] == "0: Linear 8 x 12, input 4 x 12, dense 2 ms"
    heads = [word for name in ("compressed", "groups(8)", "torch.sparse") for word in (name, "ms", "of", "dense")]
    assert lines[3].split() == ["density", *heads]
    assert lines[4].split() == ["0.2", "4", "2.00x", "2", "1.00x", "8", "4.00x"]
    assert lines[7] == "compressed is faster than dense: below density 0.1"
    assert lines[8] == "groups(8) is faster than dense: below density 0.2"
    assert lines[10].startswith("2 and 1 equal to it: ")


def test_equal_layers_race_once_and_the_first_without_input_gradient(judged: Any) -> None:
    bench(net(), torch.randn(4, 12), densities=(0.5,))
    assert [tuple(call.args[0].shape) for _, call, _ in judged] == [(4, 12), (4, 8), (4, 8)]
    assert [call.args[0].requires_grad for _, call, _ in judged] == [False, True, True]


def test_layers_that_cannot_be_measured_are_named(judged: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.used, self.idle = Doubled(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.own(x))

    report = bench(Net(), torch.randn(3, 4), densities=(0.5,))
    assert [layer.names for layer in report.layers] == [("used",)]
    assert report.skipped == {
        "own": "there is no sparse form of Doubled",
        "idle": "the example does not reach it",
    }
    assert "idle: the example does not reach it" in str(report)


def test_json_holds_the_same(judged: Any) -> None:
    report = bench(nn.GRU(4, 3), torch.randn(5, 2, 4), densities=(0.5, 0.25), structures={})
    read = json.loads(report.to_json())
    assert read["layers"] == [
        {
            "names": ["GRU"],
            "kind": "GRU",
            "shapes": [[9, 4], [9, 3]],
            "input": [5, 2, 4],
            "dense_ms": 2.0,
            "wins_below": {"compressed": "never"},
            "densities": [
                {"density": 0.5, "compressed": {"ms": 10.0, "ratio": 5.0}},
                {"density": 0.25, "compressed": {"ms": 5.0, "ratio": 2.5}},
            ],
            "notes": {},
        }
    ]
    assert read["machine"]["processor"] and read["machine"]["threads"] == "1" and read["machine"]["kernels"]


def test_the_model_and_the_random_state_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)
    model = net().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    report = bench(model, torch.randn(2, 12, generator=torch.Generator()), densities=(0.5,), peers=True, only="0")
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    (layer,) = report.layers
    assert layer.candidates == ["compressed", "groups(8)", "torch.sparse", "SparseLab"]
    assert all(min(seconds) > 0 for seconds in layer.races[0.5].seconds.values())


# Peers


FORMS = ("compressed", "groups(8)", "torch.sparse", "SparseLab")


def stub(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
    """A SparseLab that is a dense layer times `factor`, and no SparseProp."""

    class SparseLinear(nn.Linear):
        _csr: Any

        def __init__(self, n_in: int, n_out: int, bias: bool, sparsity: float) -> None:
            super().__init__(n_in, n_out, bias)
            assert 0 <= sparsity < 1

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, factor * self._values.view_as(self.weight), self.bias)

    class PaddedCSR:
        @staticmethod
        def from_dense(weight: Tensor) -> Any:
            made = PaddedCSR()
            made.values = weight.numpy().ravel()
            return made

    package: Any = ModuleType("sparselab")
    package.SparseLinear, package.PaddedCSR = SparseLinear, PaddedCSR
    monkeypatch.setitem(sys.modules, "sparselab", package)
    for name in ("sparseprop", "sparseprop.modules"):
        monkeypatch.setitem(sys.modules, name, None)


def test_peers_are_measured_where_they_are_installed(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)
    (layer,) = bench(nn.Linear(8, 4), torch.randn(2, 8), densities=(0.5, 0.25), peers=True).layers
    assert judged[0][2] == [f"{n} {d}" for d in (0.5, 0.25) for n in FORMS]
    assert layer.notes == {"SparseProp": "not installed"} and "SparseProp: not installed" in str(layer)
    assert bench(nn.Linear(8, 4), torch.randn(2, 8), densities=(0.5,)).layers[0].notes == {}


def test_a_peer_that_computes_something_else_is_not_timed(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, factor=1.1)
    (layer,) = bench(nn.Linear(8, 4), torch.randn(2, 8), densities=(0.5, 0.25), peers=True).layers
    assert layer.candidates == ["compressed", "groups(8)", "torch.sparse"]
    assert layer.notes["SparseLab at 0.5"].startswith("not timed, since its outputs have a relative error of ")


def test_peers_stand_for_what_they_can_compute() -> None:
    conv = nn.Conv2d
    assert list(peers.peers(nn.Linear(4, 4), 4)) == ["SparseLab", "SparseProp"]
    assert list(peers.peers(conv(4, 4, 3, padding=1), 8)) == ["SparseProp"]
    others = [
        conv(4, 4, 3, groups=2), conv(4, 4, 3, dilation=2), conv(4, 4, (3, 1)), conv(4, 4, 3, padding="same"),
        conv(4, 4, 3, padding=1, padding_mode="circular"), nn.Linear(4, 4).double(), nn.GRU(4, 4), nn.Conv1d(4, 4, 3),
    ]  # fmt: skip
    assert [peers.peers(layer, 8) for layer in others] == [{}] * len(others)


@pytest.mark.parametrize("layer", [nn.Linear(32, 16), nn.Conv2d(4, 8, 3, padding=1)])
def test_installed_peers_compute_the_same(layer: nn.Module) -> None:
    shape = tuple(layer.weight.shape)
    at = {"weight": topology(shape, 0.3)}
    x = torch.randn(16, 32) if len(shape) == 2 else torch.randn(8, 4, 9, 9)
    made = 0
    for name, make in peers.peers(layer, 9).items():
        try:
            peer = make(layer, at)
        except ImportError:
            continue
        made += 1
        torch.testing.assert_close(peer(x), masked(layer, at)(x), rtol=1e-4, atol=1e-4, msg=name)
    if not made:
        pytest.skip("no peer is installed")


# The command line


def test_layers_are_described_by_their_weights() -> None:
    linear, x = layer_of("300x784", 5)
    assert tuple(linear.weight.shape) == (300, 784) and x.shape == (5, 784) and x.requires_grad
    conv, x = layer_of("conv:16x8x3x5@10x12", 2)
    assert tuple(conv.weight.shape) == (16, 8, 3, 5) and conv(x).shape == (2, 16, 10, 12)


def test_a_network_of_the_command_line(
    judged: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said, _ = command(["bench", "--model", "lenet-300-100", "--batch", "3"], capsys, monkeypatch)
    assert status == 0 and "fc1: Linear 300 x 784, input 3 x 784" in said and "fc3: Linear 10 x 100" in said
    assert [row.split()[0] for row in said.split("\n\n")[1].splitlines()[2:7]] == ["0.2", "0.1", "0.05", "0.02", "0.01"]
    status, said, _ = command(["bench", "--model", "mlp", "--shape", "1x4x4", "--batch", "3"], capsys, monkeypatch)
    assert status == 0 and "fc1: Linear 256 x 16, input 3 x 16" in said


def test_layers_of_the_command_line(
    judged: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers = ["--layer", "6x4", "--layer", "conv:4x2x3x3@5x5", "--layer", "6x4"]
    arguments = ["bench", *layers, "--densities", "0.5,0.1", "--batch", "2", "--json"]
    status, said, _ = command(arguments, capsys, monkeypatch)
    read = json.loads(said)["layers"]
    assert status == 0
    assert [row["names"] for row in read] == [["6x4"], ["conv:4x2x3x3@5x5"], ["6x4"]]
    assert [row["input"] for row in read] == [[2, 4], [2, 2, 5, 5], [2, 4]]
    assert all(call.args[0].requires_grad for _, call, _ in judged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model or --layer, one of the two"),
        (["--model", "mlp", "--layer", "3x3"], "give --model or --layer, not both"),
        (["--model", "resnet"], "'resnet' is not one of 'mlp'"),
        (["--layer", "3x3x3"], "--layer takes the shape of a weight, 300x784 (out x in) or conv:"),
        (["--layer", "conv:3x3x3x3"], "got 'conv:3x3x3x3'"),
        (["--layer", "0x3"], "got '0x3'"),
        (["--layer", "3x3", "--densities", "0.1,a"], "--densities takes numbers separated by commas, got '0.1,a'"),
        (["--layer", "3x3", "--densities", "0.1,2"], "densities must lie in (0, 1], got 0.1, 2"),
        (["--layer", "3x3", "--densities", "nan"], "densities must lie in (0, 1], got nan"),
        (["--layer", "3x3", "--batch", "0"], "0 is not in the range x>=1"),
        (
            ["--model", "mlp", "--shape", "28x28"],
            "--shape takes channels x height x width such as 3x32x32, got '28x28'",
        ),
        (["--layer", "3x3", "--shape", "1x2x3"], "--shape is of a network's images"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    arguments: list[str],
    message: str,
    judged: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, out, error = command(["bench", *arguments], capsys, monkeypatch)
    assert status == 2 and out == "" and message in error and error.count("\n") == 1
    assert not judged
