"""Nothing lost: resuming, earlier runs, damaged files, full disks, losses that are not finite, kills."""

import itertools
import os
import pickle
import random
import re
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import FOUR_EPOCHS, Bomb, assert_one_line, assert_same, contents, load_all, run
from pytest import CaptureFixture, FixtureRequest, MonkeyPatch, raises

import train_test_mnist
from checkpoints import BEST, CURVES, LOG, epoch_files, find_newest_checkpoint, load_checkpoint
from download_mnist import download_mnist, is_original
from utils import ScriptError

ONE, TWO, THREE, FOUR = (f"mnist_model_epoch_{epoch}.pth" for epoch in (1, 2, 3, 4))
LAST = "output_block.1.weight"


@pytest.fixture
def folder(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the files of four epochs of Model5, to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "check points"))


@pytest.fixture
def accuracies(monkeypatch: MonkeyPatch) -> list[float]:
    """The test accuracies of the epochs to come, in which nothing is learned; to be filled."""
    accuracies: list[float] = []
    monkeypatch.setattr(train_test_mnist, "train_one_epoch", lambda *args: (1.0, 10.0))
    monkeypatch.setattr(train_test_mnist, "evaluate", lambda *args: (1.0, accuracies.pop(0)))
    return accuracies


def rows(output: str) -> list[list[str]]:
    """Return the table's lines without the seconds."""
    return [line.split()[:-1] for line in output.splitlines() if re.match(r" +\d+ ", line)]


def assert_refused(path: Path, reason: str = "", to_resume: bool = False) -> None:
    with raises(
        ScriptError,
        match=rf"^{path} is not an intact checkpoint: .*{reason}.*; name another file\Z",
    ):
        load_checkpoint(path, to_resume)


@pytest.mark.parametrize(("model", "momentum", "amp"), [
    ("Model1", 0, []), ("Model2", 0.9, []), ("Model5", 0.8, []), ("Model5", 0.9, ["--amp"])
])  # fmt: skip
def test_resuming_equals_never_having_stopped(
    model: str, momentum: float, amp: list[str], train: Callable, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = (
        "--model",
        model,
        "--batch-size",
        24,
        "--lr",
        0.03,
        "--momentum",
        momentum,
        "--seed",
        3,
        *amp,
    )
    expected = rows(train(whole, *recipe, "--epochs", 4))
    state = torch.get_rng_state()
    found = rows(train(parts, *recipe, "--epochs", 1))
    torch.rand(5)
    found += rows(train(parts, "--resume", "--epochs", 2))
    found += rows(train(parts, "--resume", parts / TWO, "--epochs", 4))
    assert found == expected
    assert torch.get_rng_state().equal(state)
    assert contents(parts).keys() == contents(whole).keys()
    first, second = load_all(whole), load_all(parts)
    for checkpoint in (*first.values(), *second.values()):
        checkpoint["epochs"] = 4  # all that differs, in the earlier ones
    assert_same(first, second)


def test_options_are_remembered_and_epochs_may_grow(
    train: Callable, folder: Path, monkeypatch: MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    for options in ((), ("--epochs", 3)):
        assert f"{FOUR} has finished epoch 4: nothing left to do" in train(
            folder, "--resume", *options
        )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")} == before
    assert [row[0] for row in rows(train(folder, "--resume", "--epochs", 6))] == ["5", "6"]
    (folder / "mnist_model_epoch_6.pth").unlink()
    assert [row[0] for row in rows(train(folder, "--resume"))] == ["6"]
    same = "--model", "MODEL5", "--batch-size", 16, "--lr", 5e-2, "--momentum", 0.9, "--seed", 1
    assert [row[0] for row in rows(train(folder, "--resume", *same, "--epochs", 7))] == ["7"]
    monkeypatch.setattr("sys.argv", ["train_test_mnist.py", "--resume", str(folder / TWO)])
    args, recipe, _ = train_test_mnist.parse_args()
    assert (args.resume, args.checkpoint_dir) == (folder / TWO, folder)
    assert (recipe["epochs"], recipe["batch_size"]) == (4, 16)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("--model Model1", "Model5"), ("--batch-size 8", 16), ("--lr 0.5", 0.05), ("--momentum 0.5", 0.9),
        ("--seed 2", 1), ("--val-size 20", 0), ("--lr-scheduler onecyclelr", "constant"), ("--augment", False),
        ("--amp", False), ("--weight-decay 0.1", 0.0),
        ("--checkpoint-dir other", "/.*/check points"), ("--init-from other.pth", "none"),
    ],
)  # fmt: skip
def test_a_contradiction(
    given: str, stored: object, train: Callable, folder: Path, capsys: CaptureFixture
) -> None:
    before = contents(folder)
    with raises(SystemExit, match="2"):
        train(folder, "--resume", folder / FOUR, *given.split())
    (error,) = capsys.readouterr().err.splitlines()
    message = f"{given}( True)? contradicts {folder / FOUR}, whose run has {stored}; leave it out(, or .* --init-from |$)"
    assert re.search(message, error)
    assert contents(folder) == before


