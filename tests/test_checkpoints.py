"""Nothing lost: earlier runs, damaged files, full disks, changed models, kills."""

import contextlib
import itertools
import pickle
import random
import re
import resource
import zipfile
from functools import reduce
from operator import getitem
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import (
    FOUR,
    ONE,
    THREE,
    TWO,
    Bomb,
    assert_same,
    contents,
    load_all,
    run,
    write_files,
)
from pytest import raises
from torch import nn

from checkpoints import (
    BEST,
    CURVES,
    LOG,
    describe_change,
    epoch_files,
    epoch_path,
    find_newest_checkpoint,
    load_checkpoint,
)
from download_mnist import download_mnist, is_original
from utils import ScriptError

LAST = "output_block.1.weight"


def assert_refused(path: Path, reason: str = "", to_resume: bool = False) -> None:
    with raises(ScriptError, match=rf"^{path} is not an intact .*: .*{reason}.*; name another\Z"):
        load_checkpoint(path, to_resume)


@pytest.mark.parametrize("kept", [{ONE, FOUR, BEST, LOG, CURVES}, {BEST}, {LOG}, {CURVES}])
def test_a_new_run_moves_the_files_of_earlier_ones(kept, train, tmp_path):
    others = {"notes.txt", "a.tmp", f"{ONE}.tmp"}
    half_written = f"{ONE}.{'0123456789abcdef' * 2}.tmp"  # by a run that was killed
    for name in (*kept, *others, half_written):
        (tmp_path / name).write_bytes(b"dear")
    for number, moved in ((1, kept), (2, {ONE, BEST, LOG})):
        aside = tmp_path / f"earlier_run_{number}"
        line = f"Moved {len(moved)} files of an earlier run to {aside}"
        output = train(tmp_path, "--epochs 1")
        assert [each for each in output.splitlines() if "Moved" in each] == [line]
        assert contents(aside).keys() == moved
    assert set(contents(tmp_path / "earlier_run_1").values()) == {b"dear"}
    assert {path.name for path in tmp_path.glob("*.*")} == {ONE, BEST, LOG, ".lock", *others}


def test_a_move_that_was_interrupted_is_finished(train, tmp_path):
    write_files(tmp_path / "earlier_run_incomplete", {ONE: b"dear"})
    train(tmp_path, "--epochs 1")
    assert contents(tmp_path / "earlier_run_1") == {ONE: b"dear"}


def test_only_the_names_of_epochs_count(train, folder):
    # The last one is a nine, but not in ASCII
    numbers = ["1_backup", "007", "0", "9 (1)", "10.old", "+9", "٩"]
    others = [epoch_path(folder, number) for number in numbers]
    for path in others:
        path.write_bytes(b"dear")
    for epoch in (9, 10, 11):
        path = epoch_path(folder, epoch)
        torch.save(load_checkpoint(folder / FOUR) | {"epoch": min(epoch, 10)}, path)
    newest_first = [epoch_path(folder, epoch) for epoch in (11, 10, 9, 4, 3, 2, 1)]
    assert epoch_files(folder) == newest_first
    assert find_newest_checkpoint(folder)[0] == epoch_path(folder, 10)  # newer than 9
    assert_refused(path, "it holds epoch 10")
    train(folder, "--resume", folder / TWO, "--epochs 3")
    train(folder, "--epochs 1")
    assert {path.read_bytes() for path in others} == {b"dear"}


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ([], torch.ones(3), ""),
        (["epoch"], "four", ""),
        (["model_state_dict", LAST, 0], torch.nan, "not finite"),
        (["optimizer_state_dict", "state", 3, "momentum_buffer", 0], torch.inf, "not finite"),
        (["optimizer_state_dict", "state", 0, "momentum_buffer"], torch.ones(3), "another model's"),
    ],
)
def test_wrong_content(place, value, reason, folder):
    path = folder / FOUR
    content = [load_checkpoint(path)]
    *parents, last = [0, *place]
    reduce(getitem, parents, content)[last] = value
    torch.save(content[0], path)
    assert_refused(path, reason, to_resume=True)


