"""Nothing lost: resuming, earlier runs, damaged files, full disks, losses that are not finite, kills."""

import contextlib
import itertools
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from operator import delitem, setitem
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_one_line, assert_same, run
from pytest import CaptureFixture, MonkeyPatch, raises

import checkpoints
import train_test_mnist
from checkpoints import BEST, CURVES, LOG, epoch_files, find_newest_checkpoint, load_checkpoint
from download_mnist import download_mnist, is_original
from utils import ScriptError

ONE, TWO, THREE, FOUR = (f"mnist_model_epoch_{epoch}.pth" for epoch in (1, 2, 3, 4))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_command: Callable, tiny_data: Path) -> Path:
    """A folder with the files of four epochs of Model5 in one go."""
    folder = tmp_path_factory.mktemp("straight")
    options = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--epochs", 4, "--batch-size", 16, "--device", "cpu"
    result = run(*tiny_command("train_test_mnist.py", *options))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(straight, tmp_path / "checkpoints"))


@pytest.fixture
def scripted(train: Callable, monkeypatch: MonkeyPatch) -> Callable[..., str]:
    """Like `train`, but nothing is learned, and the epochs' test accuracies are given."""

    def scripted(folder: Path, accuracies: list[float], *options: object) -> str:
        given = iter(accuracies)
        monkeypatch.setattr(train_test_mnist, "train_one_epoch", lambda *args: (1.0, 10.0))
        monkeypatch.setattr(train_test_mnist, "evaluate", lambda *args: (1.0, next(given)))
        return train(folder, *options)

    return scripted


def load_all(folder: Path) -> dict[str, dict]:
    return {path.name: load_checkpoint(path, to_resume=True) for path in folder.glob("*.pth")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(output: str) -> list[list[str]]:
    """Return the table's lines without the seconds."""
    return [line.split()[:-1] for line in output.splitlines() if re.match(r" +\d+ ", line)]


def interrupt_after(name: str, monkeypatch: MonkeyPatch) -> None:
    """Let an interrupt come just after the file of that name is saved."""
    save = checkpoints.save_checkpoint

    def save_and_stop(path: Path, checkpoint: dict) -> None:
        save(path, checkpoint)
        if path.name == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_and_stop)


