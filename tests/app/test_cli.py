"""The command line: runs leave whole folders, resume to the bit, and bad input ends in one sentence."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import regrow
from regrow.app import cli, compare, folder, loop, models
from regrow.app.config import Config, resolved
from regrow.app.vocabulary import RECIPES, make, options, paper, parse_allocation, summary
from regrow.core.weight import Shaped
from regrow.engine.placement import Storage
from support.app import command, config

SHORT = ("--hidden", "32,16", "--threads", "1")


@pytest.mark.parametrize("method", list(RECIPES))
def test_every_method_runs_and_leaves_a_whole_folder(method: str, tmp_path: Path) -> None:
    given = {"density": "0.2", "interval": "5", "backward_density": "0.5"}
    settings = config(method=method, options={k: v for k, v in given.items() if k in options(method)}, steps=30)
    result = folder.run(settings, tmp_path / "run", lambda record: None)
    made = {p.name for p in (tmp_path / "run").iterdir()}
    expected = {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "model.safetensors",
        "curves.png",
        "density.png",
        "connections.png",
        "connections.npz",
    }
    assert made == expected
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["nnz"] == sum(layer["nnz"] for layer in result["layers"].values())
    assert 0 < result["accuracy"] <= 1 and result["explored"] >= result["density"]


def test_reported_numbers_are_those_of_the_saved_model(tmp_path: Path) -> None:
    result = folder.run(config(), tmp_path / "run", lambda record: None)
    model = models.build("mlp", (1, 8, 8), 10, hidden=(32, 16))
    topologies = regrow.load(tmp_path / "run" / "model.safetensors", model)
    assert {n: t.nnz for n, t in topologies.items()} == {n: w["nnz"] for n, w in result["layers"].items()}
    with np.load(tmp_path / "run" / "connections.npz") as maps:
        per_pixel = topologies["fc1.weight"].mask.sum(0).view(8, 8).numpy()
        assert np.array_equal(maps["counts"][-1], per_pixel)
        assert (maps["counts"].sum((1, 2)) == topologies["fc1.weight"].nnz).all()
        assert maps["steps"][0] == 0 and maps["steps"][-1] == 60
    sparse = sum(2 * t.nnz + t.shape[0] for t in topologies.values())
    assert result["inference_flops_ratio"] == sparse / sum(2 * t.numel + t.shape[0] for t in topologies.values())
    dense = 3 * result["steps"]
    updates, density = 8, result["inference_flops_ratio"]
    assert result["updates"] == updates
    assert result["training_flops_ratio"] == pytest.approx(
        (3 * density * (dense / 3 - updates) + updates * (2 * density + 1)) / dense
    )


@pytest.mark.parametrize(("stop", "storage"), [(14, "masked"), (15, "compressed"), (16, "masked"), (33, "compressed")])
def test_an_interrupted_run_resumes_to_the_bit(
    stop: int, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "RECORDS", 15)
    whole = folder.run(config(storage=storage), tmp_path / "whole", lambda record: None)

    def interrupt(record: dict[str, float]) -> None:
        if record["step"] > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(storage=storage), tmp_path / "parts", interrupt)
    assert not (tmp_path / "parts" / "result.json").exists()
    again = folder.run(config(storage=storage), tmp_path / "parts", lambda record: None)
    volatile = ("seconds", "peak_rss_bytes")
    assert {k: v for k, v in again.items() if k not in volatile} == {
        k: v for k, v in whole.items() if k not in volatile
    }
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_compressed_run_is_the_masked_one_in_another_form(tmp_path: Path) -> None:
    made = {}
    for storage in ("masked", "compressed"):
        settings = config(storage=storage, method="static", options={"density": "0.2"})
        made[storage] = folder.run(settings, tmp_path / storage, lambda record: None)
    masked, compressed = made["masked"], made["compressed"]
    assert (masked["storage"], compressed["storage"]) == ("masked", "compressed")
    assert masked["explored"] is not None and compressed["explored"] is None
    same = ("layers", "nnz", "density", "inference_flops_ratio", "training_flops_ratio")
    assert [masked[key] for key in same] == [compressed[key] for key in same]
    assert masked["accuracy"] == pytest.approx(compressed["accuracy"], abs=0.01)
    found = []
    for storage in made:
        model = models.build("mlp", (1, 8, 8), 10, hidden=(32, 16))
        found.append((regrow.load(tmp_path / storage / "model.safetensors", model), model.fc1.weight))
    assert found[0][0] == found[1][0] and torch.allclose(found[0][1], found[1][1], atol=1e-4)
    kinds = {storage: {p.name for p in (tmp_path / storage).iterdir()} for storage in made}
    assert kinds["masked"] == kinds["compressed"] and "connections.png" in kinds["compressed"]
    with (
        np.load(tmp_path / "masked" / "connections.npz") as one,
        np.load(tmp_path / "compressed/connections.npz") as two,
    ):
        assert np.array_equal(one["counts"], two["counts"]) and np.array_equal(one["steps"], two["steps"])
    records = [json.loads(line) for line in (tmp_path / "compressed" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 60 and not any("explored" in record for record in records)


def test_a_compressed_run_costs_what_a_masked_one_does(tmp_path: Path) -> None:
    made = [folder.run(config(storage=s), tmp_path / s, lambda record: None) for s in ("masked", "compressed")]
    assert made[0]["updates"] == made[1]["updates"] == 8
    assert made[0]["training_flops_ratio"] == pytest.approx(made[1]["training_flops_ratio"])
    model = models.build("mlp", (1, 8, 8), 10, hidden=(32, 16))
    topologies = regrow.load(tmp_path / "compressed" / "model.safetensors", model)
    assert {n: t.nnz for n, t in topologies.items()} == {n: w["nnz"] for n, w in made[1]["layers"].items()}


@pytest.mark.parametrize("method", ["dense", "small_dense"])
def test_a_dense_network_is_masked_whatever_is_asked(method: str, tmp_path: Path) -> None:
    options = {"density": "0.2"} if method == "small_dense" else {}
    made = [
        folder.run(config(storage=s, method=method, options=options, steps=20), tmp_path / s, lambda record: None)
        for s in ("masked", "compressed")
    ]
    assert made[0]["storage"] == made[1]["storage"] == "masked"
    assert made[0]["accuracy"] == made[1]["accuracy"]
    assert json.loads((tmp_path / "compressed" / "config.json").read_text())["storage"] == "compressed"


def test_connections_are_counted_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = regrow.Topology((5, 9), torch.tensor([0, 3, 12, 20, 30, 39, 44]))
    expected = [topology.mask.sum(0).tolist(), [5] * 9]
    monkeypatch.setattr(regrow.Topology, "mask", None)
    assert [loop.connections(t).tolist() for t in (topology, regrow.Topology((5, 9)))] == expected
    assert int(loop.connections(regrow.Topology((10**5, 10**6), torch.tensor([7, 10**11 - 3]))).sum()) == 2


def test_a_complete_run_is_not_trained_again(tmp_path: Path) -> None:
    first = folder.run(config(), tmp_path, lambda record: None)

    def fail(record: dict[str, float]) -> None:
        raise AssertionError("trained again")

    assert folder.run(config(), tmp_path, fail) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match="holds a run with another seed"):
        folder.run(config(seed=1), tmp_path, fail)
    with pytest.raises(ValueError, match=r"holds a run with another storage \('masked', now 'compressed'\)"):
        folder.run(config(storage="compressed"), tmp_path, fail)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match="something other than a run"):
        folder.run(config(), tmp_path, lambda record: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


BAD = [
    (["train", "--density", "1.2"], "density must lie in (0, 1], got 1.2"),
    (["train", "--density", "0"], "density must lie in (0, 1], got 0"),
    (["train", "--method", "riggle"], "there is no method 'riggle'"),
    (["train", "--method", "static", "--density", "0.1", "--interval", "5"], "static has no option interval"),
    (["train", "--density", "0.1", "--interval", "ten"], "interval takes an integer, got 'ten'"),
    (["train", "--density", "0.1", "--allocate", "even"], "allocate takes"),
    (["train", "--density", "0.1", "--allocate", "fc9=0.1"], "'fc9' matches none of the weights"),
    (["train", "--allocate", "fc1=0.1"], "no density for fc2.weight, fc3.weight"),
    (["train", "--allocate", "fc1=0.1,rest=erk", "--density", "0.0001"], "make 1,638 active entries"),
    (["train", "--density", "0.1", "--until", "10000"], "until is 10,000, after the run's last step"),
    (["train", "--density", "0.1", "--steps", "100"], "until is three quarters of the 100 steps"),
    (["train", "--density", "0.1", "--steps", "9", "--epochs", "2"], "--epochs or --steps, not both"),
    (["train", "--density", "0.1", "--skip", "fc9"], "'fc9' in skip= matches none"),
    (["train", "--density", "0.1", "--skip", "fc*"], "nothing to sparsify"),
    (["train", "--density", "0.001", "--budget", "model", "--skip", "fc2"], "least feasible density"),
    (["train", "--density", "0.1", "--hidden", "a"], "--hidden takes widths"),
    (["train", "--density", "0.1", "--batch", "100000"], "--batch must lie between"),
    (["train", "--data", "imagenet"], "there is no data set 'imagenet'"),
    (["train", "--data", "mnist", "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
    (["train", "--no-such-option"], "No such option"),
    (["compare", "--methods", "dense", "--interval", "5"], "none of dense has an option interval"),
    (["compare", "--seeds", "0"], "must be at least 1"),
    (["compare", "--densities", "half"], "--densities takes numbers"),
    (["compare", "--methods", "static,static"], "static-0.1-seed0 would be made twice"),
    (["compare", "--methods", "static", "--densities", "0.1,0"], "density must lie in (0, 1], got 0"),
    (["compare", "--methods", "static rigl:foo=1"], "rigl has no option foo"),
    (["compare", "--methods", ""], "none would be made"),
    (["compare", "--density", "0.1", "--densities", "0.2"], "not both"),
    (["train", "--batch", "0"], "--batch must lie between 1 and"),
    (["train", "--epochs", "inf"], "a run has 1 to"),
    (["train", "--epochs", "nan"], "a run has 1 to"),
    (["train", "--lr", "nan"], "--lr must lie between 0 and 1e+06, got nan"),
    (["train", "--momentum", "5"], "--momentum must lie between"),
    (["train", "--optimizer", "adam", "--momentum", "0.5"], "--momentum is an option of sgd"),
    (["train", "--seed", "-1"], "--seed must lie between"),
    (["train", "--threads", "0"], "--threads must lie between"),
    (["train", "--warmup", "10000"], "--warmup must lie between"),
    (["train", "--density", "1e-9"], "makes none of the 84,480 sparsified ones active"),
    (["train", "--allocate", "fc1=0.1,fc1=0.2"], "a glob is given twice"),
    (["train", "--storage", "packed"], "'packed' is not one of 'masked', 'compressed'"),
    *[
        (
            ["train", "--storage", "compressed", "--method", method, "--density", "0.1", "--steps", "9999"],
            "bytes dense; use --storage masked",
        )
        for method in ("gmp", "snfs", "snip")
    ],
    (["compare", "--storage", "compressed", "--methods", "static,gmp", "--interval", "9"], "use --storage masked"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    status, _, error = command([*arguments, "--out", str(out)], capsys, monkeypatch)
    assert status == 2
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert "allow_dense" not in error
    assert not out.exists()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)

    def interrupt(record: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(steps=400), tmp_path, interrupt)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be resumed"):
        folder.run(config(steps=400), tmp_path, lambda record: None)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02."])
def test_a_foreign_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be resumed \(\w+: .+\): delete"):
        folder.run(config(steps=400), tmp_path, lambda record: None)


def started(path: Path) -> None:
    """A run that was interrupted at its first record."""

    def interrupt(record: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(steps=400), path, interrupt)


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"hidden": 3}'])
def test_damaged_json_is_refused_with_its_path(name: str, content: str, tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / name).write_text(content)
    if (name, content) == ("result.json", '{"hidden": 3}'):
        return
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        folder.run(config(steps=400), tmp_path, lambda record: None)


def test_a_record_that_was_cut_off_does_not_stop_a_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)

    def interrupt(record: dict[str, float]) -> None:
        if record["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(), tmp_path, interrupt)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 21, "lo')
    folder.run(config(), tmp_path, lambda record: None)
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == list(range(1, 61))


def test_an_interrupt_saves_the_step_it_came_in(tmp_path: Path) -> None:
    def interrupt(record: dict[str, float]) -> None:
        if record["step"] == 30:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(), tmp_path / "parts", interrupt)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["done"] == 30
    again = folder.run(config(), tmp_path / "parts", lambda record: None)
    assert again["accuracy"] == folder.run(config(), tmp_path / "whole", lambda record: None)["accuracy"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    def second(record: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="another process is training"):
            folder.run(config(steps=5, options={"density": "0.2", "interval": "1"}), tmp_path, lambda record: None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(steps=5, options={"density": "0.2", "interval": "1"}), tmp_path, second)


def test_the_number_of_threads_may_change(tmp_path: Path) -> None:
    first = folder.run(config(threads=1), tmp_path, lambda record: None)
    assert folder.run(config(threads=None), tmp_path, lambda record: None)["accuracy"] == first["accuracy"]


def test_a_method_keeps_its_own_density() -> None:
    jobs = compare.plan(config(), ["static:density=0.3", "rigl"], [0.1], 1, {}, Path("x"))
    assert [(j.density, j.config.options["density"]) for j in jobs] == [(0.3, "0.3"), (0.1, "0.1")]


def test_the_command_names_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_DATA", "/big/disk")
    monkeypatch.setattr(sys, "argv", ["x", "compare", "--data-dir", "/big/disk/mnist", "--methods", "a b"])
    assert cli._command() == "regrow compare --data-dir $REGROW_DATA/mnist --methods 'a b'"


def test_divergence_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diverged|not finite|NaN"):
        folder.run(config(lr=1e6, steps=50), tmp_path, lambda record: None)
    assert not (tmp_path / "result.json").exists()


def test_train_and_compare_as_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said, _ = command(["train", "--steps", "120", "--interval", "10", *SHORT], capsys, monkeypatch)
    assert status == 0 and "test accuracy" in said and "runs/digits-rigl-seed0" in said
    arguments = [
        "compare",
        "--methods",
        "dense small_dense rigl:fraction=0.5",
        "--densities",
        "0.3,0.2",
        "--seeds",
        "2",
    ]
    status, said, _ = command(
        [*arguments, "--steps", "120", "--interval", "20", "--out", "c", *SHORT], capsys, monkeypatch
    )
    assert status == 0
    table = Path("c/table.md").read_text()
    assert json.loads(Path("runs/digits-rigl-seed0/result.json").read_text())["density"] == pytest.approx(0.1, abs=1e-3)
    assert table.count("| dense |") == 1 and table.count("| rigl:fraction=0.5 |") == 2
    runs = json.loads(Path("c/results.json").read_text())["runs"]
    assert len(runs) == 2 + 4 + 4
    assert {r["steps"] for r in runs} == {120}
    assert all(r["training_flops_ratio"] < 0.5 for r in runs if r["method"] != "dense")


def test_the_storage_is_said_where_results_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--storage", "compressed", "--steps", "20", "--interval", "5", *SHORT]
    status, said, _ = command(["train", *short], capsys, monkeypatch)
    assert status == 0 and "compressed storage" in said and "R_s" not in said
    status, said, _ = command(["train", "--method", "dense", *short[:4], *SHORT], capsys, monkeypatch)
    assert status == 0 and "dense is dense throughout: it ran in masked storage" in said
    arguments = ["compare", "--methods", "dense static rigl", "--densities", "0.2", "--out", "c", *short]
    status, said, _ = command(arguments, capsys, monkeypatch)
    assert status == 0 and "compressed storage (dense" in said
    assert "compressed storage (dense masked)" in Path("c/table.md").read_text()
    runs = json.loads(Path("c/results.json").read_text())["runs"]
    assert {run["method"]: run["storage"] for run in runs} == {
        "dense": "masked",
        "static": "compressed",
        "rigl": "compressed",
    }


def test_every_storage_is_on_the_command_line() -> None:
    for shown in (cli.train, cli.compare):
        option = next(parameter for parameter in shown.params if parameter.name == "storage")
        assert tuple(option.type.choices) == get_args(Storage) and option.default == Config().storage == "masked"


def test_compare_in_processes_of_their_own_gives_the_same(tmp_path: Path) -> None:
    """One job, since each process takes seconds to import everything."""
    jobs = {n: compare.plan(config(), ["static"], [0.2], 1, {}, tmp_path / str(n)) for n in (1, 2)}
    found = {n: {j.folder.name: r["accuracy"] for j, r in compare.run_all(jobs[n], n, lambda *a: None)} for n in (1, 2)}
    assert found[1] == found[2] and len(found[1]) == 1


def test_rows_hold_mean_and_spread() -> None:
    jobs = compare.plan(config(), ["dense", "static"], [0.1], 2, {}, Path("x"))
    common = {
        "explored": None,
        "also": {},
        "inference_flops_ratio": 1.0,
        "training_flops_ratio": 0.5,
        "seconds": 2.0,
        "nnz": 7,
        "density": 0.3,
    }
    results = [(job, {**common, "accuracy": 0.5 + 0.1 * i}) for i, job in enumerate(jobs)]
    rows = compare.rows(results)
    assert [(r.method, r.density) for r in rows] == [("dense", None), ("static", 0.1)]
    assert rows[0].mean == pytest.approx(0.55) and rows[0].std == pytest.approx(0.1 / 2**0.5)
    assert compare.cells(rows[1])[3] == "75.00 ± 7.07"


def test_every_option_of_every_method_is_on_the_command_line() -> None:
    offered = {parameter.name.removeprefix("option_") for parameter in cli.train.params}
    for method, recipe in RECIPES.items():
        assert list(options(method)) == list(inspect.signature(recipe).parameters)
        assert set(options(method)) <= offered
        assert all(option.help for option in options(method).values()), method
        assert summary(method)
        assert method == "dense" or paper(method), method
    assert CliRunner().invoke(cli.cli, ["methods"]).exit_code == 0


def test_options_reach_the_method() -> None:
    method = make("rigl", {"density": "0.1", "interval": "7", "begin": "9", "until": "50", "timing": "after"}, 100)
    assert [step for step in range(100) if method.due(step)] == [9, 16, 23, 30, 37, 44]
    assert method.timing == "after"
    assert [s for s in range(200) if make("rigl", {"density": "0.1", "interval": "50"}, 200).due(s)] == [50, 100]


def test_allocations_as_typed() -> None:
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    counts = regrow.parts.allocation.counts(parse_allocation("fc3=1,rest=uniform"), shapes, 0.1)
    assert counts["fc3"] == 1000 and sum(counts.values()) == 26620


def test_defaults_depend_on_the_model() -> None:
    assert resolved(Config(), 1437).model == "mlp"
    wide = resolved(Config(data="cifar10"), 50_000)
    assert wide.model == "wrn-22-2" and wide.augment and wide.steps == 30 * 390
    assert resolved(Config(augment=False, data="cifar10", epochs=0.5), 50_000).steps == 195


def test_python_m_regrow_answers() -> None:
    done = subprocess.run([sys.executable, "-m", "regrow", "--version"], capture_output=True, text=True, check=True)
    assert regrow.__version__ in done.stdout


def test_the_loop_makes_no_draw_from_the_global_generator(tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(folder.run(config(steps=20), tmp_path / str(seed), lambda record: None)["accuracy"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("words", "unit"),
    [
        ("groups(8)", (8, 1)),
        ("blocks(4,2)", (4, 2)),
        ("blocks(4, 2)", (4, 2)),
        ("heads(4)", (4, 12)),
        ("columns", (16, 1)),
    ],
)
def test_structures_are_words_too(words: str, unit: tuple[int, int]) -> None:
    method = make("rigl", {"density": "0.1", "structure": words}, 1000)
    assert method.units is not None
    assert method.units.box(Shaped("w", (16, 12), regrow.Topology((16, 12)))) == unit
    assert make("rigl", {"density": "0.1", "structure": "none"}, 1000).units is None


@pytest.mark.parametrize(
    "words", ["groups", "groups()", "groups(0)", "blocks(8)", "groups(8", "heads(2,2)", "lines", ""]
)
def test_a_structure_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"rigl: structure takes groups\(G\) \| .* none, got"):
        make("rigl", {"density": "0.1", "structure": words}, 1000)


@pytest.mark.parametrize(("words", "active"), [("diagonals", 12), ("n_of_m(1,2)", 24), ("groups(2)", 14)])
def test_patterns_are_words_where_no_units_are_asked_for(words: str, active: int) -> None:
    method = make("pa_dst", {"density": "0.5" if words.startswith("n_of") else "0.3", "structure": words}, 4)
    model = torch.nn.Linear(8, 6, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, method)
    for _ in range(3):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    assert sparsifier.nnz == active
    assert options("pa_dst")["structure"].default == "diagonals"


@pytest.mark.parametrize("words", ["none", "n_of_m(2)", "stripes"])
def test_a_pattern_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"pa_dst: structure takes diagonals \| n_of_m\(N,M\) .* columns, got"):
        make("pa_dst", {"density": "0.5", "structure": words}, 100)


def test_a_comparison_takes_structures_with_a_comma_of_their_own() -> None:
    specs = ["rigl:structure=blocks(4,2),fraction=0.2", "rigl:fraction=0.2,structure=groups(8)"]
    jobs = compare.plan(config(), specs, [0.1], 1, {}, Path("x"))
    assert [job.config.options["structure"] for job in jobs] == ["blocks(4,2)", "groups(8)"]
    assert all(job.config.options["fraction"] == "0.2" for job in jobs)
