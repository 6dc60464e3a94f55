"""Checks of a model: before it is trained, and when its checkpoint is loaded, because people edit their classes."""

import contextlib
import itertools
import re
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from utils import ScriptError, describe_error


def check_model(
    name: str, state: dict, images: Tensor, labels: Tensor, batch_size: int, amp: bool = False
) -> None:
    """Run a model of that class and state on a batch, in training and in evaluation mode.

    `images` (N, 1, 28, 28) and `labels` (N,) are the training set. `amp`: train in bfloat16 where it suffices.
    Raises ScriptError if the model cannot be trained; warns if it can be, but badly.
    """
    try:
        precision = (
            torch.autocast(images.device.type, torch.bfloat16) if amp else contextlib.nullcontext()
        )
    except RuntimeError as error:
        raise ScriptError(
            f"cannot train with --amp on {images.device}: {describe_error(error)}; leave it out"
        ) from error
    model = build_model(name).to(images.device)
    model.load_state_dict(state)
    model.train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ScriptError(
            f"{name} has nothing to train: no parameters, or none with requires_grad; give it some"
        )
    batch = images[:batch_size]
    last = len(images) % batch_size or len(batch)  # the last batch of an epoch may be smaller
    for n in (
        len(batch),
        len(batch),
        last,
    ):  # twice because a model may keep something from step to step
        with precision:
            logits = run(name, model, images[:n], "training with --amp" if amp else "training")
        try:
            F.cross_entropy(logits, labels[:n]).backward()
        except Exception as error:  # for example because of an in-place function
            raise ScriptError(
                f"{name} cannot be trained: {describe_error(error)}; fix it in models.py"
            ) from error
    model.eval()
    with torch.no_grad():
        logits, again, alone = (
            run(name, model, part, "evaluation") for part in (batch, batch, batch[:1])
        )
    if logits.min() >= 0 and torch.allclose(
        logits.sum(1), torch.ones_like(labels[: len(batch)], dtype=logits.dtype)
    ):
        warn(
            name,
            "returns probabilities, but the loss applies softmax itself: return what goes into softmax",
        )
    if not logits.equal(again):
        warn(name, "is random in evaluation, too: F.dropout needs training=self.training")
    elif not torch.allclose(logits[:1].softmax(1), alone.softmax(1), atol=1e-3):
        warn(
            name,
            "mixes the images of a batch in evaluation: its accuracy depends on the batch size",
        )


def run(name: str, model: nn.Module, images: Tensor, mode: str) -> Tensor:
    """Return the logits (N, 10) of images (N, 1, 28, 28); raise ScriptError if the model returns anything else."""
    n = len(images)
    try:
        logits = model(images.clone())  # because it may change its input in place
    except Exception as error:  # whatever a user's forward raises
        remedy = "fix its forward" + ", or choose another --batch-size" * (n == 1)
        remedy += ", or leave out --amp" * mode.endswith("--amp")
        shape = "x".join(map(str, images.shape))
        raise ScriptError(
            f"{name} fails in {mode} on a {shape} batch: {describe_error(error)}; {remedy}"
        ) from error
    is_tensor = isinstance(logits, Tensor) and logits.is_floating_point()
    if not is_tensor or logits.shape != (n, 10):
        found = (
            f"{logits.dtype} {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise ScriptError(
            f"{name} returns {found} for {n} images; return a float tensor ({n}, 10) of logits"
        )
    if not logits.isfinite().all():
        raise ScriptError(
            f"{name} returns NaN or infinity before any training; check its forward and first weights"
        )
    return logits


def warn(name: str, what: str) -> None:
    """Print a warning; training goes on."""
    print(f"Warning: {name} {what}", file=sys.stderr)


class ChangedModelError(ScriptError):
    """Says that a checkpoint does not fit the class that it names because the class has changed."""


def check_states(checkpoint: dict, to_resume: bool) -> None:
    """Raise an exception unless a checkpoint's states are finite and fit its class; warn if that has changed since."""
    name, remedy = checkpoint["model_name"], "restore the class, or give the changed one a new name"
    remedy += ", or start anew without --resume" * to_resume
    try:
        model = build_model(name)
    except ScriptError as error:
        raise ChangedModelError(f"was trained with {name}, but {error}; {remedy}") from error
    change = describe_change(checkpoint.get("architecture", ""), str(model))
    try:
        model.load_state_dict(checkpoint["model_state_dict"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    except (RuntimeError, ValueError) as error:
        reason = change or " ".join(str(error).split())
        raise ChangedModelError(f"was trained with another {name}: {reason}; {remedy}") from error
    if change and to_resume:
        warn(name, f"has changed since this run was started: {change}")
    momenta = [
        (p, m)
        for p, state in optimizer.state.items()
        for m in state.values()
        if isinstance(m, Tensor)
    ]
    if any(momentum.shape != parameter.shape for parameter, momentum in momenta):
        raise ValueError("its optimizer is another model's")
    trained = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]  # a mask may be infinite
    tensors = [*trained, *(momentum for _, momentum in momenta if not momentum.is_sparse)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError("a weight or a momentum in it is not finite")


def describe_change(before: str, now: str) -> str:
    """Return the first layer that differs between two models, given as str(model); nothing if `before` is empty."""
    pairs = (
        itertools.zip_longest(layers_of(before), layers_of(now), fillvalue="nothing")
        if before
        else ()
    )
    # A lazy layer has another name once it knows its shape
    return next(
        (f"{old} is now {new}" for old, new in pairs if old != new and "Lazy" not in new), ""
    )


def layers_of(architecture: str) -> list[str]:
    """Return the lines of str(model) with the full names of their modules."""
    path: list[str] = []
    layers = []
    for indent, name, layer in re.findall(
        r"^((?:  )+)\((.+?)\): (.+?)\(?$", architecture, re.MULTILINE
    ):
        path[len(indent) // 2 - 1 :] = [name]
        layers.append(f"{'.'.join(path)}: {layer}")
    return layers