def test_nothing_in_a_file_is_executed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / FOUR
    torch.save(load_checkpoint(path) | {"extra": Bomb()}, path)
    assert_refused(path, "more than tensors")
    path.write_bytes(pickle.dumps(Bomb()))
    assert_refused(path)
    assert not Path("executed").exists()


def test_missing_content(train, folder):
    content = load_checkpoint(folder / FOUR)
    for key in ("history", "best_epoch", "optimizer_state_dict", "options"):
        torch.save({name: value for name, value in content.items() if name != key}, folder / FOUR)
        load_checkpoint(folder / FOUR)  # enough to analyze
        with raises(ScriptError, match=f"^{folder / FOUR} has no {key}: .* an older version"):
            train(folder, "--resume", folder / FOUR)
    torch.save({"module.weight": torch.ones(3)}, folder / BEST)
    missing = "model_name, model_state_dict, epoch: another program"
    with raises(ScriptError, match=f"^{folder / BEST} has no {missing}"):
        load_checkpoint(folder / BEST)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapper(prefix, folder):
    checkpoint = load_checkpoint(folder / FOUR)
    weights = checkpoint["model_state_dict"].items()
    checkpoint["model_state_dict"] = {prefix + name: tensor for name, tensor in weights}
    torch.save(checkpoint, folder / FOUR)
    expected = rf" holds {prefix}input_block\.0\.weight and the like: save the model without its"
    with raises(ScriptError, match=expected):
        load_checkpoint(folder / FOUR)


def test_flipped_bits_and_cut_files(folder):
    def flip(place, bit):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])

    path, draw = folder / FOUR, random.Random(1)
    data, expected = path.read_bytes(), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        borders = [*(part.header_offset for part in archive.infolist()), archive.start_dir]
    weights = data.index(expected["model_state_dict"][LAST].numpy().tobytes())
    folder_flag = data.rindex(b"archive/data/5") - 8
    for place, bit in ((weights, 0), (folder_flag, 4)):
        flip(place, bit)
        assert_refused(path, "it is damaged")
    ranges = [(begin, begin + 30) for begin in borders]  # headers
    ranges += itertools.pairwise(borders)
    # Directory, anywhere
    ranges += [(borders[-1], len(data)), (0, len(data))] * 40
    for begin, end in ranges * 2:
        flip(draw.randrange(begin, end), draw.randrange(8))
        with contextlib.suppress(ScriptError):
            assert_same(load_checkpoint(path), expected)  # a bit that says nothing, such as padding
    cut = [data[:length] for length in (0, 1, -9, -1, *draw.sample(range(len(data)), 40))]
    for content in (*cut, b"hello\n" * 99, b"<html></html>", bytes(9999)):
        path.write_bytes(content)
        assert_refused(path)


def test_a_run_holds_its_folder(train, folder):
    def enter(*_, **options):
        with patch("checkpoints.load_checkpoint") as load:
            for option in ([], ["--resume"]):
                with raises(ScriptError, match=f"^another run is using {folder}; wait"):
                    train(folder, *option)
        load.assert_not_called()  # it is held before it is read
        assert len(load_all(folder)) == 5  # readers may read
        raise KeyboardInterrupt

    before = contents(folder)
    with patch("train_test_mnist.train_one_epoch", enter), raises(KeyboardInterrupt):
        train(folder, "--resume --epochs 9")
    assert contents(folder) == before | {".lock": b""}
    train(folder, "--resume --epochs 5")  # it is free again


