"""The models: sizes, layers, the comments beside them, and models of one's own."""

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

PARAMETERS = {"Model1": 14_620, "Model2": 14_796, "Model5": 8_018}
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


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_shapes_and_layers(name):
    model = models.build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    blocks = " ".join(block for block, _ in model.named_children())
    assert blocks == "input_block conv_block1 transition_block conv_block2 output_block"
    assert f"{PARAMETERS[name]:,} parameters" in type(model).__doc__
    logits = model(torch.randn(3, 1, 28, 28))
    assert logits.shape == (3, 10)
    assert logits.min() < 0  # not probabilities, nor cut off by a ReLU
    layers = [layer for layer in model.modules() if not list(layer.children())]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    a, b, c, ending = 8, 16, 24, [(24, 10, 1), (10, 10, 7)]
    if name == "Model5":
        a, b, c, ending = 6, 16, 20, [(20, 10, 1)]
    shapes = [(each.in_channels, each.out_channels, each.kernel_size[0]) for each in convolutions]
    assert shapes == [(1, a, 3), (a, b, 3), (b, c, 3), (c, a, 1), (a, b, 3), (b, c, 3), *ending]
    assert all(layer.bias is None and layer.padding == (0, 0) for layer in convolutions)
    normalised = [layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    assert normalised == ([] if name == "Model1" else [a, b, c, b, c])  # after the 3x3 convolutions
    dropout = {layer.p for layer in layers if isinstance(layer, nn.Dropout)}
    assert dropout == ({0.1} if name == "Model5" else set())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_comment_stands_where_shape_or_receptive_field_changes_and_is_true(name):
    source = (ROOT / "models.py").read_text().split(f"class {name}(")[1].split("\n\n\n")[0]
    lines = re.findall(r"^ {12}nn\.(\w+)\(.*\),(?:  # (.*))?$", source, re.MULTILINE)
    expected, before, field = [], "1x28x28", 1
    model = models.build_model(name)
    analysis = analyze_model.analyze(model, (28, 28), batch_size=2)
    for layer in analysis.layers:
        if not layer.is_block:
            field_after = layer.fields[-1]["height"]["r_out"] if layer.fields else field
            changes = (layer.output, field_after) != (before, field)
            comment = f"{before} -> {layer.output} | RF {field_after}" if changes else ""
            expected.append((layer.type, comment))
            before, field = layer.output, field_after
    assert lines == expected
    assert source.count("#") == sum(bool(comment) for _, comment in lines)  # no comment elsewhere


def test_names_in_upper_and_lower_case(monkeypatch):
    assert [models.find_model_name(name) for name in ("mODEL2", "Model3")] == ["Model2", "Model3"]
    assert type(models.build_model("mODEL2")) is models.Model2
    assert list(models.model_classes()) == list(PARAMETERS)
    known = "Model1, Model2, Model5"
    with raises(ScriptError, match=rf"^models\.py has no model 'Model3'; it has {known}$"):
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
    listed = [*PARAMETERS, "TinyNet", "Passing", "Inheriting"]
    for script in ("train_test_mnist.py", "analyze_model.py"):
        result = run(script, "--model", "nonsense", cwd=tmp_path)
        assert_one_line(result, "nonsense", *listed)
        assert not re.search("Abstract|Scale|Identity", result.stderr)
        result = run(script, "--model", "Scale", cwd=tmp_path)
        assert_one_line(result, "Scale", "missing 2 required positional arguments: 'by' and 'to'")
    result = run("analyze_model.py", "--model", "tinynet", "passing", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^total +5,860 +14 +5,874 ", result.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^2 +Linear .* 27x27$", result.stdout, re.MULTILINE)) == 2