def test_only_the_newest_file_is_moved(
    train: Callable, tmp_path: Path, accuracies: list[float], capsys: CaptureFixture
) -> None:
    accuracies += [50, 90, 80, 70]
    train(tmp_path / "old", "--epochs", 3)
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / THREE).rename(tmp_path / "new" / THREE)
    lines = train(tmp_path / "new", "--resume", "--epochs", 4).splitlines()
    assert lines[-3:-1] == [
        "Best: epoch 2, test accuracy 90.00 %",
        f"Last: epoch 4, test accuracy 70.00 %, saved as {tmp_path / 'new' / FOUR}",
    ]
    assert lines[-1].endswith(f"--checkpoint {tmp_path / 'new' / FOUR}")
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        f"Warning: {tmp_path / 'new' / BEST} does not hold the best epoch so far: "
    )


def test_resume_takes_the_newest_intact_file(
    train: Callable, folder: Path, capsys: CaptureFixture
) -> None:
    expected = load_all(folder)
    (folder / FOUR).write_bytes((folder / FOUR).read_bytes()[:-100])
    (folder / THREE).write_bytes(b"")
    assert [row[0] for row in rows(train(folder, "--resume"))] == ["3", "4"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"{folder / FOUR} .*{folder / THREE} .*Resuming from {folder / TWO}$", line)
    assert_same(load_all(folder), expected)
    for path in epoch_files(folder).values():
        path.unlink()
    assert find_newest_checkpoint(folder)[0] == folder / BEST