@pytest.mark.parametrize(("model", "momentum"), [("Model1", 0), ("Model2", 0.9), ("Model5", 0.8)])
def test_resuming_equals_never_having_stopped(model: str, momentum: float, train: Callable, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = "--model", model, "--batch-size", 24, "--lr", 0.03, "--momentum", momentum, "--seed", 3
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


def test_options_are_remembered_and_epochs_may_grow(train: Callable, folder: Path, monkeypatch: MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    for options in ((), ("--epochs", 3)):
        assert f"{FOUR} has finished epoch 4: nothing left to do" in train(folder, "--resume", *options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")} == before
    assert [row[0] for row in rows(train(folder, "--resume", "--epochs", 6))] == ["5", "6"]
    (folder / "mnist_model_epoch_6.pth").unlink()
    assert [row[0] for row in rows(train(folder, "--resume"))] == ["6"]
    same = "--model", "MODEL5", "--batch-size", 16, "--lr", 1e-2, "--momentum", 0.9, "--seed", 1
    assert [row[0] for row in rows(train(folder, "--resume", *same, "--epochs", 7))] == ["7"]
    monkeypatch.setattr("sys.argv", ["train_test_mnist.py", "--resume", str(folder / TWO)])
    args, recipe, _ = train_test_mnist.parse_args()
    assert (args.resume, args.checkpoint_dir) == (folder / TWO, folder)
    assert (recipe["epochs"], recipe["batch_size"]) == (4, 16)


@pytest.mark.parametrize(
    ("option", "given", "stored"),
    [
        ("--model", "Model1", "Model5"), ("--batch-size", 8, 16), ("--lr", 0.5, 0.01), ("--momentum", 0.5, 0.9),
        ("--seed", 2, 1), ("--val-size", 20, 0), ("--lr-scheduler", "onecyclelr", "constant"),
        ("--augment", True, False), ("--weight-decay", 0.1, 0.0), ("--checkpoint-dir", "other", "straight0"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(
    option: str, given: object, stored: object, train: Callable, straight: Path, capsys: CaptureFixture
) -> None:
    before = contents(straight)
    with raises(SystemExit) as stop:
        train(straight, "--resume", straight / FOUR, *[option] if given is True else [option, given])
    result = subprocess.CompletedProcess(option, stop.value.code, stderr=capsys.readouterr().err)
    assert_one_line(result, f"{option} {given} contradicts {straight / FOUR}", f"{stored}; leave it out")
    assert contents(straight) == before


def test_resume_takes_the_newest_intact_file(
    train: Callable, folder: Path, straight: Path, capsys: CaptureFixture
) -> None:
    (folder / FOUR).write_bytes((folder / FOUR).read_bytes()[:-100])
    (folder / THREE).write_bytes(b"")
    assert [row[0] for row in rows(train(folder, "--resume"))] == ["3", "4"]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder / FOUR) in line
    assert str(folder / THREE) in line
    assert line.endswith(f"Resuming from {folder / TWO}")
    assert_same(load_all(folder), load_all(straight))
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
    with raises(ScriptError, match=rf"^cannot resume in {missing}: there is no checkpoint\. Leave out --resume"):
        train(missing, "--resume")
    with raises(ScriptError, match=rf"{missing / ONE} .*: No such file"):
        train(missing, "--resume", missing / ONE)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("unknown", [(), ("val_size", "lr_scheduler", "augment", "weight_decay")])
def test_the_old_format_resumes(unknown: tuple[str, ...], train: Callable, folder: Path, straight: Path) -> None:
    (folder / FOUR).unlink()
    unknown += ("architecture", "train_loss", "val_loss", "val_accuracy", "test_loss", "seconds")
    for path in folder.glob("*.pth"):
        checkpoint = load_checkpoint(path)
        torch.save({key: checkpoint[key] for key in checkpoint.keys() - unknown} | {"compile": False}, path)
    assert len(rows(train(folder, "--resume"))) == 1
    assert_same(load_checkpoint(folder / FOUR), load_checkpoint(straight / FOUR))


def test_an_interrupt_gives_the_command_to_go_on(
    train: Callable, folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def advice(*options: object) -> str:
        with raises(KeyboardInterrupt) as stop:
            train(*options)
        return stop.value.advice

    with monkeypatch.context() as patch:
        interrupt_after(ONE, patch)
        assert advice(tmp_path) == f"to go on: python train_test_mnist.py --resume {tmp_path / ONE}"
    monkeypatch.setattr(train_test_mnist, "train_one_epoch", Mock(side_effect=KeyboardInterrupt))
    go_on = f"to go on: python train_test_mnist.py --resume {folder / FOUR}"
    assert advice(folder, "--resume", "--epochs", 9) == go_on
    assert advice(folder, "--epochs", 9, "--resume", folder / FOUR) == go_on
    assert advice(folder) == "nothing was saved yet"


def test_deterministic_gives_the_same_on_a_cpu(train: Callable, tmp_path: Path, straight: Path) -> None:
    try:
        train(tmp_path, "--deterministic", "--epochs", 1, "--batch-size", 16)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = (load_checkpoint(path / ONE)["model_state_dict"] for path in (tmp_path, straight))
    assert_same(first, second)


@pytest.mark.parametrize("kept", [{ONE, FOUR, BEST, LOG, CURVES}, {BEST}, {LOG}, {CURVES}])
def test_a_new_run_moves_the_files_of_earlier_ones(kept: set[str], train: Callable, tmp_path: Path) -> None:
    for name in kept:
        (tmp_path / name).write_bytes(b"dear")
    (tmp_path / "notes.txt").write_text("mine")
    for number, moved in ((1, kept), (2, {ONE, BEST, LOG})):
        line = f"Moved {len(moved)} files of an earlier run to {tmp_path / f'earlier_run_{number}'}"
        assert [each for each in train(tmp_path, "--epochs", 1).splitlines() if "Moved" in each] == [line]
        assert contents(tmp_path / f"earlier_run_{number}").keys() == moved
    assert set(contents(tmp_path / "earlier_run_1").values()) == {b"dear"}
    assert {path.name for path in tmp_path.glob("*.*")} == {ONE, BEST, LOG, "notes.txt"}


def test_only_the_names_of_epochs_count(train: Callable, folder: Path) -> None:
    numbers = ["1_backup", "007", "0", "9 (1)", "10.old", "+9", "٩"]  # the last one is a nine, but not in ASCII
    others = {f"mnist_model_epoch_{number}.pth": b"dear" for number in numbers}
    for name, data in others.items():
        (folder / name).write_bytes(data)
    for epoch in (9, 10):
        shutil.copy(folder / FOUR, folder / f"mnist_model_epoch_{epoch}.pth")
    assert list(epoch_files(folder)) == [1, 2, 3, 4, 9, 10]
    assert find_newest_checkpoint(folder)[0].name == "mnist_model_epoch_10.pth"  # newer than 9
    train(folder, "--resume", folder / TWO, "--epochs", 3)
    train(folder, "--epochs", 1)
    assert others.items() <= contents(folder).items()


def test_resuming_an_older_epoch_moves_the_later_ones(scripted: Callable, tmp_path: Path) -> None:
    scripted(tmp_path, [60.0, 50.0, 70.0, 65.0], "--epochs", 4)
    (tmp_path / CURVES).write_bytes(b"curves")
    before, aside = contents(tmp_path), tmp_path / "earlier_run_1"
    output = scripted(tmp_path, [55.0], "--resume", tmp_path / TWO, "--epochs", 3)
    assert [line for line in output.splitlines() if "Moved" in line] == [f"Moved 5 files of an earlier run to {aside}"]
    assert contents(aside) == {name: before[name] for name in (THREE, FOUR, BEST, LOG, CURVES)}
    after = load_all(tmp_path)
    assert after.keys() == {ONE, TWO, THREE, BEST}
    assert_same(after[BEST], after[ONE])  # the best of those that are left
    assert after[THREE]["best_test_accuracy"] == 60
    assert (tmp_path / LOG).read_text().count("\n") == 4
    scripted(tmp_path, [65.0], "--resume", tmp_path / ONE, "--epochs", 2)
    assert contents(tmp_path / "earlier_run_2").keys() == {TWO, THREE, LOG}  # the best one is not later
    assert load_checkpoint(tmp_path / BEST)["test_accuracy"] == 65


@pytest.mark.parametrize("epochs", [3, 4])  # with 3, nothing is left to train
@pytest.mark.parametrize("state", ["missing", "damaged", "another epoch's", "not saved yet"])
def test_the_best_file_is_restored(
    state: str, epochs: int, scripted: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(THREE if state == "not saved yet" else "nothing", patch)
        try:
            scripted(tmp_path, [50.0, 40.0, 70.0], "--epochs", 3)
        except KeyboardInterrupt:
            assert load_checkpoint(tmp_path / BEST)["epoch"] == 1
            assert (tmp_path / LOG).read_text().count("\n") == 3  # two epochs
    if state == "missing":
        (tmp_path / BEST).unlink()
    elif state != "not saved yet":
        (tmp_path / BEST).write_bytes(b"" if state == "damaged" else (tmp_path / TWO).read_bytes())
    output = scripted(tmp_path, [70.0], "--resume", "--epochs", epochs)  # not better than before
    assert ("nothing left to do" in output) == (epochs == 3)
    assert "Moved" not in output
    assert_same(load_checkpoint(tmp_path / BEST), load_checkpoint(tmp_path / THREE))
    assert (tmp_path / LOG).read_text().count("\n") == epochs + 1  # the log is whole, too


class Bomb:
    """Creates a file in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        """Return what to call with what."""
        return Path.touch, (Path("executed"),)


def flip(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def state(checkpoint: dict, parameter: int) -> dict:
    return checkpoint["optimizer_state_dict"]["state"][parameter]


NAN, INF, LAST = float("nan"), float("inf"), "output_block.1.weight"
DAMAGES = {  # from a checkpoint's bytes and content: new bytes, or new content if the old one is not changed in place
    "empty": (lambda data, old: b"", ""),
    "text": (lambda data, old: b"hello\n" * 99, ""),
    "HTML": (lambda data, old: b"<html></html>", ""),
    "zeros": (lambda data, old: bytes(len(data)), ""),
    "half": (lambda data, old: data[: len(data) // 2], ""),
    "one bit": (lambda data, old: flip(data, data.index(old["model_state_dict"][LAST].numpy().tobytes())), "damaged"),
    "a part marked as a folder": (lambda data, old: flip(data, data.rindex(b"archive/data/5") - 8, 4), "damaged"),
    "bare pickle": (lambda data, old: pickle.dumps(Bomb()), ""),
    "bomb": (lambda data, old: setitem(old, "extra", Bomb()), "more than tensors"),
    "a list": (lambda data, old: [1, 2], "has no model_name"),
    "a tensor": (lambda data, old: torch.ones(3), ""),
    "bare state dict": (lambda data, old: old["model_state_dict"], "has no model_name"),
    "no epoch": (lambda data, old: delitem(old, "epoch"), "has no epoch"),
    "another model": (lambda data, old: setitem(old, "model_name", "Model1"), "Missing key"),
    "unknown model": (lambda data, old: setitem(old, "model_name", "ResNet"), "ResNet"),
    "text for a number": (lambda data, old: setitem(old, "epoch", "four"), ""),
    "NaN accuracy": (lambda data, old: setitem(old, "best_test_accuracy", NAN), "not finite"),
    "NaN weight": (lambda data, old: setitem(old["model_state_dict"][LAST], 0, NAN), "not finite"),
    "infinite momentum": (lambda data, old: setitem(state(old, 3)["momentum_buffer"], 0, INF), "not finite"),
    "another optimizer": (
        lambda data, old: setitem(state(old, 0), "momentum_buffer", torch.ones(3)),
        "another model's",
    ),
    "missing": (None, "No such file"),
    "folder": (Path.mkdir, "directory"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_or_foreign_file(damage: Callable | None, reason: str, folder: Path, monkeypatch: MonkeyPatch) -> None:
    path = folder / FOUR
    data, content = path.read_bytes(), load_checkpoint(path)
    path.unlink()
    if damage is Path.mkdir:
        path.mkdir()
    elif damage:
        new = damage(data, content)
        path.write_bytes(new) if isinstance(new, bytes) else torch.save(content if new is None else new, path)
    monkeypatch.chdir(folder)
    before = contents(folder)
    with raises(ScriptError) as failure:
        load_checkpoint(path)
    message = str(failure.value)
    assert message.startswith(f"{path} is not an intact checkpoint: ")
    assert message.endswith("; name another file")
    assert reason in message
    assert "Errno" not in message
    assert "\n" not in message
    assert contents(folder) == before  # nothing is executed, nothing changed


def test_every_script_names_a_damaged_file_in_one_line(tiny_command: Callable, folder: Path) -> None:
    path = folder / FOUR
    data, weights = path.read_bytes(), load_checkpoint(path)["model_state_dict"]
    path.write_bytes(flip(data, data.index(weights[LAST].numpy().tobytes())))
    assert_one_line(run(*tiny_command("train_test_mnist.py", "--resume", path)), str(path), "damaged")
    assert_one_line(run("analyze_model.py", "--checkpoint", path), str(path), "damaged")


def test_what_only_resuming_needs(folder: Path) -> None:
    content = load_checkpoint(folder / FOUR)
    for key in ("history", "best_epoch", "epochs", "batch_size", "lr", "momentum", "seed"):
        torch.save({name: value for name, value in content.items() if name != key}, folder / FOUR)
        load_checkpoint(folder / FOUR)  # enough to analyze
        with raises(ScriptError, match=f"has no {key};"):
            load_checkpoint(folder / FOUR, to_resume=True)


def test_flipped_bits_and_cut_files(straight: Path, tmp_path: Path) -> None:
    path, data, expected = tmp_path / FOUR, (straight / FOUR).read_bytes(), load_checkpoint(straight / FOUR)
    draw, refused = random.Random(1), 0
    with zipfile.ZipFile(straight / FOUR) as archive:
        parts = [entry.header_offset for entry in archive.infolist()]
        assert archive.infolist()[0].filename.endswith("data.pkl")
        directory = archive.start_dir
    places = [draw.randrange(begin, end) for begin, end in itertools.pairwise([*parts, directory]) for _ in range(3)]
    places += [begin + draw.randrange(30) for begin in draw.sample(parts, 30)]  # headers
    for begin, end in ((0, parts[1]), (directory, len(data)), (0, len(data))):
        places += [draw.randrange(begin, end) for _ in range(60)]
    for place in places:
        path.write_bytes(flip(data, place, draw.randrange(8)))
        try:
            assert_same(load_checkpoint(path), expected)  # a bit that says nothing, such as padding
        except ScriptError:
            refused += 1
    assert len(places) >= 300
    assert refused > len(places) / 2
    for length in (*range(50), *(draw.randrange(len(data)) for _ in range(40)), *range(len(data) - 10, len(data))):
        path.write_bytes(data[:length])
        with raises(ScriptError):
            load_checkpoint(path)


@contextlib.contextmanager
def too_little_room(kind: str, folder: Path) -> Iterator[None]:
    """Let a folder be a disk of 200 kB, or limit the size of files to 20 kB."""
    if kind == "disk":
        mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted here; the limit on file sizes is tested")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]) if kind == "limit" else limits)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if kind == "disk":
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("kind", "reason", "whole"), [("disk", "No space left on device", 2), ("limit", "File too large", 0)]
)
def test_a_disk_that_fills_up(
    kind: str, reason: str, whole: int, train: Callable, tiny_gz: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    with too_little_room(kind, full), raises(ScriptError, match=rf"^cannot write {full}/\w+\.pth: {reason}; make room"):
        try:
            train(full, "--epochs", 20)
        finally:
            assert len(load_all(full)) == whole
            assert not list(full.glob("*.tmp"))
    raw = full / "MNIST" / "raw"
    with too_little_room(kind, full), raises(ScriptError, match=rf"^cannot write {raw}/[\w-]+: {reason}"):
        try:
            download_mnist(full, str(tiny_gz))
        finally:
            assert all(is_original(path.name, path.read_bytes()) for path in raw.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(train: Callable, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with raises(ScriptError, match=str(tmp_path)):
        train(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(train: Callable, folder: Path, monkeypatch: MonkeyPatch) -> None:
    before = contents(folder)
    with raises(ScriptError, match=r"^epoch 1: the loss is .*; nothing was saved; try a lower --lr"):
        train(folder, "--lr", 1e25, "--batch-size", 16)
    monkeypatch.setattr(train_test_mnist, "train_one_epoch", Mock(side_effect=FloatingPointError("the loss is nan")))
    with raises(ScriptError, match=f"^epoch 5: the loss is nan; the last good checkpoint is {folder / FOUR};"):
        train(folder, "--resume", "--epochs", 9)
    assert contents(folder) == before


@pytest.mark.parametrize(("log_interval", "batches"), [(1, 3), (2, 4), (100, 5)])
def test_how_soon_training_notices(log_interval: int, batches: int) -> None:
    model = torch.nn.Linear(1, 10)
    gives = [torch.ones(10), torch.ones(10), torch.full((10,), torch.inf), torch.ones(10), torch.ones(10)]
    model.forward = lambda x: model.weight[:, 0] * gives.pop(0).expand(len(x), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.zeros(9, 1), torch.zeros(9, dtype=torch.long)
    with raises(FloatingPointError, match=f"the loss is nan after {batches} batches"):
        train_test_mnist.train_one_epoch(model, optimizer, None, images, labels, 2, log_interval=log_interval)


def test_evaluation_notices_too() -> None:
    model = torch.nn.Linear(4, 10)
    torch.nn.init.constant_(model.weight, torch.nan)
    with raises(FloatingPointError, match="the loss in evaluation is nan"):
        train_test_mnist.evaluate(model, torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), 2)


@pytest.mark.parametrize("what", ["training", "download"])
def test_kill(what: str) -> None:
    result = run("tests/kill.py", what, 10)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("10 kills in ")
