"""Going on: what an interrupted run prints, and that a resumed one ends as if never interrupted."""

import re
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import (
    FOUR,
    FOUR_EPOCHS,
    ONE,
    THREE,
    TWO,
    assert_same,
    contents,
    load_all,
    read_log,
    rows,
)
from pytest import raises
from torch import nn

import models
import train_test_mnist as tt
from checkpoints import BEST, CURVES, LOG, epoch_files, find_newest_checkpoint, load_checkpoint
from utils import ScriptError

GO_ON = "; to go on: python train_test_mnist.py --resume"


@pytest.mark.parametrize(
    "recipe",
    [
        "--model Model1 --momentum 0",
        "--model Model2 --momentum 0.8",
        "--amp",
        "--augment --lr-scheduler onecyclelr --weight-decay 1e-3 --val-size 30",
    ],
)
def test_resuming_equals_never_having_stopped(recipe, train, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = f"--epochs 4 --batch-size 24 --lr 0.03 --seed 3 {recipe}"
    expected = rows(train(whole, recipe))
    stop = patch("checkpoints.save_log", side_effect=[None, KeyboardInterrupt])
    with raises(KeyboardInterrupt), stop:
        train(parts, recipe)
    torch.rand(5)
    assert rows(train(parts, "--resume", parts / TWO)) == expected[2:]
    assert contents(parts).keys() == contents(whole).keys()
    assert read_log(parts) == read_log(whole)
    assert_same(load_all(parts), load_all(whole))
    if "onecyclelr" in recipe:  # which has planned every step
        with raises(ScriptError, match=f"^--epochs 5 contradicts .*{FOUR}, whose run has 4"):
            train(parts, "--resume --epochs 5")


def test_options_are_remembered_and_epochs_may_grow(train, folder):
    before = contents(folder)
    for options in ("--resume", "--resume --epochs 3"):
        assert f"{FOUR} has finished epoch 4: nothing left to do" in train(folder, options)
    # Nothing is moved or overwritten by a run that trains or saves nothing
    assert "nothing left to do" in train(folder, "--resume", folder / TWO, "--epochs 2")
    train(folder, "--resume", folder / TWO, "--dry-run")
    assert contents(folder) == before
    assert [row[0] for row in rows(train(folder, "--resume --epochs 6"))] == ["5", "6"]
    (folder / "mnist_model_epoch_6.pth").unlink()
    same = "--model MODEL5 --batch-size 16 --lr 5e-2 --momentum 0.9 --seed 1"
    assert [row[0] for row in rows(train(folder, "--resume", same))] == ["6"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("--model Model1", "Model5"),
        ("--batch-size 8", 16),
        ("--lr 0.5", 0.05),
        ("--momentum 0.5", 0.9),
        ("--seed 2", 1),
        ("--val-size 20", 0),
        ("--lr-scheduler onecyclelr", "constant"),
        ("--augment", False),
        ("--amp", False),
        ("--weight-decay 0.1", 0.0),
        ("--init-from other.pth", "none"),
    ],
)
def test_a_contradiction(given, stored, train, folder):
    before = contents(folder)
    message = f"^{given}( True)? contradicts {folder / FOUR}.* {stored}; .* --init-from "
    with raises(ScriptError, match=message):
        train(folder, "--resume", folder / FOUR, given)
    assert contents(folder) == before


def test_folders_are_compared_not_their_spellings(train, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for spelled in (folder, Path(folder.name), folder / ".." / folder.name):
        assert "nothing left" in train(spelled, "--resume", Path(folder.name, FOUR))
    with raises(ScriptError, match=f"--checkpoint-dir .*contradicts {folder / FOUR}"):
        train(folder.parent, "--resume", folder / FOUR)


def test_only_the_newest_file_is_moved(train, tmp_path, accuracies, capsys):
    accuracies += [90, 80, 70]
    old, new = tmp_path / "old", tmp_path / "new"
    train(old, "--epochs 2")
    new.mkdir()
    (old / TWO).rename(new / TWO)
    lines = train(new, "--resume --epochs 3").splitlines()
    assert lines[-3].startswith("Best: epoch 1, test accuracy 90.00 %")
    assert lines[-2] == f"Last: epoch 3, test accuracy 70.00 %, saved as {new / THREE}"
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"Warning: {new / BEST} ")


def test_resume_takes_the_newest_intact_file(train, folder, capsys):
    expected = load_all(folder)
    (folder / FOUR).write_bytes((folder / FOUR).read_bytes()[:-100])
    (folder / THREE).write_bytes(b"")
    assert [row[0] for row in rows(train(folder, "--resume"))] == ["3", "4"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"{folder / FOUR} .*{folder / THREE} .*Using {folder / TWO}$", line)
    assert_same(load_all(folder), expected)
    for path in epoch_files(folder):
        path.unlink()
    assert find_newest_checkpoint(folder)[0] == folder / BEST


def test_resume_never_starts_from_scratch(train, folder, tmp_path):
    missing = tmp_path / "missing"
    for path in folder.glob("*.pth"):
        path.write_bytes(b"not a checkpoint")
    before = contents(folder)
    with raises(ScriptError, match=r"Start a new run$") as failure:
        train(folder, "--resume")
    assert all(str(path) in str(failure.value) for path in folder.glob("*.pth"))
    for start in ([], [missing / ONE]):
        with raises(ScriptError, match=f"^there is no {missing} to resume in; leave out --resume"):
            train(missing, "--resume", *start)
    assert not missing.exists()
    with raises(ScriptError, match=f"^{folder / 'a.pth'} is not an intact .*: .*No such file"):
        train(folder, "--resume", folder / "a.pth")
    with raises(ScriptError, match=f"^{tmp_path}: there is no checkpoint. Start a new run"):
        train(tmp_path, "--resume")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt, ""),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (RuntimeError("CUDA out of memory. Tried"), "no memory left: .* a smaller --batch-size or"),
        (MemoryError, "no memory left"),
    ],
)
def test_every_end_gives_the_command_to_go_on(error, message, train, folder):
    before = contents(folder)
    end = patch("train_test_mnist.train_one_epoch", side_effect=error)
    for options in (["--resume"], ["--resume", folder / FOUR], []):
        advice = f"{GO_ON} '{folder / FOUR}'" if options else ""
        expected = f"^[^;]*{message}[^;]*{advice}$"
        with end, raises((ScriptError, KeyboardInterrupt), match=expected):
            train(folder, "--epochs 9", *options)
    assert contents(folder) == before