def test_resume_never_starts_from_scratch(train: Callable, folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for path in folder.glob("*.pth"):
        path.write_bytes(b"not a checkpoint")
    before = contents(tmp_path)
    with raises(ScriptError, match="Leave out --resume") as failure:
        train(folder, "--resume")
    assert all(str(path) in str(failure.value) for path in folder.glob("*.pth"))
    with raises(
        ScriptError,
        match=rf"^cannot resume in {missing}: there is no checkpoint\. Leave out --resume",
    ):
        train(missing, "--resume")
    for path, reason in ((missing / ONE, "No such file or directory"), (folder, "Is a directory")):
        with raises(
            ScriptError, match=f"^{path} is not an intact checkpoint: {reason}; name another file$"
        ):
            train(missing, "--resume", path)
    assert contents(tmp_path) == before


def test_the_old_format_resumes(train: Callable, folder: Path) -> None:
    expected = load_checkpoint(folder / FOUR)
    (folder / FOUR).unlink()
    unknown = {"architecture", "train_loss", "val_loss", "val_accuracy", "test_loss", "seconds"}
    unknown |= {"val_size", "lr_scheduler", "augment", "weight_decay"}
    for path in folder.glob("*.pth"):
        checkpoint = load_checkpoint(path)
        torch.save(
            {key: checkpoint[key] for key in checkpoint.keys() - unknown} | {"compile": False}, path
        )
    assert len(rows(train(folder, "--resume"))) == 1
    assert_same(load_checkpoint(folder / FOUR), expected)


def test_an_interrupt_gives_the_command_to_go_on(
    train: Callable, folder: Path, tmp_path: Path
) -> None:
    go_on = "to go on: python train_test_mnist.py --resume"
    with (
        patch("os.fsync", side_effect=[None, KeyboardInterrupt]),
        raises(KeyboardInterrupt) as stop,
    ):
        train(tmp_path)  # until its first file is in place
    assert stop.value.advice == f"{go_on} {tmp_path / ONE}"
    for options in (["--resume"], ["--resume", folder / FOUR], []):
        with (
            patch("train_test_mnist.train_one_epoch", side_effect=KeyboardInterrupt),
            raises(KeyboardInterrupt) as stop,
        ):
            train(folder, "--epochs", 9, *options)
        assert stop.value.advice == (
            f"{go_on} '{folder / FOUR}'" if options else "nothing was saved yet"
        )


def test_deterministic_is_the_same(
    train: Callable, folder: Path, tmp_path: Path, request: FixtureRequest
) -> None:
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    train(tmp_path, "--deterministic", *FOUR_EPOCHS)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert_same(load_all(tmp_path), load_all(folder))


@pytest.mark.parametrize("kept", [{ONE, FOUR, BEST, LOG, CURVES}, {BEST}, {LOG}, {CURVES}])
def test_a_new_run_moves_the_files_of_earlier_ones(
    kept: set[str], train: Callable, tmp_path: Path
) -> None:
    for name in kept:
        (tmp_path / name).write_bytes(b"dear")
    (tmp_path / "notes.txt").write_text("mine")
    for number, moved in ((1, kept), (2, {ONE, BEST, LOG})):
        line = f"Moved {len(moved)} files of an earlier run to {tmp_path / f'earlier_run_{number}'}"
        assert [
            each for each in train(tmp_path, "--epochs", 1).splitlines() if "Moved" in each
        ] == [line]
        assert contents(tmp_path / f"earlier_run_{number}").keys() == moved
    assert set(contents(tmp_path / "earlier_run_1").values()) == {b"dear"}
    assert {path.name for path in tmp_path.glob("*.*")} == {ONE, BEST, LOG, "notes.txt", ".lock"}


def test_only_the_names_of_epochs_count(train: Callable, folder: Path) -> None:
    numbers = [
        "1_backup",
        "007",
        "0",
        "9 (1)",
        "10.old",
        "+9",
        "٩",
    ]  # the last one is a nine, but not in ASCII
    others = {f"mnist_model_epoch_{number}.pth": b"dear" for number in numbers}
    for name, data in others.items():
        (folder / name).write_bytes(data)
    for epoch in (9, 10, 11):
        path = folder / f"mnist_model_epoch_{epoch}.pth"
        torch.save(load_checkpoint(folder / FOUR) | {"epoch": min(epoch, 10)}, path)
    assert list(epoch_files(folder)) == [1, 2, 3, 4, 9, 10, 11]
    assert find_newest_checkpoint(folder)[0].name == "mnist_model_epoch_10.pth"  # newer than 9
    assert_refused(path, "it holds epoch 10")
    train(folder, "--resume", folder / TWO, "--epochs", 3)
    train(folder, "--epochs", 1)
    assert others.items() <= contents(folder).items()


def test_resuming_an_old_epoch_moves_the_later_ones(
    train: Callable, accuracies: list[float], tmp_path: Path
) -> None:
    accuracies += [60.0, 50.0, 70.0, 65.0]
    train(tmp_path, "--epochs", 4)
    (tmp_path / CURVES).write_bytes(b"curves")
    before, aside = contents(tmp_path), tmp_path / "earlier_run_1"
    accuracies += [55.0, 65.0]
    output = train(tmp_path, "--resume", tmp_path / TWO, "--epochs", 3)
    assert [line for line in output.splitlines() if "Moved" in line] == [
        f"Moved 5 files of an earlier run to {aside}"
    ]
    assert contents(aside) == {name: before[name] for name in (THREE, FOUR, BEST, LOG, CURVES)}
    after = load_all(tmp_path)
    assert after.keys() == {ONE, TWO, THREE, BEST}
    assert_same(after[BEST], after[ONE])  # the best of those that are left
    assert after[THREE]["best_test_accuracy"] == 60
    assert (tmp_path / LOG).read_text().count("\n") == 4
    train(tmp_path, "--resume", tmp_path / ONE, "--epochs", 2)
    assert contents(tmp_path / "earlier_run_2").keys() == {
        TWO,
        THREE,
        LOG,
    }  # the best one is not later
    assert load_checkpoint(tmp_path / BEST)["test_accuracy"] == 65


@pytest.mark.parametrize("epochs", [3, 4])  # with 3, nothing is left to train
@pytest.mark.parametrize("damage", [Path.exists, Path.unlink, partial(Path.write_bytes, data=b"")])
def test_the_best_file_is_restored(
    damage: Callable, epochs: int, train: Callable, accuracies: list[float], tmp_path: Path
) -> None:
    accuracies += [50.0, 40.0, 70.0, 70.0]  # the last is not better than the one before
    with (
        raises(KeyboardInterrupt),
        patch("os.fsync", side_effect=[None] * 11 + [KeyboardInterrupt]),
    ):
        train(tmp_path, "--epochs", 3)  # its sixth file is the third epoch's
    assert load_all(tmp_path)[BEST]["epoch"] == 1
    assert (tmp_path / LOG).read_text().count("\n") == 3  # two epochs
    damage(tmp_path / BEST)
    output = train(tmp_path, "--resume", "--epochs", epochs)
    assert ("nothing left to do" in output) == (epochs == 3)
    assert "Moved" not in output
    assert_same(load_checkpoint(tmp_path / BEST), load_checkpoint(tmp_path / THREE))
    assert (tmp_path / LOG).read_text().count("\n") == epochs + 1  # the log is whole, too


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ([], b"hello\n" * 99, ""),
        ([], b"<html></html>", ""),
        ([], bytes(9999), ""),
        ([], pickle.dumps(Bomb()), ""),
        ([], torch.ones(3), ""),
        ([], [1, 2], "another program's and has no model_name, .*, epoch, "),
        (
            [],
            {"module.weight": torch.ones(3)},
            "another program's and has no model_name, .*, epoch, ",
        ),
        (["extra"], Bomb(), "more than tensors"),
        (["epoch"], "four", ""),
        (["best_test_accuracy"], torch.nan, "not finite"),
        (["model_state_dict", LAST, 0], torch.nan, "not finite"),
        (["optimizer_state_dict", "state", 3, "momentum_buffer", 0], torch.inf, "not finite"),
        (["optimizer_state_dict", "state", 0, "momentum_buffer"], torch.ones(3), "another model's"),
    ],
)
def test_wrong_content(
    place: list, value: object, reason: str, folder: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path, files = folder / FOUR, contents(folder).keys()
    content = load_checkpoint(path) if place else value
    if place:
        reduce(getitem, place[:-1], content)[place[-1]] = value
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert_refused(path, reason)
    assert contents(folder).keys() == files  # nothing was executed


def test_missing_content(folder: Path) -> None:
    content = load_checkpoint(folder / FOUR)
    for key in ("history", "best_epoch", "epochs", "batch_size", "lr", "momentum", "seed"):
        torch.save({name: value for name, value in content.items() if name != key}, folder / FOUR)
        load_checkpoint(folder / FOUR)  # enough to analyze
        assert_refused(folder / FOUR, f"it has no {key}", to_resume=True)


def test_flipped_bits_and_cut_files(folder: Path) -> None:
    def flip(place: int, bit: int) -> None:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])

    path, draw, refused = folder / FOUR, random.Random(1), 0
    data, expected = path.read_bytes(), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        borders = [*(part.header_offset for part in archive.infolist()), archive.start_dir]
        assert archive.infolist()[0].filename.endswith("data.pkl")
    weights = data.index(expected["model_state_dict"][LAST].numpy().tobytes())
    for place, bit in (
        (weights, 0),
        (data.rindex(b"archive/data/5") - 8, 4),
    ):  # this one marks a part as a folder
        flip(place, bit)
        assert_refused(path, "it is damaged")
    for script, option in (
        ("train_test_mnist.py", "--resume"),
        ("analyze_model.py", "--checkpoint"),
    ):
        assert_one_line(
            run(script, option, path),
            f"{script}: error: {path} is not an intact checkpoint: ",
            "damaged",
        )
    ranges = [*itertools.pairwise(borders)] * 3
    ranges += [(begin, begin + 30) for begin in draw.sample(borders, 30)]  # headers
    ranges += [
        (0, borders[1]),
        (borders[-1], len(data)),
        (0, len(data)),
    ] * 60  # pickle, directory, anywhere
    for begin, end in ranges:
        flip(draw.randrange(begin, end), draw.randrange(8))
        try:
            assert_same(load_checkpoint(path), expected)  # a bit that says nothing, such as padding
        except ScriptError:
            refused += 1
    assert len(ranges) >= 300
    assert refused > len(ranges) / 2
    for length in (
        *range(50),
        *draw.sample(range(len(data)), 40),
        *range(len(data) - 10, len(data)),
    ):
        path.write_bytes(data[:length])
        assert_refused(path)


