"""Three small CNNs for MNIST, the ones that were kept of a series of five: Models 1, 2 and 5.

Each maps images (N, 1, 28, 28) to logits (N, 10): no softmax, because the cross-entropy loss applies it. Being an
nn.Sequential, a model runs its blocks in the order in which they are assigned; for anything else, such as a branch,
give it a forward method. ReLU comes before batch norm; the other order gave the same accuracy.

Comments give the shape (channels x height x width) of one image before and after a layer, and RF, the receptive
field after it in input pixels.

To try a model of your own, add a class to this file: every script's --model finds it by its name.
"""

import inspect

from torch import nn

from utils import ScriptError, describe_error


class Model1(nn.Sequential):
    """The base model: 14,620 parameters, no batch norm, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.input_block = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),  # 1x28x28 -> 8x26x26 | RF 3
            nn.ReLU(),
        )
        self.conv_block1 = nn.Sequential(
            nn.Conv2d(8, 16, 3, bias=False),  # 8x26x26 -> 16x24x24 | RF 5
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, bias=False),  # 16x24x24 -> 24x22x22 | RF 7
            nn.ReLU(),
        )
        self.transition_block = nn.Sequential(
            nn.MaxPool2d(2),  # 24x22x22 -> 24x11x11 | RF 8
            nn.Conv2d(24, 8, 1, bias=False),  # 24x11x11 -> 8x11x11 | RF 8
        )
        self.conv_block2 = nn.Sequential(
            nn.Conv2d(8, 16, 3, bias=False),  # 8x11x11 -> 16x9x9 | RF 12
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, bias=False),  # 16x9x9 -> 24x7x7 | RF 16
            nn.ReLU(),
        )
        self.output_block = nn.Sequential(
            nn.Conv2d(24, 10, 1, bias=False),  # 24x7x7 -> 10x7x7 | RF 16
            nn.ReLU(),
            nn.Conv2d(10, 10, 7, bias=False),  # 10x7x7 -> 10x1x1 | RF 28
            nn.Flatten(),  # 10x1x1 -> 10 | RF 28
        )


class Model2(nn.Sequential):
    """Model1 with batch norm after every 3x3 convolution and its ReLU: 14,796 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.input_block = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),  # 1x28x28 -> 8x26x26 | RF 3
            nn.ReLU(),
            nn.BatchNorm2d(8),
        )
        self.conv_block1 = nn.Sequential(
            nn.Conv2d(8, 16, 3, bias=False),  # 8x26x26 -> 16x24x24 | RF 5
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 24, 3, bias=False),  # 16x24x24 -> 24x22x22 | RF 7
            nn.ReLU(),
            nn.BatchNorm2d(24),
        )
        self.transition_block = nn.Sequential(
            nn.MaxPool2d(2),  # 24x22x22 -> 24x11x11 | RF 8
            nn.Conv2d(24, 8, 1, bias=False),  # 24x11x11 -> 8x11x11 | RF 8
        )
        self.conv_block2 = nn.Sequential(
            nn.Conv2d(8, 16, 3, bias=False),  # 8x11x11 -> 16x9x9 | RF 12
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 24, 3, bias=False),  # 16x9x9 -> 24x7x7 | RF 16
            nn.ReLU(),
            nn.BatchNorm2d(24),
        )
        self.output_block = nn.Sequential(
            nn.Conv2d(24, 10, 1, bias=False),  # 24x7x7 -> 10x7x7 | RF 16
            nn.ReLU(),
            nn.Conv2d(10, 10, 7, bias=False),  # 10x7x7 -> 10x1x1 | RF 28
            nn.Flatten(),  # 10x1x1 -> 10 | RF 28
        )


class Model5(nn.Sequential):
    """The final model: 8,018 parameters, dropout, and global average pooling in place of the 7x7 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.input_block = nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False),  # 1x28x28 -> 6x26x26 | RF 3
            nn.ReLU(),
            nn.BatchNorm2d(6),
        )
        self.conv_block1 = nn.Sequential(
            nn.Conv2d(6, 16, 3, bias=False),  # 6x26x26 -> 16x24x24 | RF 5
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 20, 3, bias=False),  # 16x24x24 -> 20x22x22 | RF 7
            nn.ReLU(),
            nn.BatchNorm2d(20),
        )
        self.transition_block = nn.Sequential(
            nn.MaxPool2d(2),  # 20x22x22 -> 20x11x11 | RF 8
            nn.Conv2d(20, 6, 1, bias=False),  # 20x11x11 -> 6x11x11 | RF 8
            nn.Dropout(0.1),
        )
        self.conv_block2 = nn.Sequential(
            nn.Conv2d(6, 16, 3, bias=False),  # 6x11x11 -> 16x9x9 | RF 12
            nn.ReLU(),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 20, 3, bias=False),  # 16x9x9 -> 20x7x7 | RF 16
            nn.ReLU(),
            nn.BatchNorm2d(20),
            nn.Dropout(0.1),
        )
        self.output_block = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # 20x7x7 -> 20x1x1 | RF 28
            nn.Conv2d(20, 10, 1, bias=False),  # 20x1x1 -> 10x1x1 | RF 28
            nn.Flatten(),  # 10x1x1 -> 10 | RF 28
        )


def model_classes() -> dict[str, type[nn.Module]]:
    """Return the models of this file by class name: each nn.Module that can be built without arguments."""
    members = [
        each
        for each in globals().values()
        if isinstance(each, type) and issubclass(each, nn.Module)
    ]
    own = [each for each in members if each.__module__ == __name__ and not inspect.isabstract(each)]
    return {each.__name__: each for each in own if not missing_defaults(each)}


def missing_defaults(model_class: type[nn.Module]) -> list[str]:
    """Return the constructor's parameters that have no default."""
    parameters = inspect.signature(model_class).parameters.values()
    named = [
        each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    return [each.name for each in named if each.default is each.empty]


def default_model_name() -> str:
    """Return Model5, or the last model of this file if Model5 is gone; raise ScriptError if there is none."""
    names = list(model_classes())
    if not names:
        raise ScriptError(
            "models.py has no model; add an nn.Module whose constructor needs no arguments"
        )
    return "Model5" if "Model5" in names else names[-1]


def find_model_name(name: str) -> str:
    """Return the class name that `name` spells, exactly or else in upper or lower case, or `name` if there is none.

    Raises ScriptError if two names differ in case alone, or if the class cannot be built without arguments.
    """
    names = list(model_classes())
    spelled = [name] if name in names else [each for each in names if each.lower() == name.lower()]
    if len(spelled) > 1:
        raise ScriptError(
            f"{name!r} may be {' or '.join(spelled)} of models.py: write it as it stands there"
        )
    part = globals().get(name)
    if (
        not spelled
        and isinstance(part, type)
        and issubclass(part, nn.Module)
        and missing_defaults(part)
    ):
        raise ScriptError(
            f"{name} of models.py cannot be built: give {', '.join(missing_defaults(part))} a default"
        )
    return spelled[0] if spelled else name


def build_model(name: str) -> nn.Module:
    """Build the model of that class name, upper or lower case; raise ScriptError if there is none or it fails."""
    classes = model_classes()
    if find_model_name(name) not in classes:
        raise ScriptError(f"models.py has no model {name!r}; it has {', '.join(classes)}")
    try:
        return classes[find_model_name(name)]()
    except Exception as error:  # whatever a constructor raises
        raise ScriptError(
            f"{name} cannot be built: {describe_error(error)}; fix its constructor"
        ) from error
