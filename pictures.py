"""Pictures of receptive fields, drawn with matplotlib, which is imported only when a picture is asked for."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from download_mnist import ScriptError, write_file
from receptive_fields import Axis


def require_matplotlib() -> None:
    """Raise ScriptError, which says how to install it, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ScriptError("drawing needs matplotlib: pip install matplotlib")


def draw_receptive_fields(*a):
    pass
