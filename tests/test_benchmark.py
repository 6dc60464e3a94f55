"""The benchmark runs, on the tiny data set."""

import json
from pathlib import Path
from types import SimpleNamespace

import benchmark_training
import pytest
import torch
from conftest import run


class TestBenchmark:
    """tests/benchmark_training.py, on the tiny data set; what it finds is not tested."""

    def test_variants(self, tiny_data: Path) -> None:
        args = SimpleNamespace(model="Model5", device=torch.device("cpu"), batch_size=16, data_dir=tiny_data)
        variants = benchmark_training.variants(args.device)
        assert len(variants) == 9
        for prepare, *options in variants.values():
            if options in ([], [0]):  # neither compiled nor with workers
                for work in prepare(args, *options):
                    work(2)

    @pytest.mark.usefixtures("tiny_mnist")
    def test_tables(
        self,
        tiny_data: Path,
        tiny_sums: dict,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        chosen = {"classic loop": (benchmark_training.classic, 0), "this repository": (benchmark_training.shipped,)}
        monkeypatch.setattr(benchmark_training, "variants", lambda device: chosen)
        commands = []
        instead = SimpleNamespace(run=lambda command, **options: commands.append(command), DEVNULL=None)
        monkeypatch.setattr(benchmark_training, "subprocess", instead)
        options = "--rounds", 1, "--steps", 3, "--data-dir", tiny_data, "--json", tmp_path / "speed.json"
        monkeypatch.setattr("sys.argv", ["benchmark_training.py", *map(str, options)])
        benchmark_training.main()
        monkeypatch.undo()
        results = json.loads((tmp_path / "speed.json").read_text())
        rows = results["models"]["Model5"]
        assert [row["variant"] for row in rows] == list(chosen)
        assert rows[0]["times_as_fast_as_classic"] == 1
        assert all(row["epoch_seconds"] > 938 * row["step_seconds"] > 0 for row in rows)
        lines = capsys.readouterr().out.splitlines()
        assert [line[:34].strip() for line in lines[3:5]] == list(chosen)
        assert [line[:46].strip() for line in lines[7:]] == [row["start"] for row in results["start_up"]]
        # the last command goes as far as the first step, and no farther
        result = run("-c", f"import download_mnist; download_mnist.FILES = {tiny_sums}; {commands[-1][-1]}")
        assert result.returncode == 0, result.stderr
        assert "Dry run: every step works" not in result.stdout
