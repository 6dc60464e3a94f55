"""Nothing lost: resuming, damaged checkpoints, full disks, interrupts, kills."""

import contextlib
import io
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line, assert_same, run

import train_test_mnist as tt
from download_mnist import FILES, ScriptError, download_mnist, write_file

MODELS = ["Model1", "Model2", "Model5"]


@pytest.fixture
def train(tiny_mnist: None, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that trains in this process on the tiny data set, and returns what was printed."""

    def train(folder: Path, *options: object) -> str:
        command = ["train_test_mnist.py", "--data-dir", tiny_data, "--checkpoint-dir", folder, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [*map(str, [*command, *options])])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            tt.main()
        return output.getvalue()

    return train


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_command: Callable, tiny_data: Path) -> Path:
    """A folder with the checkpoints of four epochs of Model5 in one go."""
    folder = tmp_path_factory.mktemp("straight")
    options = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--epochs", 4, "--batch-size", 16, "--device", "cpu"
    result = run(*tiny_command("train_test_mnist.py", *options))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(straight, tmp_path / "checkpoints"))


def load_all(folder: Path) -> dict[str, dict]:
    return {path.name: tt.load_checkpoint(path, also=tt.RESUMED) for path in folder.glob("*.pth")}


def rows(output: str) -> list[list[str]]:
    """Return the table's lines without the seconds."""
    return [line.split()[:-1] for line in output.splitlines() if re.match(r" +\d+ ", line)]


class TestResume:
    """Going on equals never having stopped."""

    @pytest.mark.parametrize("model", MODELS)
    def test_bit_for_bit(self, model: str, train: Callable, tmp_path: Path) -> None:
        recipe = "--model", model, "--batch-size", 24, "--lr", 0.03, "--momentum", 0.8, "--seed", 3
        whole = rows(train(tmp_path / "whole", *recipe, "--epochs", 4))
        state = torch.get_rng_state()
        parts = rows(train(tmp_path / "parts", *recipe, "--epochs", 1))
        torch.rand(5)
        parts += rows(train(tmp_path / "parts", "--resume", "--epochs", 2))
        parts += rows(
            train(tmp_path / "parts", "--resume", tmp_path / "parts" / "mnist_model_epoch_2.pth", "--epochs", 4)
        )
        assert parts == whole
        assert torch.get_rng_state().equal(state)
        first, second = load_all(tmp_path / "whole"), load_all(tmp_path / "parts")
        for checkpoint in (*first.values(), *second.values()):
            checkpoint["epochs"] = 4  # all that differs, in the earlier ones
        assert_same(first, second)

    def test_epochs_are_remembered_and_may_grow(self, train: Callable, folder: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        for options in ((), ("--epochs", 3)):
            output = train(folder, "--resume", *options)
            assert "mnist_model_epoch_4.pth has finished epoch 4: nothing left to do" in output
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        assert [row[0] for row in rows(train(folder, "--resume", "--epochs", 6))] == ["5", "6"]
        (folder / "mnist_model_epoch_6.pth").unlink()
        assert [row[0] for row in rows(train(folder, "--resume"))] == ["6"]

    @pytest.mark.parametrize(
        ("option", "given", "stored"),
        [
            ("--model", "Model1", "Model5"),
            ("--batch-size", 8, 16),
            ("--lr", 0.5, 0.01),
            ("--momentum", 0.5, 0.9),
            ("--seed", 2, 1),
            ("--compile", True, False),
            ("--val-size", 20, 0),
            ("--lr-scheduler", "onecyclelr", "constant"),
            ("--augment", True, False),
            ("--weight-decay", 0.1, 0.0),
        ],
    )
    def test_contradiction_is_refused(
        self, option: str, given: object, stored: object, train: Callable, straight: Path, capsys: pytest.CaptureFixture
    ) -> None:
        words = [option] if given is True else [option, given]
        with pytest.raises(SystemExit) as stop:
            train(straight, "--resume", *words)
        result = subprocess.CompletedProcess(words, stop.value.code, stderr=capsys.readouterr().err)
        assert_one_line(result, option, str(given), str(stored), "mnist_model_epoch_4.pth")

    def test_what_was_stored_may_be_given_again(self, train: Callable, folder: Path) -> None:
        options = "--model", "MODEL5", "--batch-size", 16, "--lr", 1e-2, "--momentum", 0.9, "--seed", 1, "--epochs", 5
        assert len(rows(train(folder, "--resume", *options))) == 1

    def test_newest_intact_checkpoint(
        self, train: Callable, folder: Path, straight: Path, capsys: pytest.CaptureFixture
    ) -> None:
        newest, older = folder / "mnist_model_epoch_4.pth", folder / "mnist_model_epoch_3.pth"
        newest.write_bytes(newest.read_bytes()[:-100])
        older.write_bytes(b"")
        assert [row[0] for row in rows(train(folder, "--resume"))] == ["3", "4"]
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert str(newest) in errors[0]
        assert str(older) in errors[0]
        assert_same(load_all(folder), load_all(straight))

    def test_ten_is_newer_than_nine(self, folder: Path) -> None:
        shutil.copy(folder / "mnist_model_epoch_4.pth", folder / "mnist_model_epoch_9.pth")
        shutil.copy(folder / "mnist_model_epoch_4.pth", folder / "mnist_model_epoch_10.pth")
        assert tt.find_newest_checkpoint(folder)[0].name == "mnist_model_epoch_10.pth"

    def test_the_best_checkpoint_alone_is_enough(self, folder: Path) -> None:
        for path in folder.glob("mnist_model_epoch_*.pth"):
            path.unlink()
        assert tt.find_newest_checkpoint(folder)[0].name == "best_mnist_model.pth"

    def test_never_from_scratch(self, tiny_command: Callable, folder: Path, tmp_path: Path) -> None:
        for path in folder.glob("*.pth"):
            path.write_bytes(b"not a checkpoint")
        command = "train_test_mnist.py", "--resume", "--checkpoint-dir"
        assert_one_line(run(*tiny_command(*command, folder)), *map(str, folder.glob("*.pth")), "Leave out --resume")
        assert_one_line(run(*tiny_command(*command, tmp_path / "none")), str(tmp_path / "none"), "Leave out --resume")
        missing = tmp_path / "missing.pth"
        assert_one_line(run(*tiny_command("train_test_mnist.py", "--resume", missing)), str(missing), "No such file")
        assert {path.read_bytes() for path in folder.glob("*.pth")} == {b"not a checkpoint"}

    def test_into_another_folder(self, train: Callable, folder: Path, straight: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "mnist_model_epoch_9.pth").write_bytes(b"dear")
        train(other, "--resume", folder / "mnist_model_epoch_3.pth")
        assert (other / "earlier_run_1" / "mnist_model_epoch_9.pth").read_bytes() == b"dear"
        for name in ("mnist_model_epoch_4.pth", "best_mnist_model.pth"):
            assert_same(tt.load_checkpoint(other / name), tt.load_checkpoint(straight / name))
        assert len(list(other.glob("*.pth"))) == 2

    def test_the_folder_is_the_checkpoint_s_own(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / "mnist_model_epoch_2.pth"
        monkeypatch.setattr("sys.argv", ["train_test_mnist.py", "--resume", str(path)])
        args = tt.parse_args()
        assert (args.resume, args.checkpoint_dir, args.epochs, args.batch_size) == (path, folder, 4, 16)

    def test_ctrl_c_just_after_a_save(self, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save = tt.save_checkpoint

        def interrupted(path: Path, checkpoint: dict) -> None:
            save(path, checkpoint)
            if path.name == "mnist_model_epoch_1.pth":
                raise KeyboardInterrupt

        monkeypatch.setattr(tt, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(tmp_path)
        assert caught.value.advice.endswith(f"--resume {tmp_path / 'mnist_model_epoch_1.pth'}")

    def test_the_best_checkpoint_so_far_goes_along(
        self, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accuracies = iter([50.0, 70.0, 60.0, 55.0, 65.0, 60.0])
        monkeypatch.setattr(tt, "evaluate", lambda *args: (1.0, next(accuracies)))
        first, second, third = (tmp_path / name for name in ("first", "second", "third"))
        train(first, "--epochs", 3)
        best = tt.load_checkpoint(first / "best_mnist_model.pth")
        assert best["epoch"] == 2
        train(second, "--resume", first / "mnist_model_epoch_3.pth", "--epochs", 4)
        assert_same(tt.load_checkpoint(second / "best_mnist_model.pth"), best)
        (first / "best_mnist_model.pth").write_bytes(b"damaged")
        train(first, "--resume", "--epochs", 4)  # from the second epoch's file
        assert_same(tt.load_checkpoint(first / "best_mnist_model.pth"), best)
        train(third, "--resume", first / "mnist_model_epoch_1.pth", "--epochs", 2)  # which does not know of the 70
        assert tt.load_checkpoint(third / "best_mnist_model.pth")["test_accuracy"] == 60

    def test_best_is_never_replaced_by_a_worse_one(
        self, train: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        best = (folder / "best_mnist_model.pth").read_bytes()
        first = tt.load_checkpoint(folder / "mnist_model_epoch_1.pth")["test_accuracy"]
        monkeypatch.setattr(tt, "evaluate", lambda *args: (1.0, first + 0.1))  # the best after epoch 1, not of all
        train(folder, "--resume", folder / "mnist_model_epoch_1.pth")
        assert (folder / "best_mnist_model.pth").read_bytes() == best

    def test_an_interrupt_gives_the_command_to_go_on(
        self, train: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(tt, "train_one_epoch", interrupt)
        last = folder / "mnist_model_epoch_4.pth"
        for options in (("--resume", "--epochs", 9), ("--epochs", 9, "--resume", last)):
            with pytest.raises(KeyboardInterrupt) as stop:
                train(folder, *options)
            assert stop.value.advice.endswith(f" --device cpu --epochs 9 --resume {last}")
            assert stop.value.advice.count("--resume") == 1
        with pytest.raises(KeyboardInterrupt) as stop:
            train(folder)
        assert stop.value.advice == "nothing was saved yet"

    def test_deterministic(self, train: Callable, tmp_path: Path, straight: Path) -> None:
        try:
            train(tmp_path, "--deterministic", "--epochs", 1, "--batch-size", 16)
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        finally:
            torch.use_deterministic_algorithms(False)
        first, second = (tt.load_checkpoint(path / "mnist_model_epoch_1.pth") for path in (tmp_path, straight))
        assert_same(first["model_state_dict"], second["model_state_dict"])


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        """Return what to call with what."""
        return Path.touch, (self.path,)


def save(path: Path, content: object) -> None:
    torch.save(content, path)


def damage(kind: str, path: Path, workplace: Path) -> str:
    """Spoil a checkpoint in one way, and return what its error must say."""
    checkpoint = tt.load_checkpoint(path)
    data = path.read_bytes()
    weights = checkpoint["model_state_dict"]
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind in ("empty", "text", "HTML", "zeros", "half"):
        contents = {"empty": b"", "text": b"hello\n" * 99, "HTML": b"<html></html>", "zeros": bytes(len(data))}
        path.write_bytes(contents.get(kind, data[: len(data) // 2]))
    elif kind == "a tensor's byte":
        place = data.index(weights["conv_block2.3.weight"].numpy().tobytes()) + 1000
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif kind == "bare state dict":
        save(path, weights)
    elif kind == "a list":
        save(path, [1, 2])
    elif kind == "another model's weights":
        save(path, checkpoint | {"model_name": "Model1"})
    elif kind == "unknown model":
        save(path, checkpoint | {"model_name": "ResNet"})
    elif kind == "no epoch":
        save(path, {key: value for key, value in checkpoint.items() if key != "epoch"})
    elif kind == "NaN weights":
        weights["output_block.1.weight"][0] = torch.nan
        save(path, checkpoint)
    elif kind == "infinite momentum":
        checkpoint["optimizer_state_dict"]["state"][3]["momentum_buffer"][0] = torch.inf
        save(path, checkpoint)
    elif kind == "another optimizer's shapes":
        checkpoint["optimizer_state_dict"]["state"][0]["momentum_buffer"] = torch.zeros(3)
        save(path, checkpoint)
    elif kind == "NaN accuracy":
        save(path, checkpoint | {"best_test_accuracy": float("nan")})
    elif kind == "text for a number":
        save(path, checkpoint | {"epoch": "four"})
    elif kind == "bomb":
        save(path, checkpoint | {"extra": Bomb(workplace / "executed")})
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Bomb(workplace / "executed")))
    return {
        "missing": "No such file", "folder": "directory", "a tensor's byte": "damaged", "no epoch": "has no epoch",
        "bare state dict": "has no model_name", "another model's weights": "Missing key", "unknown model": "ResNet",
        "NaN weights": "not finite", "infinite momentum": "not finite", "NaN accuracy": "not finite",
        "another optimizer's shapes": "another model's", "bomb": "more than tensors", "a list": "has no model_name",
    }.get(kind, "")  # fmt: skip


DAMAGES = [
    "missing", "folder", "empty", "text", "HTML", "zeros", "half", "a tensor's byte", "bare state dict", "a list",
    "another model's weights", "unknown model", "no epoch", "NaN weights", "infinite momentum", "NaN accuracy",
    "another optimizer's shapes", "text for a number", "bomb", "bare pickle",
]  # fmt: skip


class TestLoading:
    """Whatever is in the file: one line, nothing executed, the file untouched."""

    @pytest.mark.parametrize("kind", DAMAGES)
    def test_damaged_or_foreign_file(self, kind: str, folder: Path, tmp_path: Path) -> None:
        path = folder / "mnist_model_epoch_4.pth"
        reason = damage(kind, path, tmp_path)
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(ScriptError) as failure:
            tt.load_checkpoint(path)
        message = str(failure.value)
        assert message.startswith(f"{path} is not an intact checkpoint: ")
        assert message.endswith("; name another file")
        assert reason in message
        assert "Errno" not in message
        assert "\n" not in message
        assert not (tmp_path / "executed").exists()
        assert before == (path.read_bytes() if path.is_file() else None)

    def test_scripts_say_so_in_one_line(self, tiny_command: Callable, folder: Path, tmp_path: Path) -> None:
        path = folder / "mnist_model_epoch_4.pth"
        damage("a tensor's byte", path, tmp_path)
        assert_one_line(run(*tiny_command("train_test_mnist.py", "--resume", path)), str(path), "damaged")
        assert_one_line(run("analyze_model.py", "--checkpoint", path), str(path), "damaged")

    def test_what_resuming_needs(self, folder: Path) -> None:
        path = folder / "mnist_model_epoch_4.pth"
        checkpoint = tt.load_checkpoint(path)
        save(path, {key: value for key, value in checkpoint.items() if key != "seed"})
        tt.load_checkpoint(path)  # enough to analyze
        with pytest.raises(ScriptError, match="has no seed"):
            tt.load_checkpoint(path, also=tt.RESUMED)

    def test_without_momentum(self, train: Callable, tmp_path: Path) -> None:
        train(tmp_path, "--momentum", 0, "--epochs", 1)
        assert len(rows(train(tmp_path, "--resume", "--epochs", 2))) == 1

    def test_flipped_bytes_and_cut_files(self, straight: Path, tmp_path: Path) -> None:
        source, path = straight / "mnist_model_epoch_4.pth", tmp_path / "checkpoint.pth"
        data, expected = source.read_bytes(), tt.load_checkpoint(source)
        draw = random.Random(1)
        with zipfile.ZipFile(source) as archive:
            directory, entries = archive.start_dir, archive.infolist()
        headers, contents = [entry.header_offset for entry in entries], {}
        for entry in entries:
            name_and_extra = sum(struct.unpack("<2H", data[entry.header_offset + 26 : entry.header_offset + 30]))
            begin = entry.header_offset + 30 + name_and_extra
            contents[entry.filename] = range(begin, begin + entry.file_size)
        (pickled,) = (place for name, place in contents.items() if name.endswith("data.pkl"))
        tensors = [place for name, place in contents.items() if "/data/" in name]
        places = {
            "headers": [start + draw.randrange(30) for start in draw.sample(headers, 30)],
            "pickle": draw.sample(pickled, 60),
            "tensors": [draw.choice(tensor) for tensor in tensors],
            "directory": [draw.randrange(directory, len(data)) for _ in range(60)],
            "anywhere": [draw.randrange(len(data)) for _ in range(60)],
        }
        outcomes = {"refused": 0, "unchanged": 0}
        for place in (place for group in places.values() for place in group):
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
            try:
                assert_same(tt.load_checkpoint(path), expected)
                outcomes["unchanged"] += 1  # a byte that says nothing, such as padding
            except ScriptError:
                outcomes["refused"] += 1
        assert sum(outcomes.values()) >= 200
        assert outcomes["refused"] > outcomes["unchanged"]
        for length in (*range(50), *(draw.randrange(len(data)) for _ in range(40)), *range(len(data) - 10, len(data))):
            path.write_bytes(data[:length])
            with pytest.raises(ScriptError):
                tt.load_checkpoint(path)


class TestSaving:
    """A checkpoint's name always holds a whole checkpoint."""

    @pytest.mark.usefixtures("tiny_mnist")
    @pytest.mark.parametrize("step", ["write", "fsync", "replace"])
    def test_a_failed_save_changes_nothing(self, step: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / "best_mnist_model.pth"
        before = {path: path.read_bytes() for path in folder.iterdir()}

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        if step == "write":
            monkeypatch.setattr(Path, "open", fail)
        else:
            monkeypatch.setattr({"fsync": os, "replace": Path}[step], step, fail)
        with pytest.raises(ScriptError, match=r"best_mnist_model\.pth: No space left on device"):
            tt.save_checkpoint(path, {"epoch": 5})
        monkeypatch.undo()
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_synced_before_it_is_renamed_and_the_folder_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events, fsync, replace = [], os.fsync, Path.replace

        def record_fsync(number: int) -> None:
            target = Path(f"/proc/self/fd/{number}").readlink()
            events.append("folder" if target == tmp_path else target.read_bytes())
            fsync(number)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(Path, "replace", lambda path, to: events.append("renamed") or replace(path, to))
        write_file(tmp_path / "file", b"all of it")
        assert events == [b"all of it", "renamed", "folder"]

    def test_mode_follows_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            write_file(tmp_path / "file", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        old, new, other = (tmp_path / name for name in ("a.pth.1.tmp", "a.pth.2.tmp", "b.pth.1.tmp"))
        for path in (old, new, other):
            path.write_bytes(b"half")
        for path, age in ((old, 3600), (new, 60), (other, 3600)):
            os.utime(path, (time.time() - age,) * 2)
        write_file(tmp_path / "a.pth", b"whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.2.tmp", "b.pth.1.tmp"]

    def test_no_room_is_said_before_the_first_epoch(
        self, tiny_command: Callable, tiny_data: Path, small_disk: Path
    ) -> None:
        options = "--data-dir", tiny_data, "--checkpoint-dir", small_disk / "new", "--device", "cpu"
        result = run(*tiny_command("train_test_mnist.py", *options))
        assert_one_line(result, str(small_disk / "new"), "choose another")
        assert "epoch" not in result.stdout
        assert list((small_disk / "new").iterdir()) == []

    def test_a_disk_that_fills_up(self, train: Callable, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tt, "check_room", lambda *args: None)  # others take the room after the check
        with pytest.raises(ScriptError, match=rf"cannot write {small_disk}/\w+\.pth: No space left on device"):
            train(small_disk, "--epochs", 20)
        assert len(load_all(small_disk)) > 1
        assert not list(small_disk.glob("*.tmp"))

    @pytest.mark.usefixtures("tiny_mnist")
    def test_a_download_that_fills_the_disk(self, tiny_gz: Path, small_disk: Path, tmp_path: Path) -> None:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(250_000))
        with pytest.raises(ScriptError, match=rf"cannot write {small_disk}/MNIST/raw/[\w-]+: No space left on device"):
            download_mnist(small_disk, str(tiny_gz))
        assert all(path.name in FILES for path in (small_disk / "MNIST" / "raw").iterdir())
        filler.unlink()
        download_mnist(small_disk, str(tiny_gz))

    def test_a_limit_on_file_sizes(
        self, tiny_command: Callable, tiny_data: Path, tiny_gz: Path, folder: Path, tmp_path: Path
    ) -> None:
        before = load_all(folder)
        options = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--device", "cpu"
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)){os.linesep}"
        flag, script = tiny_command("train_test_mnist.py", *options)
        assert_one_line(run(flag, limit + script), str(folder), "File too large")
        assert_same(load_all(folder), before)
        flag, script = tiny_command("train_test_mnist.py", "--data-dir", tmp_path / "data", "--dry-run")
        shutil.copytree(tiny_gz, tmp_path / "data" / "MNIST" / "raw")
        assert_one_line(run(flag, limit + script), str(tmp_path / "data"), "File too large")
        assert not list((tmp_path / "data").rglob("*.tmp"))

    def test_a_folder_that_cannot_be_written(self, train: Callable, tmp_path: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
        with pytest.raises(ScriptError, match=str(tmp_path)):
            train(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB; the test is skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here; the limit on file sizes is tested")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class TestNotFinite:
    """A loss that is NaN or infinite ends the run; what was saved stays."""

    def test_in_training(self, tiny_command: Callable, tiny_data: Path, folder: Path) -> None:
        before = load_all(folder)
        options = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--lr", 1e25, "--batch-size", 16
        result = run(*tiny_command("train_test_mnist.py", *options, "--device", "cpu"))
        assert_one_line(result, "epoch 1: the loss is ", "nothing was saved", "--lr")
        assert_same(load_all(folder), before)

    def test_after_a_good_epoch(self, train: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise FloatingPointError("the loss is nan after 3 batches")

        monkeypatch.setattr(tt, "train_one_epoch", fail)
        last = folder / "mnist_model_epoch_4.pth"
        with pytest.raises(
            ScriptError, match=f"epoch 5: the loss is nan after 3 batches; the last good checkpoint is {last};"
        ):
            train(folder, "--resume", "--epochs", 9)

    @pytest.mark.parametrize(("log_interval", "batches"), [(1, 3), (2, 4), (100, 5)])
    def test_how_soon(self, log_interval: int, batches: int) -> None:
        class Failing(torch.nn.Module):  # its third batch gives infinite logits
            calls = 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                Failing.calls += 1
                return self.weight * torch.ones(len(x), 10) * (torch.inf if Failing.calls == 3 else 1)

        model = Failing()
        model.weight = torch.nn.Parameter(torch.ones(10))
        images, labels = torch.zeros(9, 1, 1, 1), torch.zeros(9, dtype=torch.int64)
        step = tt.TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.1), images, labels, 2)
        with pytest.raises(FloatingPointError, match=f"the loss is nan after {batches} batches"):
            tt.train_one_epoch(step, log_interval, "")

    def test_in_the_test(self) -> None:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
        torch.nn.init.constant_(model[1].weight, torch.nan)
        with pytest.raises(FloatingPointError, match="the loss in evaluation is nan"):
            tt.evaluate(model, torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 2)


@pytest.mark.parametrize("what", ["training", "download"])
def test_kill(what: str) -> None:
    result = run("tests/kill.py", what, 20)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("20 kills in ")