def test_a_run_holds_its_folder(train: Callable, folder: Path, monkeypatch: MonkeyPatch) -> None:
    def enter(*args: object) -> None:
        for options in ([], ["--resume"]):
            with raises(
                ScriptError,
                match=f"^another run is using {folder}; wait for its end, or choose another",
            ):
                train(folder, *options)
        assert len(load_all(folder)) == 5  # readers may read
        raise KeyboardInterrupt

    before = contents(folder)
    with patch("train_test_mnist.train_one_epoch", enter), raises(KeyboardInterrupt):
        train(folder, "--resume", "--epochs", 9)
    assert contents(folder) == before | {".lock": b""}
    train(folder, "--resume", "--epochs", 5)  # it is free again


def test_a_move_that_was_killed_is_finished(train: Callable, folder: Path) -> None:
    before, rename, moved = contents(folder), Path.rename, []

    def rename_three(path: Path, target: Path) -> Path:
        moved.append(path.name)
        if len(moved) == 4:
            raise KeyboardInterrupt
        return rename(path, target)

    with patch.object(Path, "rename", rename_three), raises(KeyboardInterrupt):
        train(folder, "--epochs", 1)
    assert moved[:3] == [FOUR, THREE, TWO]  # what is left is a run that can be resumed
    train(folder, "--epochs", 1)
    assert contents(folder / "earlier_run_1") == {
        name: before[name] for name in before if name != ".lock"
    }
    assert {path.name for path in folder.iterdir()} == {ONE, BEST, LOG, ".lock", "earlier_run_1"}


