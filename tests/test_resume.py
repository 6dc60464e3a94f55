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
from pytest import approx, raises
from torch import nn

import mnist_data
import models
import train_test_mnist as tt
from checkpoints import BEST, CURVES, LOG, epoch_files, find_newest_checkpoint, load_checkpoint
from models import build_model
from utils import ScriptError

GO_ON = "; to go on: python train_test_mnist.py --resume"


@pytest.mark.parametrize(
    "recipe",
    [
        "--model Model1 --momentum 0",
        "--model Model2",
        "--momentum 0.8",
        "--amp",
        "--augment --lr-scheduler onecyclelr --weight-decay 1e-3 --val-size 30 --epochs 4",
    ],
)
def test_resuming_equals_never_having_stopped(recipe, train, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = f"--batch-size 24 --lr 0.03 --seed 3 {recipe}"
    expected = rows(train(whole, recipe, "--epochs 4"))
    state = torch.get_rng_state()
    if "onecyclelr" in recipe:  # which has planned all four epochs
        stop = patch("checkpoints.save_log", side_effect=[None, KeyboardInterrupt])
        with raises(KeyboardInterrupt), stop:
            train(parts, recipe)
        found = expected[:2]
    else:
        found = rows(train(parts, recipe, "--epochs 1"))
        torch.rand(5)
        found += rows(train(parts, "--resume --epochs 2"))
    found += rows(train(parts, "--resume", parts / TWO, "--epochs 4"))
    assert found == expected
    assert torch.get_rng_state().equal(state)
    assert contents(parts).keys() == contents(whole).keys()
    assert read_log(parts) == read_log(whole)
    first, second = load_all(whole), load_all(parts)
    for checkpoint in (*first.values(), *second.values()):
        checkpoint["options"]["epochs"] = 4  # all that differs, in the earlier ones
    assert_same(first, second)


def test_what_is_saved_is_what_was_tested(folder, tiny_data):
    model = build_model("Model5")
    test_set = mnist_data.load_mnist(tiny_data, train=False, device=torch.device("cpu"))
    for checkpoint in load_all(folder).values():
        model.load_state_dict(checkpoint["model_state_dict"])
        loss, accuracy = tt.evaluate(model, *test_set, batch_size=7)
        assert approx(loss, rel=1e-5) == checkpoint["test_loss"]
        assert accuracy == checkpoint["test_accuracy"]


def test_options_are_remembered_and_epochs_may_grow(train, folder):
    before = contents(folder)
    for options in ("--resume", "--resume --epochs 3"):
        assert f"{FOUR} has finished epoch 4: nothing left to do" in train(folder, options)
    # Nothing is moved or overwritten by a run that trains nothing
    assert "nothing left to do" in train(folder, "--resume", folder / TWO, "--epochs 2")
    assert contents(folder) == before
    assert [row[0] for row in rows(train(folder, "--resume --epochs 6"))] == ["5", "6"]
    (folder / "mnist_model_epoch_6.pth").unlink()
    assert [row[0] for row in rows(train(folder, "--resume"))] == ["6"]
    same = "--model MODEL5 --batch-size 16 --lr 5e-2 --momentum 0.9 --seed 1"
    assert [row[0] for row in rows(train(folder, "--resume", same, "--epochs 7"))] == ["7"]


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
    accuracies += [50, 90, 80, 70]
    old, new = tmp_path / "old", tmp_path / "new"
    train(old, "--epochs 3")
    new.mkdir()
    (old / THREE).rename(new / THREE)
    lines = train(new, "--resume --epochs 4").splitlines()
    assert lines[-3].startswith("Best: epoch 2, test accuracy 90.00 %")
    assert lines[-2] == f"Last: epoch 4, test accuracy 70.00 %, saved as {new / FOUR}"
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
    tmp_path.joinpath("empty").mkdir()
    with raises(
        ScriptError, match=f"^{tmp_path / 'empty'}: there is no checkpoint. Start a new run"
    ):
        train(tmp_path / "empty", "--resume")
    assert contents(folder) == before


def test_an_older_layout_is_refused_but_its_weights_load(train, folder):
    checkpoint = load_checkpoint(folder / FOUR)
    torch.save(checkpoint | checkpoint.pop("options"), folder / FOUR)
    load_checkpoint(folder / FOUR)
    with raises(ScriptError, match=f"^{folder / FOUR} has no options: .* an older version"):
        train(folder, "--resume", folder / FOUR)


def test_an_interrupt_gives_the_command_to_go_on(train, folder, tmp_path):
    with (
        patch("os.fsync", side_effect=[None, KeyboardInterrupt]),
        raises(KeyboardInterrupt, match=f"^{GO_ON} {tmp_path / ONE}$"),
    ):
        train(tmp_path)  # until its first file is in place
    for options in (["--resume"], ["--resume", folder / FOUR], []):
        advice = f"{GO_ON} '{folder / FOUR}'" if options else ""
        with (
            patch("train_test_mnist.train_one_epoch", side_effect=KeyboardInterrupt),
            raises(KeyboardInterrupt, match=f"^{advice}$"),
        ):
            train(folder, "--epochs 9", *options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (RuntimeError("CUDA out of memory. Tried"), "no memory left: .*a smaller --batch-size or"),
        (MemoryError(), "no memory left"),
    ],
)
def test_every_end_gives_the_command_to_go_on(error, message, train, folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(tt, "train_one_epoch", lambda *_, **options: raise_(error))
    with raises(ScriptError, match=f"{message}.*{GO_ON} '{folder / FOUR}'$"):
        train(folder, "--resume --epochs 9")
    with raises(ScriptError, match=f"{message}[^;]*$"):
        train(folder)
    assert contents(folder) == before


def raise_(error: Exception) -> None:
    raise error


def test_a_folder_that_is_deleted(train, tmp_path, accuracies, monkeypatch):
    accuracies += [50, 60, 70]
    save_log = tt.checkpoints.save_log

    def delete_folder(folder, history):
        save_log(folder, history)
        if len(history) == 2:
            shutil.rmtree(folder)

    monkeypatch.setattr("checkpoints.save_log", delete_folder)
    run = tmp_path / "run"
    with raises(
        ScriptError, match=f"^cannot write {run / THREE}: No such file [^;]*; see that [^;]*$"
    ):
        train(run)


def test_resuming_an_old_epoch_moves_the_later_ones(train, accuracies, tmp_path):
    accuracies += [60.0, 50.0, 70.0, 65.0]
    train(tmp_path, "--epochs 4")
    (tmp_path / CURVES).write_bytes(b"curves")
    before, aside = contents(tmp_path), tmp_path / "earlier_run_1"
    accuracies += [55.0, 65.0]
    output = train(tmp_path, "--resume", tmp_path / TWO, "--epochs 3")
    assert output.count(f"Moved 5 files of an earlier run to {aside}\n") == 1
    assert contents(aside) == {name: before[name] for name in (THREE, FOUR, BEST, LOG, CURVES)}
    after = load_all(tmp_path)
    assert after.keys() == {ONE, TWO, THREE, BEST}
    assert_same(after[BEST], after[ONE])  # the best of those that are left
    assert after[THREE]["best_test_accuracy"] == 60
    assert len(read_log(tmp_path)) == 3
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
    assert load_all(tmp_path)[BEST]["epoch"] == 1
    assert len(read_log(tmp_path)) == 2
    damage(tmp_path / BEST)
    output = train(tmp_path, f"--resume --epochs {epochs}")
    assert ("nothing left to do" in output) == (epochs == 3)
    assert "Moved" not in output
    assert_same(load_checkpoint(tmp_path / BEST), load_checkpoint(tmp_path / THREE))
    assert (tmp_path / LOG).read_text().count("\n") == epochs + 1  # the log is whole, too


def changed_model5(block: str, number: int, layer: nn.Module) -> type[nn.Module]:
    """Model5 with one of its layers replaced."""

    def build(self: nn.Module) -> None:
        models.Model5.__init__(self)
        getattr(self, block)[number] = layer

    return type("Model5", (models.Model5,), {"__init__": build})


def test_a_changed_class(train, folder, monkeypatch):
    remedy = "restore the class, or give the changed one a new name, or start anew"
    changed = changed_model5("input_block", 0, nn.Conv2d(1, 6, 3))
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": changed})
    change = r"Conv2d\(1, 6, kernel.*, bias=False\) is now .*Conv2d\(1, 6, .*"
    start = rf"\A{folder / FOUR} was trained with"
    for options in (["--resume"], ["--resume", folder / FOUR]):  # one message, not four
        with raises(ScriptError, match=rf"{start} Model5, but .*{change}; {remedy}.*\Z"):
            train(folder, *options, "--epochs 9")
    monkeypatch.setattr(models, "model_classes", lambda: {"Model6": changed})
    monkeypatch.delattr(models, "Model5")
    with raises(
        ScriptError, match=f"{start} Model5, but models.py has no model 'Model5'.*{remedy}"
    ):
        train(folder, "--resume --epochs 9")


def test_a_changed_class_that_fits(folder, monkeypatch, capsys):
    changed = changed_model5("transition_block", 2, nn.Identity())
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": changed})
    load_checkpoint(folder / FOUR)  # to analyze it, say
    assert capsys.readouterr().err == ""
    load_checkpoint(folder / FOUR, to_resume=True)
    change = r"Dropout\(p=0.1, inplace=False\) is now .*Identity\(\)"
    warning = f"Warning: Model5 has changed since this run was started: .*{change}\n"
    assert re.fullmatch(warning, capsys.readouterr().err)


def test_parameters_that_became_buffers(folder, monkeypatch):
    def build(self):
        models.Model5.__init__(self)
        weight = self.input_block[0]._parameters.pop("weight")
        self.input_block[0].register_buffer("weight", weight.detach())

    changed = type("Model5", (models.Model5,), {"__init__": build})
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": changed})
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
