"""Nothing lost: earlier runs, damaged files, full disks, losses that are not finite, kills."""

import itertools
import os
import pickle
import random
import re
import resource
import zipfile
from functools import reduce
from operator import getitem
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import (
    FOUR,
    ONE,
    THREE,
    TWO,
    Bomb,
    assert_one_line,
    assert_same,
    contents,
    load_all,
    run,
)
from pytest import raises
from torch import nn

import train_test_mnist
from checkpoints import (
    BEST,
    CURVES,
    LOG,
    describe_change,
    epoch_files,
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
    for name in kept:
        (tmp_path / name).write_bytes(b"dear")
    (tmp_path / "notes.txt").write_text("mine")
    for number, moved in ((1, kept), (2, {ONE, BEST, LOG})):
        aside = tmp_path / f"earlier_run_{number}"
        line = f"Moved {len(moved)} files of an earlier run to {aside}"
        output = train(tmp_path, "--epochs 1")
        assert [each for each in output.splitlines() if "Moved" in each] == [line]
        assert contents(aside).keys() == moved
    assert set(contents(tmp_path / "earlier_run_1").values()) == {b"dear"}
    assert {path.name for path in tmp_path.glob("*.*")} == {ONE, BEST, LOG, "notes.txt", ".lock"}


def test_only_the_names_of_epochs_count(train, folder):
    # The last one is a nine, but not in ASCII
    numbers = ["1_backup", "007", "0", "9 (1)", "10.old", "+9", "٩"]
    others = {f"mnist_model_epoch_{number}.pth": b"dear" for number in numbers}
    for name, data in others.items():
        (folder / name).write_bytes(data)
    for epoch in (9, 10, 11):
        path = folder / f"mnist_model_epoch_{epoch}.pth"
        torch.save(load_checkpoint(folder / FOUR) | {"epoch": min(epoch, 10)}, path)
    found = [path.stem.removeprefix("mnist_model_epoch_") for path in epoch_files(folder)]
    assert found == ["11", "10", "9", "4", "3", "2", "1"]
    assert find_newest_checkpoint(folder)[0].name == "mnist_model_epoch_10.pth"  # newer than 9
    assert_refused(path, "it holds epoch 10")
    train(folder, "--resume", folder / TWO, "--epochs 3")
    train(folder, "--epochs 1")
    assert others.items() <= contents(folder).items()


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ([], b"hello\n" * 99, ""),
        ([], b"<html></html>", ""),
        ([], bytes(9999), ""),
        ([], pickle.dumps(Bomb()), ""),
        ([], torch.ones(3), ""),
        ([], [1, 2], ""),
        (["extra"], Bomb(), "more than tensors"),
        (["epoch"], "four", ""),
        (["model_state_dict", LAST, 0], torch.nan, "not finite"),
        (["optimizer_state_dict", "state", 3, "momentum_buffer", 0], torch.inf, "not finite"),
        (["optimizer_state_dict", "state", 0, "momentum_buffer"], torch.ones(3), "another model's"),
    ],
)
def test_wrong_content(place, value, reason, folder, monkeypatch):
    monkeypatch.chdir(folder)
    path, files = folder / FOUR, contents(folder).keys()
    content = load_checkpoint(path) if place else value
    if place:
        reduce(getitem, place[:-1], content)[place[-1]] = value
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert_refused(path, reason, to_resume=True)
    assert contents(folder).keys() == files  # nothing was executed


def test_missing_content(folder):
    content = load_checkpoint(folder / FOUR)
    for key in ("history", "best_epoch", "optimizer_state_dict", "options"):
        torch.save({name: value for name, value in content.items() if name != key}, folder / FOUR)
        load_checkpoint(folder / FOUR)  # enough to analyze
        with raises(ScriptError, match=f"^{folder / FOUR} has no {key}: .* an older version"):
            load_checkpoint(folder / FOUR, to_resume=True)


