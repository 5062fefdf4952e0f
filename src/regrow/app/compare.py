"""Several methods on the same data with equal steps: one run each, one table with its spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from regrow.app import folder, pictures
from regrow.app.config import Config, write_text
from regrow.app.vocabulary import RECIPES, options


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    config: Config
    folder: Path
    density: float | None


def plan(
    base: Config,
    specs: Sequence[str],
    densities: Sequence[float | None],
    seeds: int,
    shared: Mapping[str, str],
    out: Path,
) -> list[Job]:
    """Every method at every density with every seed; a method without a density runs once per seed.

    Args:
        base: settings common to all.
        specs: "METHOD" or "METHOD:OPTION=VALUE,...".
        densities: overall densities; None leaves it to an explicit allocation.
        seeds: how many, counted up from the base's.
        shared: options given to every method that has them.
        out: the comparison's folder.

    Raises:
        ValueError: for an unknown method, or an option that no method has.
    """
    parsed = [_spec(spec) for spec in specs]
    for name in shared:
        if not any(name in options(method) for method, _ in parsed):
            raise ValueError(f"none of {', '.join(m for m, _ in parsed)} has an option {name}")
    jobs = []
    for (method, own), spec in zip(parsed, specs, strict=True):
        known = options(method)
        for density in densities if "density" in known else [None]:
            given = {name: value for name, value in shared.items() if name in known} | own
            given |= {} if density is None else {"density": f"{density:g}"}
            for seed in range(base.seed, base.seed + seeds):
                label = spec.replace(":", "_").replace(",", "_").replace("=", "-")
                name = f"{label}-{'' if density is None else f'{density:g}-'}seed{seed}"
                jobs.append(Job(replace(base, method=method, options=given, seed=seed), out / name, density))
    return jobs


def _spec(spec: str) -> tuple[str, dict[str, str]]:
    method, _, text = spec.partition(":")
    if method not in RECIPES:
        raise ValueError(f"there is no method {method!r}: choose {', '.join(RECIPES)}")
    pairs = [part.partition("=") for part in text.split(",") if part]
    return method, {name.replace("-", "_"): value for name, _, value in pairs}


def run_all(
    jobs: Sequence[Job], workers: int, report: Callable[[Job, dict[str, float]], None]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run the jobs that are not complete yet, `workers` at a time, yielding each with its result."""
    if workers == 1:
        for job in jobs:
            yield job, folder.run(job.config, job.folder, lambda record, job=job: report(job, record))  # type: ignore[misc]
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            futures = {pool.submit(_quietly, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _quietly(job: Job) -> dict[str, Any]:
    return folder.run(replace(job.config, threads=1), job.folder, lambda record: None)


@dataclass(frozen=True)
class Row:
    """One method at one density over its seeds."""

    method: str
    density: float | None
    accuracy: tuple[float, ...]
    explored: float | None
    inference: float
    training: float
    seconds: float
    nnz: int
    realised: float
    """Active share of the sparsified entries, which an explicit allocation decides."""

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracy)

    @property
    def std(self) -> float:
        """Sample standard deviation of the accuracy; 0 for one seed."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else 0.0


def rows(results: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[Row]:
    """Results gathered over seeds, in the order of the plan."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for job, result in results:
        label = job.folder.name.rpartition("-seed")[0]
        label = label if job.density is None else label.rpartition("-")[0]
        groups.setdefault((label, job.density), []).append(result)
    return [_row(label, density, group) for (label, density), group in groups.items()]


def _row(label: str, density: float | None, group: Sequence[Mapping[str, Any]]) -> Row:
    explored = [r["explored"] for r in group if r["explored"] is not None]
    return Row(
        label,
        density,
        tuple(r["accuracy"] for r in group),
        statistics.fmean(explored) if explored else None,
        statistics.fmean(r["inference_flops_ratio"] for r in group),
        statistics.fmean(r["training_flops_ratio"] for r in group),
        statistics.median(r["seconds"] for r in group),
        group[0]["nnz"],
        group[0]["density"],
    )


HEAD = ("method", "density", "active", "accuracy %", "R_s", "f_S/f_D", "training", "seconds")


MEANING = (
    "accuracy on the test set, mean and standard deviation over runs; R_s: share of entries ever active; "
    "f_S/f_D: FLOPs of a forward pass relative to the dense network's; training: FLOPs of training relative to its"
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under `HEAD`: `MEANING` says what the columns are."""
    return (
        row.method,
        f"{row.realised:.4g}" if row.density is None else f"{row.density:g}",
        f"{row.nnz:,}",
        f"{100 * row.mean:.2f} ± {100 * row.std:.2f}",
        "" if row.explored is None else f"{row.explored:.3f}",
        f"{row.inference:.3f}x",
        f"{row.training:.3f}x",
        f"{row.seconds:.1f}",
    )


def write(out: Path, jobs: Sequence[Job], results: Sequence[tuple[Job, Mapping[str, Any]]], command: str) -> list[Row]:
    """Write `table.md`, `results.json` and `comparison.png` into `out`, in the order of the plan."""
    found = {id(job): result for job, result in results}
    ordered = [(job, found[id(job)]) for job in jobs]
    table = rows(ordered)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in table]
    about = ordered[0][1]["versions"]
    setting = f"regrow {about['regrow']}, torch {about['torch']}, {about['processor']}"
    runs = f"{ordered[0][1]['steps']:,} steps each, {max(len(row.accuracy) for row in table)} seeds"
    note = f"`{command}`\n\n{runs}; {setting}.\n\n{MEANING}.\n\n"
    write_text(out / "table.md", note + "\n".join(lines) + "\n")
    kept = [{"run": job.folder.name, **{k: v for k, v in result.items() if k != "layers"}} for job, result in ordered]
    write_text(out / "results.json", json.dumps({"command": command, "runs": kept}, indent=1) + "\n")
    pictures.comparison(
        [(r.method, 1.0 if r.density is None else r.density, r.mean, r.std) for r in table], out / "comparison.png"
    )
    return table
