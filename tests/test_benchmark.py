"""The benchmark runs on the tiny data set; what it measures is not tested."""

import re
from pathlib import Path

import benchmark_training
import pytest


@pytest.mark.usefixtures("tiny_mnist")
def test_tables(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    commands = []
    monkeypatch.setattr(benchmark_training.subprocess, "run", lambda command, **options: commands.append(command))
    options = "--rounds", 1, "--steps", 3, "--data-dir", tiny_data
    monkeypatch.setattr("sys.argv", ["benchmark_training.py", *map(str, options)])
    benchmark_training.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Model5, batches of 64")
    rows = [re.fullmatch(r"([a-z ]+?) +([\d.]+) +([\d.]+) +([\d.]+)", line) for line in lines[2:5]]
    assert [row[1] for row in rows] == ["classic loop", "this repository", "compute only"]
    assert float(rows[0][4]) == 1
    assert all(float(row[3]) >= 0.938 * float(row[2]) > 0 for row in rows)  # an epoch is 938 steps and a test
    assert [line.split(":")[0] for line in lines[5:]] == ["import torch", "from the start to the first step"]
    assert "--dry-run" in commands[1]