def test_an_interrupt_while_the_first_file_is_written(train, tmp_path):
    stop = patch("os.fsync", side_effect=[None, KeyboardInterrupt])  # when it is in place
    with stop, raises(KeyboardInterrupt, match=f"^{GO_ON} {tmp_path / ONE}$"):
        train(tmp_path)


def test_a_folder_that_is_deleted(train, tmp_path):
    run = tmp_path / "run"
    delete = patch("os.fsync", side_effect=lambda _: shutil.rmtree(run))
    message = f"^cannot write {run / ONE}: No such file [^;]*; see that [^;]*$"
    with delete, raises(ScriptError, match=message):
        train(run)


def test_resuming_an_old_epoch_moves_the_later_ones(train, accuracies, tmp_path):
    accuracies += [60.0, 50.0, 70.0, 65.0]
    train(tmp_path, "--epochs 4")
    (tmp_path / CURVES).write_bytes(b"curves")
    before, aside = contents(tmp_path), tmp_path / "earlier_run_1"
    accuracies += [55.0, 65.0]
    train(tmp_path, "--resume", tmp_path / TWO, "--epochs 3")
    assert contents(aside) == {name: before[name] for name in (THREE, FOUR, BEST, LOG, CURVES)}
    after = load_all(tmp_path)
    assert after.keys() == {ONE, TWO, THREE, BEST}
    assert_same(after[BEST], after[ONE])  # the best of those that are left
    train(tmp_path, "--resume", tmp_path / ONE, "--epochs 2")
    # The best one is not later
    assert contents(tmp_path / "earlier_run_2").keys() == {TWO, THREE, LOG}
    assert load_checkpoint(tmp_path / BEST)["test_accuracy"] == 65


@pytest.mark.parametrize("epochs", [3, 4])  # with 3, nothing is left to train
@pytest.mark.parametrize("damage", [Path.exists, Path.unlink, partial(Path.write_bytes, data=b"")])
def test_the_best_file_is_restored(damage, epochs, train, accuracies, tmp_path):
    accuracies += [50.0, 40.0, 70.0, 70.0]  # the last is not better than the one before
    # The sixth file is the third epoch's
    stop = patch("os.fsync", side_effect=[None] * 11 + [KeyboardInterrupt])
    with raises(KeyboardInterrupt), stop:
        train(tmp_path, "--epochs 3")
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 1
    damage(tmp_path / BEST)
    assert "Moved" not in train(tmp_path, f"--resume --epochs {epochs}")
    assert_same(load_checkpoint(tmp_path / BEST), load_checkpoint(tmp_path / THREE))
    assert len(read_log(tmp_path)) == epochs  # the log is whole, too


@pytest.fixture
def change_model5(monkeypatch):
    """Return a function that replaces a layer of the class Model5."""
    build = models.Model5.__init__

    def change(block, number, layer):
        def build_changed(model):
            build(model)
            getattr(model, block)[number] = layer

        monkeypatch.setattr(models.Model5, "__init__", build_changed)

    return change


def test_a_changed_class(train, folder, change_model5, monkeypatch):
    remedy = "restore the class, or give the changed one a new name, or start anew"
    start = rf"\A{folder / FOUR} was trained with Model5, but"
    change_model5("input_block", 0, nn.Conv2d(1, 6, 3))
    change = r"Conv2d\(1, 6, kernel.*, bias=False\) is now .*Conv2d\(1, 6, .*"
    for options in (["--resume"], ["--resume", folder / FOUR]):  # one message, not four
        with raises(ScriptError, match=rf"{start} .*{change}; {remedy}\Z"):
            train(folder, *options, "--epochs 9")
    monkeypatch.delattr(models, "Model5")
    with raises(ScriptError, match=f"{start} models.py has no model 'Model5'.*{remedy}"):
        train(folder, "--resume --epochs 9")


def test_a_changed_class_that_fits(folder, change_model5, capsys):
    change_model5("transition_block", 2, nn.Identity())
    load_checkpoint(folder / FOUR)  # to analyze it, say
    assert capsys.readouterr().err == ""
    load_checkpoint(folder / FOUR, to_resume=True)
    change = r"Dropout\(p=0.1, inplace=False\) is now .*Identity\(\)"
    warning = f"Warning: Model5 has changed since this run was started: .*{change}\n"
    assert re.fullmatch(warning, capsys.readouterr().err)


def test_parameters_that_became_buffers(folder, change_model5):
    layer = nn.Conv2d(1, 6, 3, bias=False)
    weight = layer._parameters.pop("weight")
    layer.register_buffer("weight", weight.detach())
    change_model5("input_block", 0, layer)
    load_checkpoint(folder / FOUR)  # its weights fit
    with raises(ScriptError, match=r"was trained with Model5, but .*; restore the class, or"):
        load_checkpoint(folder / FOUR, to_resume=True)


def test_deterministic_is_the_same(train, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    train(tmp_path, "--deterministic", FOUR_EPOCHS)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert tt.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert_same(load_all(tmp_path), load_all(folder))
