"""The models: sizes, layers, the comments beside them, and models of one's own."""

import inspect
import re
import shutil

import pytest
import torch
from conftest import ROOT, assert_one_line, run
from pytest import raises
from torch import nn

import analyze_model
import models
from utils import ScriptError

# The shapes of the parameters: no convolution has a bias, a batch norm has two numbers a channel
SHAPES = {
    "Model1": "8x1x3x3 16x8x3x3 24x16x3x3 8x24x1x1 16x8x3x3 24x16x3x3 10x24x1x1 10x10x7x7",
    "Model2": "8x1x3x3 8 8 16x8x3x3 16 16 24x16x3x3 24 24 8x24x1x1 "
    "16x8x3x3 16 16 24x16x3x3 24 24 10x24x1x1 10x10x7x7",
    "Model5": "6x1x3x3 6 6 16x6x3x3 16 16 20x16x3x3 20 20 6x20x1x1 "
    "16x6x3x3 16 16 20x16x3x3 20 20 10x20x1x1",
}
OWN_CLASSES = """
import abc
from torch.nn import Identity
class Scale(nn.Module):
    def __init__(self, by, to): ...
class Shift(nn.Module):
    def __init__(self, *, by): ...
class TinyNet(nn.Sequential):
    def __init__(self, width=4, *, stride=2):
        super().__init__(nn.Conv2d(1, width, 5, stride), nn.Flatten(), nn.Linear(576, 10))
class Passing(TinyNet):
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)
class Inheriting(Model1): ...
class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def head(self): ...
"""


@pytest.mark.parametrize("name", SHAPES)
def test_size_shapes_and_layers(name):
    model = models.build_model(name)
    shapes = ["x".join(map(str, parameter.shape)) for parameter in model.parameters()]
    assert " ".join(shapes) == SHAPES[name]
    assert "padding=(" not in str(model)  # as a padded convolution is printed
    size = sum(parameter.numel() for parameter in model.parameters())
    assert f"{size:,} parameters" in model.__doc__
    blocks = " ".join(block for block, _ in model.named_children())
    assert blocks == "input_block conv_block1 transition_block conv_block2 output_block"
    logits = model(torch.randn(3, 1, 28, 28))
    assert logits.shape == (3, 10)
    assert logits.min() < 0  # not probabilities, nor cut off by a ReLU
    dropout = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert dropout == ([0.1, 0.1] if name == "Model5" else [])


@pytest.mark.parametrize("name", SHAPES)
def test_a_comment_stands_where_shape_or_receptive_field_changes_and_is_true(name):
    model = models.build_model(name)
    source = inspect.getsource(type(model))
    lines = re.findall(r"^ {12}nn\.(\w+)\(.*\),(?:  # (.*))?$", source, re.MULTILINE)
    expected, before, field = [], "1x28x28", 1
    for layer in analyze_model.analyze(model, (28, 28), batch_size=2).layers:
        if not layer.is_block:
            field_after = layer.fields[-1]["height"]["r_out"] if layer.fields else field
            changes = (layer.output, field_after) != (before, field)
            comment = f"{before} -> {layer.output} | RF {field_after}" if changes else ""
            expected.append((layer.type, comment))
            before, field = layer.output, field_after
    assert lines == expected
    assert source.count("#") == sum(bool(comment) for _, comment in lines)  # no comment elsewhere


def test_names_in_upper_and_lower_case(monkeypatch):
    assert type(models.build_model("mODEL2")) is models.Model2
    message = r"^models\.py has no model 'Model3'; it has Model1, Model2, Model5$"
    with raises(ScriptError, match=message):
        models.build_model("Model3")
    monkeypatch.setattr(models, "model_classes", lambda: {"Net": nn.Linear, "net": nn.ReLU})
    found = [models.find_model_name(name) for name in ("Net", "net", "NET")]
    assert found == ["Net", "net", "Net"]  # the exact name, else the first that matches


def test_own_classes_need_no_second_place(tmp_path):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(ROOT / "analysis", tmp_path / "analysis")
    (tmp_path / "models.py").write_text((ROOT / "models.py").read_text() + OWN_CLASSES)
    # Scale and Shift need arguments; Identity is torch's
    known = "it has Model1, Model2, Model5, TinyNet, Passing, Inheriting\n"
    for script in ("train_test_mnist.py", "analyze_model.py"):
        result = run(script, "--model", "nonsense", cwd=tmp_path)
        assert_one_line(result, "nonsense", known)
        result = run(script, "--model", "Scale", cwd=tmp_path)
        assert_one_line(result, "Scale", "missing 2 required positional arguments: 'by' and 'to'")
    result = run("analyze_model.py", "--model", "tinynet", "passing", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^total +5,860 +14 +5,874 ", result.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^2 +Linear .* 27x27$", result.stdout, re.MULTILINE)) == 2
