"""The models: sizes, layers, the comments beside them, and models of one's own."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line, run
from torch import nn

import models
from analyze_model import analyze

PARAMETERS = {"Model1": 14_620, "Model2": 14_796, "Model5": 8_018}
BLOCKS = ["input_block", "conv_block1", "transition_block", "conv_block2", "output_block"]

OWN_CLASSES = """

class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor


class Shift(nn.Module):
    def __init__(self, *, by):
        super().__init__()
        self.by = by


class TinyNet(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Conv2d(1, width, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
"""


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_and_shapes(name: str) -> None:
    model = models.build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert [block for block, _ in model.named_children()] == BLOCKS
    assert f"{PARAMETERS[name]:,} parameters" in type(model).__doc__
    logits = model(torch.randn(3, 1, 28, 28))
    assert logits.shape == (3, 10)
    assert logits.min() < 0  # logits, not probabilities; nor cut off by a ReLU


@pytest.mark.parametrize("name", PARAMETERS)
def test_layers(name: str) -> None:
    layers = [layer for layer in models.build_model(name).modules() if not list(layer.children())]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    a, b, c = (6, 16, 20) if name == "Model5" else (8, 16, 24)
    ending = [(c, 10, 1)] if name == "Model5" else [(c, 10, 1), (10, 10, 7)]
    assert [(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in convolutions] == [
        (1, a, 3), (a, b, 3), (b, c, 3), (c, a, 1), (a, b, 3), (b, c, 3), *ending,
    ]  # fmt: skip
    assert all(layer.bias is None and layer.padding == (0, 0) for layer in convolutions)
    normalised = [layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    assert normalised == ([] if name == "Model1" else [a, b, c, b, c])  # after the 3x3 convolutions
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == ({0.1} if name == "Model5" else set())


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_comment_beside_a_layer_is_true(name: str) -> None:
    source = (ROOT / "models.py").read_text().split(f"class {name}(")[1].split("\nclass ")[0]
    comments = re.findall(r"nn\.(\w+)\(.*\),  # (\S+) -> (\S+) \| RF (\d+)$", source, re.MULTILINE)
    expected = []
    before, receptive_field = "1x28x28", 1
    for layer in analyze(models.build_model(name), (28, 28), batch_size=2, verify=False).layers:
        if not layer.is_block:
            after = "x".join(map(str, layer.output_shape))
            receptive_field = layer.fields[-1]["height"].r_out if layer.fields else receptive_field
            expected.append((layer.type, before, after, str(receptive_field)))
            before = after
    assert comments == expected
    assert len(comments) == len(re.findall(r"^ {12}nn\.", source, re.MULTILINE))  # no line without a comment


def test_names_in_upper_and_lower_case() -> None:
    assert type(models.build_model("mODEL2")) is models.Model2
    assert list(models.model_classes()) == ["Model1", "Model2", "Model5"]
    with pytest.raises(ValueError, match="Model1, Model2, Model5"):
        models.build_model("Model3")


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scripts in which the user appended classes to models.py and did nothing else."""
    folder = tmp_path_factory.mktemp("own")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    with (folder / "models.py").open("a") as file:
        file.write(OWN_CLASSES)
    return folder


@pytest.mark.parametrize("script", ["train_test_mnist.py", "analyze_model.py"])
def test_own_class_is_found_by_every_script(script: str, own_folder: Path) -> None:
    listing = "Model1,Model2,Model5,TinyNet"  # classes that need arguments, like Scale and Shift, are none
    assert f"{{{listing}" in run(script, "--help", cwd=own_folder).stdout
    unknown = run(script, "--model", "nonsense", cwd=own_folder)
    assert_one_line(unknown, "nonsense", *listing.split(","))


def test_own_class_is_analyzed(own_folder: Path) -> None:
    result = run("analyze_model.py", "--model", "tinynet", cwd=own_folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^total +5,860 +14 +5,874 ", result.stdout, re.MULTILINE)
    assert re.search(r"^3 +Linear .* 27x27$", result.stdout, re.MULTILINE)