def test_links_into_a_store(train: Callable, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for path in folder.glob("*.pth"):
        path.rename(store / path.name).chmod(0o444)
        path.symlink_to(Path("..", "store", path.name))
    stored = contents(store)
    train(folder, "--epochs", 1)
    assert load_all(folder / "earlier_run_1").keys() == {ONE, TWO, THREE, FOUR, BEST}
    assert contents(store) == stored


def test_another_users_run(train: Callable, folder: Path, monkeypatch: MonkeyPatch) -> None:
    folder.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with raises(
        ScriptError,
        match=f"^{folder} holds another user's run, which cannot be moved; choose another folder$",
    ):
        train(folder, "--epochs", 1)


def test_by_products_cost_no_epoch(
    train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setattr(
        "checkpoints.save_log", Mock(side_effect=ScriptError("cannot write the log"))
    )
    train(tmp_path, "--epochs", 2)
    train(tmp_path, "--resume", "--epochs", 4)
    assert load_all(tmp_path).keys() == {ONE, TWO, THREE, FOUR, BEST}
    assert capsys.readouterr().err == "Warning: cannot write the log\n" * 2  # one a run


class Unusual(torch.nn.Module):
    """A model with a mask, a state of its own, and sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.extra = torch.nn.Embedding(256, 10, sparse=True), {"steps": 3}
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.frozen = torch.nn.Parameter(self.mask.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pixels((100 * x + 50).clamp(0, 255).long().flatten(1)).mean(1)

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_what_is_trained_can_be_loaded(
    train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("models.model_classes", lambda: {"Unusual": Unusual})
    monkeypatch.setattr(train_test_mnist, "model_classes", lambda: {"Unusual": Unusual})
    train(tmp_path, "--model", "Unusual", "--epochs", 2)
    assert load_all(tmp_path)[TWO]["model_state_dict"]["_extra_state"] == {"steps": 3}
    train(tmp_path, "--resume", "--epochs", 3)
    monkeypatch.setattr(Unusual, "get_extra_state", lambda self: Path("a"))
    with raises(
        ScriptError,
        match=f"^cannot save {tmp_path / ONE}: the model's state holds more than tensors",
    ):
        train(tmp_path, "--model", "Unusual", "--epochs", 2)


@pytest.fixture(params=["No space left on device", "File too large"])
def full(
    request: FixtureRequest, tiny_gz: Path, tiny_data: Path, tmp_path: Path
) -> Iterator[tuple[Path, str]]:
    """A disk of 200 kB, or a folder while no file may exceed 20 kB; and what the system will say."""
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


def test_a_disk_that_fills_up(full: tuple[Path, str], train: Callable, tiny_gz: Path) -> None:
    folder, reason = full
    with raises(ScriptError, match=rf"^cannot write {folder}/\w+\.pth: {reason}; make room"):
        train(folder, "--epochs", 20)
    assert len(load_all(folder)) == (2 if "space" in reason else 0)
    assert not list(folder.glob("*.tmp"))
    with raises(ScriptError, match=rf"^cannot write {folder}/MNIST/raw/[\w-]+: {reason}"):
        download_mnist(folder, str(tiny_gz))
    assert all(is_original(path.name, path.read_bytes()) for path in folder.glob("MNIST/raw/*"))


def test_a_loss_that_is_not_finite_ends_the_run(
    train: Callable, folder: Path, monkeypatch: MonkeyPatch
) -> None:
    before = contents(folder)
    with raises(
        ScriptError, match=r"^epoch 1: the loss is .*; nothing was saved; try a lower --lr"
    ):
        train(folder, "--lr", 1e25, "--batch-size", 16)
    monkeypatch.setattr(
        train_test_mnist, "train_one_epoch", Mock(side_effect=FloatingPointError("the loss is nan"))
    )
    with raises(
        ScriptError,
        match=f"^epoch 5: the loss is nan; the last good checkpoint is {folder / FOUR};",
    ):
        train(folder, "--resume", "--epochs", 9)
    assert contents(folder) == before


@pytest.mark.parametrize(("log_interval", "batches"), [(1, 3), (2, 4), (100, 5)])
def test_how_soon_training_notices(log_interval: int, batches: int) -> None:
    model = torch.nn.Linear(1, 10)
    factors = iter([1, 1, torch.inf, 1, 1])
    model.forward = lambda x: model.weight[:, 0] * torch.full((len(x), 10), next(factors))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.zeros(9, 1), torch.zeros(9, dtype=torch.long)
    with raises(FloatingPointError, match=f"the loss is nan after {batches} batches"):
        train_test_mnist.train_one_epoch(
            model, optimizer, None, images, labels, 2, log_interval=log_interval
        )


def test_evaluation_notices_too() -> None:
    images, labels = torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.long)
    with raises(FloatingPointError, match="the loss in evaluation is nan"):
        train_test_mnist.evaluate(torch.nn.Linear(4, 10), images, labels, 2)


@pytest.mark.parametrize("what", ["training", "download"])
def test_kill(what: str) -> None:
    result = run("tests/kill.py", what, 10)
    assert result.returncode == 0, result.stderr
    assert re.match("1[01] kills in ", result.stdout)
