"""The benchmark runs on the tiny data set; what it measures is not tested."""

import multiprocessing
import os
import re
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import benchmark_training
import pytest


@pytest.mark.usefixtures("tiny_mnist")
def test_tables(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def new_thread(
        target: Callable, args: tuple, daemon: bool
    ) -> threading.Thread:  # starts faster than a process
        connection = Connection(os.dup(args[0].fileno()))
        return threading.Thread(target=target, args=(connection, *args[1:]), daemon=daemon)

    threads = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=new_thread)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: threads)
    monkeypatch.setattr(benchmark_training, "bfloat16_instructions", lambda: ["amx_bf16"])
    commands = []
    monkeypatch.setattr(
        benchmark_training.subprocess, "run", lambda command, **options: commands.append(command)
    )
    options = "--rounds", 1, "--steps", 3, "--data-dir", tiny_data
    monkeypatch.setattr("sys.argv", ["benchmark_training.py", *map(str, options)])
    benchmark_training.main()
    lines = capsys.readouterr().out.splitlines()
    assert ", amx_bf16 bfloat16 instructions, " in lines[0]
    assert lines[1].startswith("Model5, batches of 64")
    rows = [re.fullmatch(r"([a-z ]+?) +([\d.]+) +([\d.]+) +([\d.]+)", line) for line in lines[2:6]]
    assert [row[1] for row in rows] == [
        "classic loop",
        "this repository",
        "with amp",
        "compute only",
    ]
    assert float(rows[0][4]) == 1
    assert all(
        float(row[3]) >= 0.938 * float(row[2]) > 0 for row in rows
    )  # an epoch is 938 steps and a test
    assert [line.split(":")[0] for line in lines[6:]] == [
        "import torch",
        "from the start to the first step",
    ]
    assert "--dry-run" in commands[1]
