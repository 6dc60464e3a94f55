"""The look at a model before it is trained: what would fail in an hour fails at once."""

import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_data import CLASSES
from models import build_model
from utils import ScriptError, describe_error


def check_model(
    name: str,
    state: dict,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    test_batch_size: int,
    amp: bool = False,
) -> None:
    """Run a model of that class and state as training and testing will run it.

    `images` (N, 1, 28, 28) and `labels` (N,) are the training set. `amp`: train in bfloat16 where
    it suffices. Raises ScriptError if the model cannot be trained; warns if it would learn badly.
    """
    model = build_model(name).to(images.device)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ScriptError(f"{name} builds another network each time: fix its sizes") from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ScriptError(
            f"{name} has no parameters to train: fix it, with nn.ModuleList for lists"
        )

    model.train()
    last = len(images) % batch_size or batch_size  # the last batch of an epoch may be smaller
    for count in (batch_size, batch_size, last):  # twice because a model may keep what it computed
        try_batch(model, images[:count], labels[:count], amp)
    model.eval()
    images = images[:test_batch_size]
    with torch.no_grad():
        logits, again, alone = (try_batch(model, batch) for batch in (images, images, images[:1]))
    if logits.min() >= 0 and abs(logits.sum(1) - 1).max() < 1e-5:
        problem = "returns probabilities, but the loss applies softmax itself: leave it out"
    elif len(logits) > 1 and (logits == logits[0]).all():
        problem = "returns the same logits for all images: use the image in forward"
    elif not logits.equal(again):
        problem = "is random in evaluation, too: F.dropout needs training=self.training"
    elif not torch.allclose(logits[:1].softmax(1), alone.softmax(1), atol=1e-3):
        problem = "mixes the images of a batch in evaluation: accuracy depends on the batch size"
    else:
        return
    print(f"Warning: {name} {problem}", file=sys.stderr)


def try_batch(
    model: nn.Module, images: Tensor, labels: Tensor | None = None, amp: bool = False
) -> Tensor:
    """Return the logits (N, 10) of images (N, 1, 28, 28); with labels (N,), train on them.

    Raises ScriptError if the model fails or returns anything else.
    """
    training = labels is not None
    try:
        with torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
            logits = compute_logits(model, images)
        if training:
            F.cross_entropy(logits, labels).backward()
    except Exception as error:  # whatever a user's forward raises
        option = "--batch-size" if training else "--test-batch-size"
        remedy = "fix it"
        if is_out_of_memory(error):
            remedy = f"choose a smaller {option}"
        elif amp:
            remedy = "fix it, or leave out --amp"
        elif len(images) == 1:
            remedy = "fix it, or choose another --batch-size"
        where = f"{'training' if training else 'evaluation'} on a batch of {len(images)}"
        raise ScriptError(
            f"{type(model).__name__} fails in {where}: {describe_error(error)}; {remedy}"
        ) from error
    return logits


def compute_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, CLASSES) of images (N, 1, H, W).

    Raises TypeError or ValueError if the model returns anything else or if they are not finite.
    """
    logits = model(images.clone())  # because it may change its input in place
    wanted = len(images), CLASSES
    if not isinstance(logits, Tensor):
        raise TypeError(f"it returns a {type(logits).__name__}, not logits {wanted}")
    if not logits.is_floating_point() or logits.shape != wanted:
        raise ValueError(f"it returns {logits.dtype} {tuple(logits.shape)}, not floats {wanted}")
    if not logits.isfinite().all():
        raise ValueError("it returns NaN or infinity")
    return logits


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, which torch says in other words on each device."""
    return "memory" in repr(error).lower()  # a MemoryError's own text may be empty
