"""What goes on around a run: Sup-tickets, lotteries, starts from a file, published settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import regrow
from regrow.app import compare, folder, loop, models, procedures, recipes
from regrow.app.config import Config, resolved
from regrow.app.procedures import around
from regrow.app.vocabulary import AROUND, options, parsed_around
from support import app
from support.app import command, write_parquet

SUP = {"superpose": "caa", "cycle_share": "0.4", "cycles": "3", "lr_min": "0.01", "lr_max": "0.05"}


def config(**changes: Any) -> Config:
    given = {"density": "0.2", "interval": "5"} | changes.pop("options", {})
    return app.config(options=given, **changes)


def train(settings: Config, where: Path) -> dict[str, Any]:
    return folder.run(settings, where, lambda record: None)


def records(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


def saved(where: Path) -> tuple[dict[str, regrow.Topology], torch.nn.Module]:
    model = models.build("mlp", (1, 8, 8), 10, hidden=(32, 16))
    return regrow.load(where / "model.safetensors", model), model


class Tickets:
    """Sees the values of a run after each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: dict[int, float] = {}
        self.values: dict[int, dict[str, torch.Tensor]] = {}
        self.masks: dict[int, dict[str, torch.Tensor]] = {}
        before = procedures.Superposing.after

        def after(procedure: Any, done: int, sparsifier: Any, scheduler: lr_scheduler.LRScheduler) -> None:
            state = sparsifier.model.state_dict()
            self.values[done] = {name: tensor.clone() for name, tensor in state.items()}
            self.masks[done] = {name: t.mask for name, t in sparsifier.topologies.items()}
            self.rates[done + 1] = scheduler.get_last_lr()[0]
            before(procedure, done, sparsifier, scheduler)

        monkeypatch.setattr(procedures.Superposing, "after", after)


def test_the_superposed_model_is_the_pruned_mean_of_the_tickets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """36 steps of pretraining and three cycles of 8: four tickets, whose mean is pruned over the whole model."""
    seen = Tickets(monkeypatch)
    result = train(config(options=SUP), tmp_path / "run")
    tickets = [seen.values[step] for step in (36, 44, 52, 60)]
    mean = {name: sum(t[name].double() for t in tickets) / 4 for name in tickets[0]}
    topologies, model = saved(tmp_path / "run")
    kept = sum(t.nnz for t in topologies.values())
    total = sum(t.numel for t in topologies.values())
    assert kept == result["nnz"] == int(0.2 * total + 0.5)
    pooled = torch.cat([mean[name].abs().view(-1) for name in topologies])
    least = pooled.sort(descending=True).values[kept - 1]
    for name, tensor in model.state_dict().items():
        wanted = mean[name].float()
        if name in topologies:
            wanted = wanted * (mean[name].abs() >= least)
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-7)
    assert set(result["also"]) == {"last ticket"}


def test_the_learning_rate_is_least_where_tickets_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property 39, in a run: the last step of each cycle has lr_min, the middle lr_max."""
    seen = Tickets(monkeypatch)
    train(config(options=SUP, schedule="step"), tmp_path / "run")
    assert [seen.rates[step] for step in (44, 52, 60)] == pytest.approx([0.01] * 3)
    assert [seen.rates[step] for step in (40, 48, 56)] == pytest.approx([0.05] * 3)
    assert [seen.rates[step] for step in (1, 18, 19, 27, 28, 36)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


def moves(seen: Tickets) -> list[int]:
    return [
        step
        for step in range(1, 61)
        if any(not torch.equal(seen.masks[step][n], seen.masks[step - 1][n]) for n in seen.masks[0])
    ]


@pytest.mark.parametrize(
    ("extra", "moving"),
    [
        ({}, [5, 10, 15, 20, 25]),
        ({"until": "36", "anneal": "constant"}, [5, 10, 15, 20, 25, 30, 35]),
        ({"re_explore": "0.5"}, [5, 10, 15, 20, 25, 37, 45, 53]),
    ],
    ids=str,
)
def test_topologies_rest_in_cycles_unless_asked_to_move(
    extra: dict[str, str], moving: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates end at three quarters of the pretraining; re-exploration moves the topology once per cycle."""
    seen = Tickets(monkeypatch)
    train(config(options=SUP | extra), tmp_path / "run")
    assert moves(seen) == moving


