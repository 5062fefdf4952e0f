"""Several methods on the same data with equal steps: one run each, one table with its spread."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from regrow.app import folder, loop, pictures
from regrow.app.config import Config, resolved, write_text
from regrow.app.vocabulary import AROUND, options, parse_method


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    config: Config
    folder: Path
    label: str
    """The method as typed."""
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
    parsed, outer = [parse_method(spec) for spec in specs], options(AROUND)
    for name in shared:
        if name not in outer and not any(name in options(method) for method, _ in parsed):
            raise ValueError(f"none of {', '.join(m for m, _ in parsed)} has an option {name}")
    jobs = []
    for (method, own), spec in zip(parsed, specs, strict=True):
        known = options(method)
        chosen = [None] if "density" not in known else [float(own["density"])] if "density" in own else densities
        for density in chosen:
            given = {name: value for name, value in shared.items() if name in known or name in outer} | own
            given |= {} if density is None else {"density": str(density)}
            for seed in range(base.seed, base.seed + seeds):
                name = spec.replace(":", "_").replace(",", "_").replace("=", "-")
                name += f"-{'' if density is None else f'{density}-'}seed{seed}"
                config = replace(base, method=method, options=given, seed=seed)
                jobs.append(Job(config, out / name, spec, density))
    folders = [job.folder.name for job in jobs]
    twice = sorted({name for name in folders if folders.count(name) > 1})
    if twice or not jobs:
        raise ValueError(f"a comparison needs different runs, and {', '.join(twice) or 'none'} would be made twice")
    return jobs


def check(jobs: Sequence[Job]) -> None:
    """Raise ValueError unless every job can run: all settings are tried before the first network trains."""
    data, _ = folder.prepare(jobs[0].config)
    for job in jobs:
        settings = resolved(job.config, len(data.train_y))
        loop.build(settings, data)
        folder.complete(settings, job.folder)


def run_all(
    jobs: Sequence[Job], workers: int, report: Callable[[Job, dict[str, float]], None]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run the jobs that are not complete yet, `workers` at a time, yielding each with its result."""
    if workers == 1:
        for job in jobs:
            yield job, folder.run(job.config, job.folder, lambda record, job=job: report(job, record))  # type: ignore[misc]
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _watch_parent, (os.getpid(),), max_tasks_per_child=1) as pool:
        try:
            futures = {pool.submit(_quietly, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _watch_parent(parent: int) -> None:
    """End this worker when the process that started it is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _quietly(job: Job) -> dict[str, Any]:
    return folder.run(replace(job.config, threads=job.config.threads or 1), job.folder, lambda record: None)


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
        """Sample standard deviation of the accuracy; NaN for one seed."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else math.nan


def rows(results: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[Row]:
    """Results gathered over seeds, in the order of the plan."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for job, result in results:
        groups.setdefault((job.label, job.density), []).append(result)
        for other, accuracy in result["also"].items():
            groups.setdefault((f"{job.label} ({other})", job.density), []).append({**result, "accuracy": accuracy})
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
        f"{100 * row.mean:.2f}" + (f" ± {100 * row.std:.2f}" if len(row.accuracy) > 1 else ""),
        "" if row.explored is None else f"{row.explored:.3f}",
        f"{row.inference:.3f}x",
        f"{row.training:.3f}x",
        f"{row.seconds:.1f}",
    )


def storages(results: Sequence[tuple[Job, Mapping[str, Any]]]) -> str:
    """Which storage the runs were in, and which methods were in another than what was asked for."""
    asked = results[0][0].config.storage
    others = {job.label: str(result["storage"]) for job, result in results if result["storage"] != asked}
    apart = ", ".join(f"{label} {storage}" for label, storage in others.items())
    return f"{asked} storage" + (f" ({apart})" if apart else "")


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
    held = storages(ordered)
    note = f"`{command}`\n\n{runs}; {held}; {setting}.\n\n{MEANING}.\n\n"
    write_text(out / "table.md", note + "\n".join(lines) + "\n")
    kept = [
        {"run": job.folder.name, **{k: v for k, v in result.items() if k not in ("layers", "peak_rss_bytes")}}
        for job, result in ordered
    ]
    write_text(out / "results.json", json.dumps({"command": command, "runs": kept}, indent=1) + "\n")
    pictures.comparison(
        [(r.method, 1.0 if r.density is None else r.density, r.mean, r.std) for r in table], out / "comparison.png"
    )
    return table
