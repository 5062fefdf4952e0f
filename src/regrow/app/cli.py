"""The command line: `regrow train`, `regrow compare`, `regrow bench`, `regrow methods`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import torch
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from regrow import __version__
from regrow.app import bench as benchmark
from regrow.app import compare as comparison
from regrow.app import folder, recipes
from regrow.app.config import Config
from regrow.app.models import MODELS, Shape, build
from regrow.app.vocabulary import AROUND, RECIPES, known_options, options, paper, parse_units, summary
from regrow.core.text import by
from regrow.storage.stored import Storage

DENSITY = "0.1"
"""Where neither a density nor an explicit allocation is given."""

DIFFERING = frozenset({"threshold", "decay", "penalty"})
"""Options that are not the same thing in all methods that have them."""

_console = Console()


def main() -> None:
    """Run the command line; bad input ends with one sentence and exit status 2, an interrupt with 130."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        _fail("interrupted: the same command goes on where it stopped", 130)
    except (ValueError, OSError) as error:
        _fail(_as_typed(str(error)), 2)


def _fail(message: str, status: int) -> None:
    Console(stderr=True).print(f"regrow: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(status)


def _as_typed(message: str) -> str:
    """A message of the library, in the words of the command line: it offers no `allow_dense`."""
    message = message.replace("pass allow_dense=True to accept that, or use", "use")
    return re.sub(r'\b(storage|budget)="(\w+)"', r"--\1 \2", message)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="regrow")
def cli() -> None:
    """Train sparse neural networks: most of their connections never exist."""


def _shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The settings of data, model and training, the same for `train` and `compare`."""
    decorators = [
        click.option(
            "--data",
            help="digits, mnist, fashion-mnist, cifar10, cifar100, or any name with --data-dir. "
            "Default: the folder's name, or digits.",
        ),
        click.option("--data-dir", type=click.Path(), help="Folder with IDX files or Hugging Face parquet files."),
        click.option("--model", type=click.Choice(list(MODELS)), help="Network; by default what suits the data."),
        click.option("--hidden", help="Hidden widths of the mlp, such as 512,256."),
        click.option("--skip", multiple=True, help="Name or glob of weights that stay dense (may be repeated)."),
        click.option("--only", multiple=True, help="Name or glob of the weights that are sparsified at all."),
        click.option(
            "--budget",
            type=click.Choice(["sparsified", "model"]),
            default="sparsified",
            show_default=True,
            help="What the density counts: sparsified weights, or all weights of the model.",
        ),
        click.option(
            "--storage",
            type=click.Choice(get_args(Storage)),
            default="masked",
            show_default=True,
            help="How weights are held: masked as dense tensors with zeros, compressed as active values only.",
        ),
        click.option("--weights", type=click.Path(), help="A saved model (model.safetensors) to begin with."),
        click.option("--epochs", type=float, help="Length of training; the default depends on the model."),
        click.option("--steps", type=int, help="Length of training in optimizer steps."),
        click.option("--batch", type=int, help="Examples per step."),
        click.option(
            "--optimizer",
            type=click.Choice(["sgd", "adam", "adamw"]),
            default="sgd",
            show_default=True,
        ),
        click.option("--lr", type=float, help="Peak learning rate."),
        click.option("--momentum", type=float, help="Of sgd; default 0.9."),
        click.option("--nesterov/--no-nesterov", default=True, show_default=True, help="Momentum of sgd looks ahead."),
        click.option("--weight-decay", type=float, help="L2 (sgd, adam) or decoupled (adamw)."),
        click.option(
            "--schedule",
            type=click.Choice(["cosine", "step", "constant"]),
            default="cosine",
            show_default=True,
            help="Learning rate over the run; step is x 0.1 at a half and three quarters.",
        ),
        click.option("--warmup", type=int, default=0, show_default=True, help="Steps of linear warm-up."),
        click.option(
            "--augment/--no-augment", default=None, help="Random crops (and flips on CIFAR); default for wrn-22-2."
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Of initialization, topology and data order."
        ),
        click.option("--threads", type=int, help="Threads of torch."),
    ]
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def _method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every option that some method has, with the methods that have it."""
    having: dict[str, list[str]] = {}
    for method in RECIPES:
        for name in options(method):
            having.setdefault(name, []).append(method)
    for name, names in reversed(having.items()):
        found = [options(method)[name] for method in names]
        words = " or ".join(dict.fromkeys(_metavar(option.words) for option in found))
        text = f"{_said(name, names)} [{', '.join(names)}]{_defaults(name, names)}"
        command = click.option(f"--{name.replace('_', '-')}", f"option_{name}", metavar=words, help=text)(command)
    return command