@pytest.mark.parametrize("content", [{"module.weight": torch.ones(3)}, {"model_state_dict": {}}])
def test_another_programs_file(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with raises(ScriptError, match=f"^{tmp_path / 'other.pth'} has no model_name.*another program"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapper(prefix, folder):
    checkpoint = load_checkpoint(folder / FOUR)
    weights = checkpoint["model_state_dict"]
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save(checkpoint | {"model_state_dict": wrapped}, folder / FOUR)
    expected = rf" holds {prefix}input_block\.0\.weight and the like: save the model without its"
    with raises(ScriptError, match=expected):
        load_checkpoint(folder / FOUR)


def test_weights_are_loaded_without_an_optimizer(folder, monkeypatch):
    monkeypatch.setattr("checkpoints.SGD", None)
    assert load_checkpoint(folder / FOUR)["epoch"] == 4


def test_flipped_bits_and_cut_files(folder):
    def flip(place, bit):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])

    path, draw, refused = folder / FOUR, random.Random(1), 0
    data, expected = path.read_bytes(), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        borders = [*(part.header_offset for part in archive.infolist()), archive.start_dir]
        assert archive.infolist()[0].filename.endswith("data.pkl")
    weights = data.index(expected["model_state_dict"][LAST].numpy().tobytes())
    folder_flag = data.rindex(b"archive/data/5") - 8
    for place, bit in ((weights, 0), (folder_flag, 4)):
        flip(place, bit)
        assert_refused(path, "it is damaged")
    for command in ("train_test_mnist.py --resume", "analyze_model.py --checkpoint"):
        script, option = command.split()
        result = run(script, option, path)
        assert_one_line(result, f"{script}: error: {path} is not an intact", "damaged")
    ranges = [*itertools.pairwise(borders)] * 3
    ranges += [(begin, begin + 30) for begin in draw.sample(borders, 30)]  # headers
    # Pickle, directory, anywhere
    ranges += [(0, borders[1]), (borders[-1], len(data)), (0, len(data))] * 60
    for begin, end in ranges:
        flip(draw.randrange(begin, end), draw.randrange(8))
        try:
            assert_same(load_checkpoint(path), expected)  # a bit that says nothing, such as padding
        except ScriptError:
            refused += 1
    assert len(ranges) >= 300
    assert refused > len(ranges) / 2
    lengths = range(len(data))
    for length in (*lengths[:50], *draw.sample(lengths, 40), *lengths[-10:]):
        path.write_bytes(data[:length])
        assert_refused(path)


def test_a_run_holds_its_folder(train, folder):
    def enter(*_, **options):
        for option in ([], ["--resume"]):
            with raises(ScriptError, match=f"^another run is using {folder}; wait"):
                train(folder, *option)
        assert len(load_all(folder)) == 5  # readers may read
        raise KeyboardInterrupt

    before = contents(folder)
    with patch("train_test_mnist.train_one_epoch", enter), raises(KeyboardInterrupt):
        train(folder, "--resume --epochs 9")
    assert contents(folder) == before | {".lock": b""}
    train(folder, "--resume --epochs 5")  # it is free again


def test_the_folder_is_held_before_it_is_read(train, folder):
    stop = patch("checkpoints.FileLock.acquire", side_effect=KeyboardInterrupt)
    with stop, patch("checkpoints.load_checkpoint") as load, raises(KeyboardInterrupt):
        train(folder, "--resume", folder / FOUR)
    load.assert_not_called()


def test_what_killed_runs_leave_is_removed(train, tmp_path):
    half_written = f"{ONE}.{'0123456789abcdef' * 2}.tmp"
    for name in (half_written, "a.tmp", f"{ONE}.tmp"):
        (tmp_path / name).touch()
    train(tmp_path, "--epochs 1")
    assert {path.name for path in tmp_path.glob("*.tmp")} == {"a.tmp", f"{ONE}.tmp"}


def test_a_move_that_was_killed_is_finished(train, folder):
    before, rename, moved = contents(folder), Path.rename, []

    def rename_three(path, target):
        moved.append(path.name)
        if len(moved) == 4:
            raise KeyboardInterrupt
        return rename(path, target)

    with patch.object(Path, "rename", rename_three), raises(KeyboardInterrupt):
        train(folder, "--epochs 1")
    assert moved[:3] == [FOUR, THREE, TWO]  # what is left is a run that can be resumed
    train(folder, "--epochs 1")
    del before[".lock"]
    assert contents(folder / "earlier_run_1") == before
    assert {path.name for path in folder.iterdir()} == {ONE, BEST, LOG, ".lock", "earlier_run_1"}


def test_by_products_cost_no_epoch(train, tmp_path, monkeypatch, capsys):
    failure = Mock(side_effect=ScriptError("cannot write the log"))
    monkeypatch.setattr("checkpoints.save_log", failure)
    train(tmp_path, "--epochs 2")
    train(tmp_path, "--resume --epochs 4")
    assert load_all(tmp_path).keys() == {ONE, TWO, THREE, FOUR, BEST}
    assert "Warning: cannot write the log\n" in capsys.readouterr().err