def test_updates_go_on_in_cycles_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Tickets(monkeypatch)
    more = {"updates_in_cycles": "yes", "anneal": "constant"}
    train(config(method="itop_set", options=SUP | more), tmp_path / "run")
    assert moves(seen) == list(range(5, 60, 5))


@pytest.mark.parametrize("average", ["caa", "cima"])
def test_a_superposing_run_resumes_to_the_bit(average: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    collected, conclude = [], procedures.Superposing.conclude
    monkeypatch.setattr(
        procedures.Superposing, "conclude", lambda p, *rest: collected.append(len(p.tickets)) or conclude(p, *rest)
    )
    settings = config(options=SUP | {"superpose": average, "ensemble": "yes", "re_explore": "0.3"})
    whole = train(settings, tmp_path / "whole")
    for stop in (30, 45):

        def interrupt(record: dict[str, float], stop: int = stop) -> None:
            if record["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            folder.run(settings, tmp_path / "parts", interrupt)
    again = train(settings, tmp_path / "parts")
    assert collected == [4, 4]
    assert again["also"] == whole["also"] and set(whole["also"]) == {"last ticket", "ensemble"}
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()


def test_averages_differ_and_their_rows_stand_in_the_table(tmp_path: Path) -> None:
    base = config(options={"density": "0.2"})
    shared = {"density": "0.2", **{k: v for k, v in SUP.items() if k != "superpose"}}
    specs = ["rigl:interval=5,superpose=caa", "rigl:interval=5,superpose=cima,cima_factor=0.9"]
    jobs = compare.plan(base, specs, [0.2], 1, {}, tmp_path)
    assert all(job.config.options["superpose"] in ("caa", "cima") for job in jobs)
    jobs = [
        compare.Job(Config(**{**vars(j.config), "options": shared | j.config.options}), j.folder, j.label, j.density)
        for j in jobs
    ]
    compare.check(jobs)
    results = [(job, train(job.config, job.folder)) for job in jobs]
    table = compare.write(tmp_path, jobs, results, "regrow compare")
    assert [row.method for row in table] == [
        specs[0],
        f"{specs[0]} (last ticket)",
        specs[1],
        f"{specs[1]} (last ticket)",
    ]
    assert table[1].accuracy == (results[0][1]["also"]["last ticket"],)
    assert not torch.equal(saved(jobs[0].folder)[1].fc1.weight, saved(jobs[1].folder)[1].fc1.weight)


LOTTERY = {"density": "0.2", "rounds": "2", "rewind_to": "10"}


def lottery(where: Path, **changes: str) -> dict[str, Any]:
    return train(app.config(method="lottery", options=LOTTERY | changes, steps=40), where)


def test_a_lottery_prunes_and_rewinds_round_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 steps dense, then twice 30 more from step 10; values, optimizer and learning rate go back."""
    seen: dict[int, Any] = {}
    before = procedures.Rounds.after

    def after(procedure: Any, done: int, sparsifier: Any, scheduler: Any) -> None:
        before(procedure, done, sparsifier, scheduler)
        values = {n: p.detach().clone() for n, p in sparsifier.model.named_parameters()}
        rate, clock = scheduler.get_last_lr()[0], (sparsifier.step, procedure.place(done))
        seen[done] = (values, sparsifier.nnz, rate, clock)

    monkeypatch.setattr(procedures.Rounds, "after", after)
    result = lottery(tmp_path / "run")
    numel = result["numel"]
    counts = {done: nnz for done, (_, nnz, _, _) in seen.items()}
    assert result["steps"] == 100 and result["nnz"] == int(0.2 * numel + 0.5)
    assert {counts[d] for d in range(40)} == {numel}
    assert {counts[d] for d in range(40, 70)} == {int(0.2**0.5 * numel + 0.5)}
    assert {counts[d] for d in range(70, 101)} == {int(0.2 * numel + 0.5)}
    for again in (40, 70):
        values, _, rate, clock = seen[again]
        assert (rate, clock) == (seen[10][2], (10, 10))
        for name, tensor in values.items():
            at = tensor != 0
            assert at.any() and torch.equal(tensor[at], seen[10][0][name][at])
    assert seen[55][3] == (25, 25) and seen[55][2] == seen[25][2]


@pytest.mark.parametrize("control", ["shuffled", "reinitialized"])
def test_controls_of_a_lottery(control: str, tmp_path: Path) -> None:
    ticket, other = lottery(tmp_path / "ticket"), lottery(tmp_path / "control", control=control)
    assert ticket["nnz"] == other["nnz"] and ticket["layers"] == other["layers"]
    (mine, one), (theirs, two) = saved(tmp_path / "ticket"), saved(tmp_path / "control")
    assert (mine == theirs) is (control == "reinitialized")
    assert not torch.equal(one.fc1.weight, two.fc1.weight)


def test_an_interrupted_lottery_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    settings = app.config(method="lottery", options=LOTTERY, steps=40)
    lottery(tmp_path / "whole")
    for stop in (5, 20, 55):

        def interrupt(record: dict[str, float], stop: int = stop) -> None:
            if record["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            folder.run(settings, tmp_path / "parts", interrupt)
    train(settings, tmp_path / "parts")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


STARTS = [word for word in options(AROUND)["start"].words.split(" | ") if word not in ("method", "file")]


@pytest.mark.parametrize("start", STARTS)
def test_a_start_prunes_the_values_of_a_file(start: str, tmp_path: Path) -> None:
    """The six starts from a trained model: its largest values, layer by layer or over the whole, entries or rows."""
    train(app.config(method="dense", options={}), tmp_path / "dense")
    weights = str(tmp_path / "dense/model.safetensors")
    settings = config(method="static", weights=weights, options={"start": start}, lr=0.0, weight_decay=0.0)
    settings = Config(**{**vars(settings), "options": {"density": "0.2", "start": start}})
    result = train(settings, tmp_path / "run")
    (topologies, model), (_, trained) = saved(tmp_path / "run"), saved(tmp_path / "dense")
    grown = 0
    for name, topology in topologies.items():
        mask, old, new = topology.mask, trained.get_parameter(name), model.get_parameter(name)
        assert torch.equal(new[mask & (new != 0)], old[mask & (new != 0)])
        grown += int((mask & (new == 0) & (old != 0)).sum())
        if "structured" in start and name != "fc3.weight":
            assert bool((mask.all(1) | ~mask.any(1)).all())
        elif "uniform" in start:
            assert topology.nnz == int(0.2 * topology.numel + 0.5)
    if "grow" not in start:
        assert grown == 0
    if start == "prune_global":
        pooled = torch.cat([trained.get_parameter(n).detach().abs().view(-1) for n in topologies])
        least = pooled.sort(descending=True).values[result["nnz"] - 1]
        assert all(torch.equal(t.mask, trained.get_parameter(n).abs() >= least) for n, t in topologies.items())


def test_topologies_of_a_file_are_taken_over(tmp_path: Path) -> None:
    train(config(), tmp_path / "rigl")
    weights = str(tmp_path / "rigl/model.safetensors")
    options_ = {"start": "file", "density": "0.2"}
    train(app.config(method="static", weights=weights, options=options_, seed=5), tmp_path / "static")
    assert saved(tmp_path / "rigl")[0] == saved(tmp_path / "static")[0]


def colours(where: Path, n: int = 40) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        images = draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        write_parquet(where / f"{split}.parquet", images, np.arange(n) % 4)
    return where


@pytest.mark.parametrize("name", ["sup-tickets-granet", "sup-tickets-rigl", "sup-tickets-set"])
def test_a_published_recipe_runs_shortened(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow ResNet-50, with all phases: pretraining with updates, a cycle, superposing, BatchNorm."""
    narrow = models.MODELS["resnet-50"]._replace(hidden=(8, 8, 16, 32, 64))
    monkeypatch.setitem(models.MODELS, "resnet-50", narrow)
    data = colours(tmp_path / "cifar100")
    typed = ["--recipe", name, "--data-dir", str(data), "--steps", "12", "--batch", "2", "--no-augment"]
    typed += ["--cycles", "1", "--cycle-share", "0.3", "--interval", "4"]
    out = tmp_path / "run"
    arguments = ["train", *typed, "--threads", "1", "--out", str(out)]
    status, _, error = command(arguments, capsys, monkeypatch)
    assert status == 0, error
    settings, result = json.loads((out / "config.json").read_text()), json.loads((out / "result.json").read_text())
    assert settings["model"] == "resnet-50" and settings["method"] == name.rpartition("-")[2]
    assert (settings["batch"], settings["options"]["interval"], settings["nesterov"]) == (2, "4", False)
    assert result["density"] == pytest.approx(0.1, abs=1e-5) and result["updates"] >= 1
    assert "last ticket" in result["also"]


def test_step_counts_of_a_recipe_shrink_with_the_run() -> None:
    whole = recipes.settings("sup-tickets-granet", steps=None, epochs=None)
    short = recipes.settings("sup-tickets-granet", steps=1250, epochs=None)
    fewer = recipes.settings("sup-tickets-granet", steps=None, epochs=25.0)
    assert (whole["interval"], whole["prune_until"], whole["epochs"]) == (1000, 55_000, 250.0)
    assert (short["interval"], short["prune_until"]) == (10, 550) and "epochs" not in short
    assert (fewer["interval"], fewer["prune_until"]) == (100, 5500)
    with pytest.raises(ValueError, match="choose sup-tickets-granet"):
        recipes.settings("nothing", steps=None, epochs=None)


REFUSED: list[tuple[dict[str, str], str]] = [
    ({"superpose": "caa", "lr_min": "0.1", "lr_max": "0.01"}, "lr_min must lie between 0 and lr_max, got 0.1 and 0.01"),
    ({"cima_factor": "0.3"}, "cima_factor is of superposing, which is off"),
    ({"superpose": "caa", "cima_factor": "0.3"}, "cima_factor is of the moving average, and superpose is caa"),
    ({"superpose": "cima", "cima_factor": "1"}, r"cima_factor must lie in \(0, 1\), got 1"),
    ({"superpose": "caa", "cycle_share": "1"}, r"cycle_share must lie in \(0, 1\), got 1"),
    ({"superpose": "caa", "cycles": "0"}, "cycles must be at least 1, got 0"),
    ({"superpose": "caa", "re_explore": "2"}, r"re_explore must lie in \[0, 1\], got 2"),
    ({"start_batches": "0"}, "start_batches must be at least 1, got 0"),
    ({"superpose": "mean"}, "superpose takes none | caa | cima, got 'mean'"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED, ids=[", ".join(g) for g, _ in REFUSED])
def test_contradicting_options_are_refused(given: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parsed_around(given)


IN_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"options": SUP | {"cycles": "30"}}, "30 cycles do not fit into a share of 0.4 of 60 steps, which is 24"),
    ({"options": {"start": "file"}}, "--weights"),
    ({"options": {"start_batches": "3"}}, "rigl reads no gradient at its start"),
    ({"method": "dense", "options": {"start": "prune_global"}}, "dense cannot begin by --start prune_global"),
    ({"method": "dnw", "options": SUP | {"density": "0.2"}}, "dnw computes its weights from latent values"),
    ({"method": "lottery", "options": LOTTERY | {"rewind_to": "60"}}, "rewind_to must lie before the end"),
    ({"method": "lottery", "options": LOTTERY | {"superpose": "caa"}}, "leave out one"),
]


@pytest.mark.parametrize(("changes", "told"), IN_RUNS, ids=[told for _, told in IN_RUNS])
def test_what_cannot_run_is_refused_before_training(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    method, given = changes.get("method", "rigl"), dict(changes["options"])
    if method == "rigl":
        given |= {"density": "0.2", "interval": "5"}
    settings = app.config(method=method, options=given)
    with pytest.raises(ValueError, match=told):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_option_around_a_method_has_help_and_a_default() -> None:
    for option in options(AROUND).values():
        assert option.help, option.name
        assert option.default is not None or option.name == "start_batches"
    assert around().superpose == "none"


def test_exploration_is_in_the_record(tmp_path: Path) -> None:
    """R_s overall and of each layer, with the bound of so many updates."""
    result = train(config(method="itop_set", options={"grow": "unexplored_first"}), tmp_path / "run")
    said = records(tmp_path / "run")
    assert said[-1]["explored"] == result["explored"]
    for record in said:
        layers: dict[str, Sequence[float]] = record["explored_layers"]
        assert all(0 < rate <= bound <= 1 for rate, bound in layers.values())
        whole = sum(layers[n][0] * w["numel"] for n, w in result["layers"].items()) / result["numel"]
        assert record["explored"] == pytest.approx(whole)
        assert record["explored"] <= record["explored_bound"]
    assert said[-1]["explored"] == pytest.approx(said[-1]["explored_bound"])


def test_a_sup_tickets_run_uses_its_steps_once() -> None:
    settings = resolved(config(options=SUP), 1437)
    assert settings.steps == 60