def _said(name: str, methods: list[str]) -> str:
    """What an option means: in the words of its best known method, and in those of others where it means more."""
    said = {method: _plain(options(method)[name].help) for method in methods}
    first = "rigl" if "rigl" in methods else methods[0]
    others = {method: text for method, text in said.items() if name in DIFFERING and text != said[first]}
    return " ".join([said[first], *(f"Of {method}: {text}" for method, text in others.items())])


def _outer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that go around any method."""
    for name, option in reversed(options(AROUND).items()):
        default = "" if option.default is None else f" Default: {option.default}."
        command = click.option(
            f"--{name.replace('_', '-')}",
            f"option_{name}",
            metavar=_metavar(option.words),
            help=_plain(option.help) + default,
        )(command)
    return command


def _defaults(name: str, methods: list[str]) -> str:
    """An option's default, or those of its methods where they differ."""
    found = {m: d for m in methods if (d := options(m)[name].default) is not None}
    if not found:
        return ""
    if len(set(found.values())) == 1:
        return f" Default: {next(iter(found.values()))}."
    return f" Defaults: {', '.join(f'{method} {default}' for method, default in found.items())}."


def _plain(said: str) -> str:
    """A docstring's sentence as the command line would say it."""
    changes = {
        "None means `interval`": "default: the interval",
        "; None leaves it to an explicit allocation": "; default 0.1, or what an explicit allocation says",
        "None to give": "none to give",
        '"': "",
        "`": "",
    }
    for old, new in changes.items():
        said = said.replace(old, new)
    return said


def _metavar(words: str) -> str:
    return {"a number": "NUMBER", "an integer": "N", "a name": "NAME"}.get(words, words.replace(" ", ""))