def test_a_move_that_was_killed_is_finished(train, folder):
    before, rename, moved = contents(folder), Path.rename, []

    def rename_three(path, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(path.name)
        return rename(path, target)

    with patch.object(Path, "rename", rename_three), raises(KeyboardInterrupt):
        train(folder, "--epochs 1")
    assert moved == [FOUR, THREE, TWO]  # what is left is a run that can be resumed
    train(folder, "--epochs 1")
    del before[".lock"]
    assert contents(folder / "earlier_run_1") == before


def test_by_products_cost_no_epoch(train, tmp_path, capsys):
    with patch("checkpoints.save_log", side_effect=ScriptError("cannot write the log")):
        train(tmp_path, "--epochs 2")
        train(tmp_path, "--resume --epochs 4")
    assert load_all(tmp_path).keys() == {ONE, TWO, THREE, FOUR, BEST}
    assert "Warning: cannot write the log\n" in capsys.readouterr().err


class Unusual(nn.Module):
    """A model with a mask, a frozen weight, a state of its own, and sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Embedding(2, 10, sparse=True)
        mask = torch.tensor([-torch.inf])
        self.register_buffer("mask", mask)
        self.frozen = nn.Parameter(mask, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_lit = x.flatten(1) > 0
        return self.weights(is_lit.long()).mean(1)

    def get_extra_state(self) -> object:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        """Take the state, as PyTorch demands of a model that has one."""


def test_what_is_trained_can_be_loaded(train, tmp_path, monkeypatch):
    monkeypatch.setattr("models.model_classes", lambda: {"Unusual": Unusual})
    train(tmp_path, "--model Unusual --epochs 2")
    assert load_all(tmp_path)[TWO]["model_state_dict"]["_extra_state"] == {"steps": 3}
    train(tmp_path, "--resume --epochs 3")
    monkeypatch.setattr(Unusual, "get_extra_state", lambda self: Path("a"))
    with raises(ScriptError, match=f"^cannot save {tmp_path / ONE}: .*more than tensors"):
        train(tmp_path, "--model Unusual --epochs 2")


@pytest.fixture
def full(folder, tiny_gz):
    """Let no file from here on exceed 20 kB: as on a full disk, a part of it is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up(full, train, folder, tiny_gz):
    before = contents(folder)
    with raises(ScriptError, match=rf"^cannot write {folder}/\w+5\.pth: File too large; "):
        train(folder, "--resume --epochs 5")
    assert contents(folder) == before
    with raises(ScriptError, match=rf"^cannot write {folder}/MNIST/raw/[\w-]+: File too large"):
        download_mnist(folder, str(tiny_gz))
    assert all(is_original(path.name, path.read_bytes()) for path in folder.glob("MNIST/raw/*"))


@pytest.mark.parametrize("what", ["training", "download"])
def test_kill(what):
    result = run("tests/kill.py", what, 10)
    assert result.returncode == 0, result.stderr
    assert re.match("1[01] kills in ", result.stdout)


def test_what_has_changed():
    two, swapped = "(a): ReLU()\n(b): Tanh()", "(b): Tanh()\n(a): ReLU()"
    assert describe_change(two, swapped) == "(a): ReLU() is now (b): Tanh()"
    assert describe_change("(a): ReLU()", two) == "nothing is now (b): Tanh()"
    assert describe_change(two, two) == ""
    lazy = nn.Sequential(nn.LazyLinear(3))
    unknown = str(lazy)
    lazy(torch.ones(1, 2))
    assert describe_change(str(lazy), unknown) == ""


def test_a_new_run_from_old_weights(folder, train, tmp_path):
    path = folder / BEST
    train(tmp_path, "--init-from", path, "--lr 0 --epochs 1")
    new, old = load_checkpoint(tmp_path / ONE), load_checkpoint(path)
    assert new["options"]["init_from"] == str(path)
    for name in ("input_block.0.weight", LAST):
        assert new["model_state_dict"][name].equal(old["model_state_dict"][name])
    train(tmp_path, "--resume --epochs 2")
    with raises(ScriptError, match=f"^{path} holds weights of Model5: "):
        train(tmp_path / "other", "--init-from", path, "--model Model1")
