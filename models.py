"""Three small CNNs for MNIST: Models 1, 2 and 5 of a series, the ones that were kept.

Each maps images (N, 1, 28, 28) to logits (N, 10): no softmax, because the cross-entropy loss
applies it. An nn.Sequential runs its blocks in the order in which they are assigned; for anything
else, such as a branch, write a forward method. ReLU comes before batch norm; the other order gave
the same accuracy.

Comments give the shape (channels x height x width) of one image before and after a layer, and RF,
the receptive field after it in input pixels.

To try a model of your own, add a class to this file: every script's --model finds it by its name.
"""

import contextlib
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
    """The final model: 8,018 parameters, dropout, and average pooling for the 7x7 convolution."""

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
    """Return this file's models by name: each nn.Module that is built without arguments."""
    models = {}
    for each in list(globals().values()):
        if isinstance(each, type) and issubclass(each, nn.Module) and each.__module__ == __name__:
            with contextlib.suppress(TypeError):  # it needs arguments, so it is part of a model
                inspect.signature(each).bind()
                if not inspect.isabstract(each):
                    models[each.__name__] = each
    return models


def find_model_name(name: str) -> str:
    """Return the name of the model that `name` spells in upper or lower case, or else `name`."""
    names = list(model_classes())
    for each in (name, *names):
        if each in names and each.lower() == name.lower():
            return each
    return name


def build_model(name: str) -> nn.Module:
    """Return a new model of the class of that name; raise ScriptError if that fails."""
    classes = globals() | model_classes()
    name = find_model_name(name)
    if name not in classes:
        raise ScriptError(f"models.py has no model {name!r}; it has {', '.join(model_classes())}")
    try:
        return classes[name]()
    except Exception as error:  # whatever a constructor raises
        raise ScriptError(f"cannot build {name}: {describe_error(error)}; fix it") from error