class Unusual(nn.Module):
    """A model with a mask, a state of its own, and sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.extra = nn.Embedding(256, 10, sparse=True), {"steps": 3}
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.frozen = nn.Parameter(self.mask.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pixels((100 * x + 50).clamp(0, 255).long().flatten(1)).mean(1)

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_what_is_trained_can_be_loaded(train, tmp_path, monkeypatch):
    monkeypatch.setattr("models.model_classes", lambda: {"Unusual": Unusual})
    train(tmp_path, "--model Unusual --epochs 2")
    assert load_all(tmp_path)[TWO]["model_state_dict"]["_extra_state"] == {"steps": 3}
    train(tmp_path, "--resume --epochs 3")
    monkeypatch.setattr(Unusual, "get_extra_state", lambda self: Path("a"))
    with raises(ScriptError, match=f"^cannot save {tmp_path / ONE}: .*more than tensors"):
        train(tmp_path, "--model Unusual --epochs 2")


@pytest.fixture(params=["No space left on device", "File too large"])
def full(request, tiny_gz, tiny_data, tmp_path):
    """A disk of 200 kB, or a folder while no file may exceed 20 kB; and what the system says."""
    folder, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    folder.mkdir()
    if request.param == "File too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        yield folder, request.param
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        if os.system(f"mount -t tmpfs -o size=200k tmpfs {folder}") != 0:
            pytest.skip("a tmpfs cannot be mounted here; the limit on file sizes is tested")
        yield folder, request.param
        assert os.system(f"umount {folder}") == 0


def test_a_disk_that_fills_up(full, train, tiny_gz):
    folder, reason = full
    with raises(ScriptError, match=rf"^cannot write {folder}/\w+\.pth: {reason}; "):
        train(folder)
    assert len(load_all(folder)) == (2 if "space" in reason else 0)
    assert not list(folder.glob("*.tmp"))
    with raises(ScriptError, match=rf"^cannot write {folder}/MNIST/raw/[\w-]+: {reason}"):
        download_mnist(folder, str(tiny_gz))
    assert all(is_original(path.name, path.read_bytes()) for path in folder.glob("MNIST/raw/*"))


def test_a_loss_that_is_not_finite_ends_the_run(train, folder):
    before = contents(folder)
    with raises(ScriptError, match=r"^the loss is .*; try a lower --lr$"):
        train(folder, "--lr 1e25 --batch-size 16")
    assert contents(folder) == before


@pytest.mark.parametrize(("log_interval", "batches"), [(1, 3), (2, 4), (100, 5)])
def test_how_soon_training_notices(log_interval, batches):
    model = nn.Linear(1, 10)
    factors = iter([1, 1, torch.inf, 1, 1])
    model.forward = lambda x: model.weight[:, 0] * torch.full((len(x), 10), next(factors))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.zeros(9, 1), torch.zeros(9, dtype=torch.long)
    with raises(FloatingPointError, match=f"the loss is nan after {batches} batches"):
        data = images, labels
        train_test_mnist.train_one_epoch(
            model, optimizer, None, *data, batch_size=2, log_interval=log_interval
        )


def test_evaluation_notices_too():
    images, labels = torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.long)
    with raises(FloatingPointError, match="the loss in evaluation is nan"):
        train_test_mnist.evaluate(nn.Linear(4, 10), images, labels, 2)


@pytest.mark.parametrize("what", ["training", "download"])
def test_kill(what):
    result = run("tests/kill.py", what, 10)
    assert result.returncode == 0, result.stderr
    assert re.match("1[01] kills in ", result.stdout)


def test_what_has_changed():
    two, swapped = nn.Sequential(), nn.Sequential()
    for model, names in ((two, "ab"), (swapped, "ba")):
        for name in names:
            model.add_module(name, {"a": nn.ReLU(), "b": nn.Tanh()}[name])
    change = describe_change(str(two), str(swapped))
    assert re.fullmatch(r".*a.*ReLU\(\) is now .*b.*Tanh\(\)", change)
    assert "b" in describe_change(str(two[:1]), str(two))
    assert describe_change(str(two), str(two)) == ""
    known, unknown = nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.LazyLinear(3))
    known(torch.ones(1, 2))
    assert describe_change(str(known), str(unknown)) == ""


def test_a_new_run_from_old_weights(folder, train, tmp_path):
    path = folder / BEST
    train(tmp_path, "--init-from", path, "--lr 0 --epochs 1")
    new, old = load_checkpoint(tmp_path / ONE), load_checkpoint(path)
    assert (new["epoch"], new["options"]["init_from"], new["options"]["lr"]) == (1, str(path), 0)
    weights = [key for key in old["model_state_dict"] if key.endswith("0.weight")]
    assert all(new["model_state_dict"][key].equal(old["model_state_dict"][key]) for key in weights)
    train(tmp_path, "--resume --epochs 2")
    with raises(ScriptError, match=f"^{path} holds weights of Model5: "):
        train(tmp_path / "other", "--init-from", path, "--model Model1")
