"""The benchmark runs on the tiny data set; what it measures is not tested."""

import re
from concurrent.futures import ThreadPoolExecutor

import benchmark_training as benchmark
import pytest


@pytest.mark.usefixtures("tiny_mnist")
def test_table(tiny_data, monkeypatch, capsys):
    threads = ThreadPoolExecutor(1)  # because processes take long to start
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_: threads)
    options = ["--steps", "2", "--data-dir", str(tiny_data)]
    monkeypatch.setattr("sys.argv", ["benchmark_training.py", *options])
    benchmark.main()
    output = capsys.readouterr().out
    rows = re.findall(r"^(.+?) {2,}([\d.]+) +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    names = [name for name, *_ in rows if name != "with --amp"]  # depends on the CPU
    assert names == ["classic loop", "this repository", "compute only"]
    assert float(rows[0][3]) == 1
    for _, step, epoch, _ in rows:  # an epoch is 937.5 steps and a test
        assert float(epoch) > 0.93 * float(step) > 0
