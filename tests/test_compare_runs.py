"""The table of runs: which belong together, their statistics, and what is left out."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ONE, TWO, Bomb, assert_one_line, contents, run
from pytest import approx, raises
from torch import nn

import checkpoints
import compare_runs
from utils import ScriptError


@pytest.fixture
def add_run(train, accuracies, tmp_path):
    """Return a function that makes a run with these accuracies in a folder."""

    def add_run(folder, options, *percents):
        accuracies.extend(percents)
        train(tmp_path / folder, options)

    return add_run


@pytest.fixture
def three_lines(add_run):
    """Three runs of one recipe, two of another, one of which was moved aside, and one alone."""
    add_run("a", "--epochs 2 --seed 2", 95, 84)
    add_run("a", "--epochs 2 --seed 3", 80, 88)
    for seed, last in ((1, 90), (10, 92), (2, 94)):
        add_run(f"b{seed}", f"--epochs 2 --lr 0.2 --augment --seed {seed}", 93, last)
    add_run("c", "--epochs 1 --model Model2", 85)


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Return a function that compares all runs; it returns rows of cells, and lines of errors."""

    def compare(*options):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["compare_runs.py", str(tmp_path), *options])
        compare_runs.main()
        output, errors = capsys.readouterr()
        table = re.sub(r" {3,}\d+\.\d\b", "", output.split("\n\n")[0])  # seconds
        rows = [re.split(" {2,}", row) for row in table.splitlines()]
        return rows[1:], errors.splitlines()

    return compare


def test_table(three_lines, compare):
    with patch("checkpoints.unpack", wraps=checkpoints.unpack) as unpack:
        rows, errors = compare()
    assert (unpack.call_count, errors) == (6, [])  # one checkpoint of each run is opened
    # Welch by hand: sqrt(2**2 / 3 + 2.83**2 / 2) = 2.31
    assert [" | ".join(row) for row in rows] == [
        "Model5 | 8,018 | augment, lr 0.2 | 1-10 | 2 | 92.00 ± 2.00 | 93.33 ± 0.58",
        "Model5 | 8,018 | lr 0.01 | 2-3 | 2 | 86.00 ± 2.83 | 91.50 ± 4.95 | -6.00 ± 2.31",
        "Model2 | 14,796 | lr 0.01 | 1 | 1 | 85.00 ± ? | 85.00 ± ? | -7.00 ± ?",
    ]


def test_json(three_lines, tmp_path):
    (tmp_path / "c").rename(tmp_path / "c NaN")
    result = run("compare_runs.py", tmp_path, "--json")
    first, second, third = json.loads(result.stdout, parse_constant=pytest.fail)
    assert first["runs"]["10"]["folder"] == f"{tmp_path}/b10"
    assert second["difference"] == approx([-6, (16 / 3) ** 0.5])
    assert third["difference"] == [-7, None]
    assert third["runs"]["1"]["folder"] == f"{tmp_path}/c NaN"


def test_validation_sorts_where_every_line_has_it(add_run, compare):
    add_run("a", "--epochs 1 --val-size 20", 70, 95)
    add_run("b", "--epochs 1 --val-size 20 --lr 0.2", 80, 90)
    rows, _ = compare()
    assert rows[1][5:9] == ["95.00 ± ?", "70.00 ± ?", "95.00 ± ?", "-10.00 ± ?"]
    add_run("c", "--epochs 1", 93)
    rows, _ = compare()
    assert [row[5] for row in rows] == ["95.00 ± ?", "93.00 ± ?", "90.00 ± ?"]


def test_runs_that_are_not_whole(add_run, compare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, seed in {"a": 1, "b": 1, "c": 3, "d": 4}.items():
        add_run(folder, f"--epochs 2 --seed {seed}", 50, 60)
    for path in Path("c").glob("*.pth"):
        torch.save(checkpoints.load_checkpoint(path) | {"options": {}}, path)
    torch.save(Bomb(), Path("d", TWO))
    before = contents(tmp_path)
    (_, unfinished), (same, no_options, damaged) = compare()
    assert unfinished[2:4] == ["4", "1/2"]
    assert same == f"Skipping {tmp_path}/b: {tmp_path}/a has the same options and seed"
    assert no_options == f"Skipping {tmp_path}/c: 'model'"
    assert re.match(f"Skipping: .*{TWO} .*more than tensors.* Using .*d/{ONE}$", damaged)
    assert contents(tmp_path) == before  # nothing was executed


class Mine(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10), *self.layers)


def test_a_class_that_has_changed_or_gone(add_run, compare, monkeypatch):
    monkeypatch.setattr("models.model_classes", lambda: {"Mine": Mine})
    for layers in ([nn.Dropout()], [nn.Dropout(), nn.ReLU()], [nn.PReLU()]):
        Mine.layers = layers
        add_run("a", "--epochs 1 --model Mine", 50)
    rows, _ = compare()
    assert [row[2] for row in rows[1:]] == ["class changed: (2): Dropout(p=0.5, …"] * 2
    monkeypatch.setattr("models.model_classes", dict)
    add_run("b", "--epochs 1", 70)
    _, errors = compare()
    assert len(errors) == 3
    assert "models.py has no model 'Mine'" in errors[0]


def test_plot(three_lines, compare, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with patch("matplotlib.figure.Figure.savefig", autospec=True) as save:
        compare("--plot", str(tmp_path / "a.png"))
    (axes,) = save.call_args.args[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[7, 8], [12.5, 14], [15]]
    assert axes.lines[1].get_label() == "Model5, lr 0.01"
    assert len({str(line.get_color()) for line in axes.lines}) == 3
    band = axes.collections[1].get_paths()[0]
    assert set(band.vertices[:, 1]) == {5, 20, 12, 16}


def test_plot_in_a_missing_folder(compare, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr("compare_runs.find_runs", None)  # no work is done
    with raises(ScriptError, match=r"a/b\.png: name a file in a folder that exists$"):
        compare("--plot", str(tmp_path / "a" / "b.png"))


def test_no_runs(tmp_path):
    result = run("compare_runs.py", tmp_path, tmp_path / "missing")
    assert_one_line(result, f": there is no run in {tmp_path}, {tmp_path}/missing; first train")
