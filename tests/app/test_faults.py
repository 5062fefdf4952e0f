"""Whatever a kill, a full disk or a damaged file does to a run's folder, the same command goes on and loses nothing.

`REGROW_KILL_EVERY=1` kills before every filesystem call of a run, and not before a few of them.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow.app import folder, loop
from regrow.files import partial_files, replacing
from support.app import config

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod"}
KILLED = 9
EVERY = int(os.environ.get("REGROW_KILL_EVERY", "60"))


def quietly(record: dict[str, Any]) -> None:
    """No progress."""


def watch(out: Path, at: int, count: list[int]) -> None:
    """Count this process's calls on files under `out`, and end it without a word before one of them."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(out) in str(arguments[0]):
            if count[0] == at:
                os._exit(KILLED)
            count[0] += 1

    sys.addaudithook(hook)


def in_a_child(out: Path, at: int) -> int:
    """Train in a process that is killed before call number `at`; its exit status, or -1 where it came to the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            loop.CHECKPOINT_SECONDS = -1.0
            count = [0]
            watch(out, at, count)
            folder.run(config(steps=12), out, quietly)
            os.write(writing, str(count[0]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        told = file.read()
    return -int(told) if told else os.waitstatus_to_exitcode(status)


def left(out: Path) -> dict[str, Any]:
    """What a finished run left, but for its times."""
    result = json.loads((out / "result.json").read_text())
    kept = {k: v for k, v in result.items() if k not in ("seconds", "peak_rss_bytes")}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in record.items() if k not in ("seconds", "step_seconds")} for record in records]
    return {"result": kept, "records": plain, "model": (out / "model.safetensors").read_bytes()}


def test_a_run_killed_before_a_call_on_a_file_goes_on_to_the_bit(tmp_path: Path) -> None:
    calls = -in_a_child(tmp_path / "whole", -1)
    assert calls > 30
    wanted = left(tmp_path / "whole")
    for at in range(0, calls, EVERY):
        out = tmp_path / f"killed-{at}"
        assert in_a_child(out, at) == KILLED
        folder.run(config(steps=12), out, quietly)
        assert left(out) == wanted, f"killed before call {at} of {calls}"
        assert not partial_files(out) and not (out / "checkpoint.pt").exists()


def test_a_run_killed_after_its_results_are_written_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint goes last: until the results are there it is what the run goes on from."""
    gone = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name == "checkpoint.pt":
            gone.append((tmp_path / "result.json").is_file())
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    folder.run(config(steps=12), tmp_path, quietly)
    assert gone == [True]


@pytest.mark.parametrize("names", [[".lock"], [".config.json.abc.partial"], [".lock", ".config.json.abc.partial"]])
def test_a_folder_with_nothing_but_leftovers_is_used_and_cleaned(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    folder.run(config(steps=12), tmp_path, quietly)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = folder.run(config(steps=12), tmp_path, quietly)
    looks = [None]
    monkeypatch.setattr(folder, "complete", lambda *a, real=folder.complete: looks.pop() if looks else real(*a))
    monkeypatch.setattr(loop, "train", None)
    assert folder.run(config(steps=12), tmp_path, quietly) == done


@pytest.mark.parametrize("damage", ["halved", "empty", "other"])
def test_damaged_maps_do_not_stop_a_resumption(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.run(config(steps=12), tmp_path, interrupt)
    path = tmp_path / "connections.npz"
    content = {"halved": path.read_bytes()[:90], "empty": b""}.get(damage)
    if content is None:
        np.savez_compressed(path, steps=np.arange(3), counts=np.zeros((3, 2, 2)))
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "regrow"):
        folder.run(config(steps=12), tmp_path, quietly)
    assert "connections.npz cannot be read" in caplog.text
    assert (tmp_path / "connections.png").is_file()


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for it; what was there before is kept."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    data, settings = folder.prepare(config(steps=12))
    run = loop.build(settings, data)
    maps = loop.Maps(run, data, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^there is no room to write {path} \(File too large\)") as raised:
            loop.save_checkpoint(run, maps, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno is None
    assert path.read_bytes() == b"before" and not partial_files(tmp_path)


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "name") as temporary:
        (tmp_path / "name").mkdir()
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