@cli.command()
@click.option("--method", default="rigl", show_default=True, help=f"One of {', '.join(RECIPES)}.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The run's folder; an interrupted run in it goes on. Default: runs/DATA-METHOD-seedN.",
)
@click.option("--recipe", help=f"Published settings: {', '.join(recipes.names())}; what else is given counts more.")
@_shared_options
@_outer_options
@_method_options
def train(method: str, out: Path | None, recipe: str | None, **given: Any) -> None:
    """Train one network and leave a folder with its record, result, model and pictures."""
    context = click.get_current_context()
    if recipe is not None:
        settings = recipes.settings(recipe, steps=given["steps"], epochs=given["epochs"])
        typed = {name for name in given if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
        method = method if context.get_parameter_source("method") == ParameterSource.COMMANDLINE else settings["method"]
        given |= _unless_typed(settings, typed, given)
    config = _config(given, method)
    if "density" in known_options(method) and "density" not in config.options and not _is_explicit(config.options):
        config = replace(config, options={**config.options, "density": DENSITY})
    out = out or Path("runs") / f"{config.data}-{method}-seed{config.seed}"
    with _progress() as bar:
        task = bar.add_task(method, total=None, loss="", accuracy="", density="", explored="")

        def report(record: dict[str, float]) -> None:
            bar.update(task, total=total(), completed=record["step"], **_live(record))

        @cache
        def total() -> float | None:
            return float(Config.from_json((out / "config.json").read_text()).steps or 0)

        again = (out / "result.json").exists()
        result = folder.run(config, out, report)
    if again:
        _console.print(f"{out} holds this run already: nothing was trained", highlight=False, soft_wrap=True)
    if result["storage"] != config.storage:
        _console.print(
            f"{method} is dense throughout: it ran in {result['storage']} storage", highlight=False, soft_wrap=True
        )
    _show_result(result)
    _console.print(f"everything of this run is in {out}", highlight=False, soft_wrap=True)


def _unless_typed(settings: Mapping[str, Any], typed: set[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings under the names of the command's parameters, without what was typed."""
    if "data_dir" in typed:
        typed = typed | {"data"}
    found = {name if name in given else f"option_{name}": value for name, value in settings.items() if name != "method"}
    return {
        name: _as_word(value) if name.startswith("option_") else value
        for name, value in found.items()
        if name not in typed
    }


def _as_word(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


@cli.command()
@click.option(
    "--methods",
    "specs",
    default="dense,small_dense,static,set,rigl",
    show_default=True,
    help="Separated by spaces or commas; METHOD:OPTION=VALUE,... sets options of one alone (then separate by spaces).",
)
@click.option("--densities", help="Separated by commas. Default: 0.1, or what an explicit --allocate says.")
@click.option(
    "--seeds", type=int, default=1, show_default=True, help="How many runs of each, with seeds counted up from --seed."
)
@click.option(
    "--jobs",
    type=int,
    default=1,
    show_default=True,
    help="Runs at a time, each with one thread where there are several.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The comparison's folder; complete runs in it are kept. Default: runs/compare-DATA.",
)
@_shared_options
@_outer_options
@_method_options
def compare(specs: str, densities: str | None, seeds: int, jobs: int, out: Path | None, **given: Any) -> None:
    """Train several methods on the same data with equal steps and print one table."""
    config = _config(given, "dense")
    if seeds < 1 or jobs < 1:
        raise ValueError(f"--seeds and --jobs must be at least 1, got {seeds} and {jobs}")
    if "density" in config.options and densities is not None:
        raise ValueError(f"give --density or --densities, not both (got {config.options['density']} and {densities})")
    densities = config.options.get("density", densities)
    shared = {k: v for k, v in config.options.items() if k != "density"}
    names = specs.split() if ":" in specs else specs.replace(",", " ").split()
    out = out or Path("runs") / f"compare-{config.data}"
    todo = comparison.plan(config, names, _densities(densities, shared), seeds, shared, out)
    comparison.check(todo)
    results = []
    with _progress() as bar:
        task = bar.add_task("runs", total=len(todo), loss="", accuracy="", density="", explored="")

        def report(job: comparison.Job, record: dict[str, float]) -> None:
            bar.update(task, description=job.folder.name, **_live(record))

        for job, result in comparison.run_all(todo, jobs, report):
            results.append((job, result))
            bar.update(task, advance=1, description=job.folder.name)
    table = comparison.write(out, todo, results, _command())
    title = f"{results[0][1]['data']}: {results[0][1]['steps']:,} steps each, {comparison.storages(results)}"
    shown = Table(*comparison.HEAD, title=title, caption=comparison.MEANING, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown.columns:
        column.no_wrap, column.justify = True, "left" if column.header == "method" else "right"
    for row in table:
        shown.add_row(*comparison.cells(row))
    _console.print(shown)
    _console.print(f"runs, table and picture are in {out}", highlight=False, soft_wrap=True)


@cli.command()
@click.option("--model", type=click.Choice(list(MODELS)), help="All layers of a network.")
@click.option("--shape", help="Of the network's images, as 3x32x32; the default depends on the network.")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    help="One layer by its weight: 300x784 (out x in), conv:64x32x3x3@16x16 (out x in x kernel @ image); may be "
    "repeated.",
)
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Examples per step.")
@click.option(
    "--densities",
    default=",".join(f"{density:g}" for density in benchmark.DENSITIES),
    show_default=True,
    help="Separated by commas.",
)
@click.option(
    "--structure",
    "structures",
    multiple=True,
    default=tuple(benchmark.STRUCTURES),
    show_default=True,
    help="What else than single entries may be active or inactive together: groups(G), blocks(H,W), heads(N), rows, "
    "columns; may be repeated.",
)
@click.option("--peers", is_flag=True, help="Also time SparseLab and SparseProp, where they are installed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
def bench(
    model: str | None,
    shape: str | None,
    layers: tuple[str, ...],
    batch: int,
    densities: str,
    structures: tuple[str, ...],
    peers: bool,
    as_json: bool,
    threads: int | None,
) -> None:
    """Time layers on this machine, dense and sparse, and say from which density on sparse ones win."""
    if (model is None) == (not layers):
        raise ValueError(f"give --model or --layer, {'not both' if layers else 'one of the two'}")
    if shape is not None and model is None:
        raise ValueError("--shape is of a network's images: give --model too, or leave it out")
    if threads is not None:
        torch.set_num_threads(threads)
    shares = _numbers(densities)
    units = {words: found for words in structures if (found := parse_units(words)) is not None}
    if model is None:
        report = benchmark.bench_layers(layers, batch, shares, structures=units, peers=peers)
    else:
        size = _image_shape(shape or ("3x32x32" if model == "wrn-22-2" else "1x28x28"))
        report = benchmark.bench(
            build(model, size, 10), torch.randn(batch, *size), shares, structures=units, peers=peers
        )
    click.echo(report.to_json() if as_json else str(report))


@cli.command("methods")
def list_methods() -> None:
    """List the methods, each with its paper and its options."""
    for method in RECIPES:
        _console.print(f"[bold]{method}[/]  {summary(method)}", highlight=False)
        _console.print(f"    {paper(method)}", style="dim", highlight=False, markup=False)
        for option in options(method).values():
            default = "" if option.default is None else f" (default {option.default})"
            text = f"    --{option.name.replace('_', '-')} {option.words}{default}"
            _console.print(text, highlight=False, markup=False)
    _console.print("[bold]around any method[/]", highlight=False)
    for option in options(AROUND).values():
        default = "" if option.default is None else f" (default {option.default})"
        text = f"    --{option.name.replace('_', '-')} {option.words}{default}"
        _console.print(text, highlight=False, markup=False)


def _config(given: dict[str, Any], method: str) -> Config:
    chosen = {k.removeprefix("option_"): v for k, v in given.items() if k.startswith("option_") and v is not None}
    plain = {k: v for k, v in given.items() if not k.startswith("option_")}
    if plain["data"] is None:
        plain["data"] = Path(plain["data_dir"]).resolve().name if plain["data_dir"] else "digits"
    hidden = plain.pop("hidden")
    if hidden is not None:
        try:
            plain["hidden"] = tuple(int(width) for width in hidden.split(","))
        except ValueError:
            raise ValueError(f"--hidden takes widths such as 512,256, got {hidden!r}") from None
    return Config(method=method, options=chosen, **plain)


def _densities(text: str | None, shared: Mapping[str, str]) -> list[float | None]:
    if text is None:
        return [None if _is_explicit(shared) else float(DENSITY)]
    return list(_numbers(text))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--densities takes numbers separated by commas, got {text!r}") from None


def _image_shape(text: str) -> Shape:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"--shape takes channels x height x width such as 3x32x32, got {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def _command() -> str:
    """The command as typed, with the folder that $REGROW_DATA names written as that."""
    root = os.environ.get("REGROW_DATA", "")
    words = [shlex.quote(word) for word in sys.argv[1:]]
    return " ".join(
        ["regrow", *(w.replace(root, "$REGROW_DATA", 1) if root and w.startswith(root) else w for w in words)]
    )


def _is_explicit(chosen: Mapping[str, str]) -> bool:
    """Whether an allocation or a pattern alone says how many entries are active."""
    return "n" in chosen or ("=" in chosen.get("allocate", "") and "rest=" not in chosen["allocate"])


def _progress() -> Progress:
    fields = ("loss", "accuracy", "density", "explored")
    columns = [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_console,
        transient=True,
    )


def _live(record: dict[str, float]) -> dict[str, Any]:
    return {
        "loss": f"loss {record['loss']:.4f}",
        "accuracy": f"train {100 * record['accuracy']:.1f} %",
        "density": f"density {record['density']:.4g}",
        "explored": f"R_s {record['explored']:.3f}" if "explored" in record else "",
    }


def _show_result(result: dict[str, Any]) -> None:
    table = Table(
        "layer",
        "shape",
        "density",
        "active",
        title=f"{result['method']}, seed {result['seed']}, {result['steps']:,} steps, {result['storage']} storage",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, layer in result["layers"].items():
        table.add_row(name, by(layer["shape"]), f"{layer['nnz'] / layer['numel']:.4f}", f"{layer['nnz']:,}")
    table.add_section()
    table.add_row("all", "", f"{result['density']:.4f}", f"{result['nnz']:,}")
    _console.print(table)
    explored = "" if result["explored"] is None else f", R_s {result['explored']:.3f}"
    _console.print(
        f"test accuracy {100 * result['accuracy']:.2f} %{explored}, FLOPs of dense: inference "
        f"{result['inference_flops_ratio']:.3f}x, "
        f"training {result['training_flops_ratio']:.3f}x, {result['seconds']:.1f} s, peak memory "
        f"{result['peak_rss_bytes'] / 2**20:,.0f} MiB",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
