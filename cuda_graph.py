"""The training step as a CUDA graph: one launch from Python in place of a hundred."""

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from utils import describe_error


def graphed(step: Callable, batch_size: int, device: torch.device) -> Callable:
    """Return a function like `step` that records the third step on a GPU and replays it afterwards.

    Call it as step(model, optimizer, images, labels), always on the same model. The third step's
    images and labels become part of the recording, and each call overwrites what the call before it
    returned. Batches of another size are not replayed. If the model cannot be recorded, no batch
    is, and a line on standard error says why. On other devices, and before torch 2.4, `step` is
    returned as it is.
    """
    if device.type != "cuda" or not hasattr(torch.Generator, "clone_state"):
        return step
    torch.cuda.set_stream(torch.cuda.Stream(device))  # because the default one cannot be recorded
    warm_up = 3  # steps in which cuDNN and the allocator settle
    replay = None

    def graphed_step(*arguments):
        nonlocal batch_size, warm_up, replay
        images, labels = arguments[2:]  # after model and optimizer
        if len(images) != batch_size:
            return step(*arguments)
        if replay:
            return replay(images, labels)

        before = random_states()
        result = step(*arguments)
        warm_up -= 1
        generator = torch.cuda.default_generators[images.device.index]
        state = generator.clone_state()
        try:
            if random_states() != before:
                raise RuntimeError("it draws random numbers on the CPU")
            if warm_up == 0:
                replay = record(step, *arguments)
        except RuntimeError as error:
            generator.graphsafe_set_state(state)  # a recording that failed has not ended for it
            reason = describe_error(error.__context__ or error)
            print(f"Note: no CUDA graph, so training takes longer: {reason}", file=sys.stderr)
            batch_size = None
        return result

    return graphed_step


def record(step: Callable, model, optimizer, images, labels) -> Callable:
    """Return a function that copies a batch into `images` and `labels` and repeats the step on it.

    Raises RuntimeError if the model waits for the GPU.
    """
    no_update = SimpleNamespace(zero_grad=optimizer.zero_grad, step=lambda: None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(model, no_update, images, labels)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def replay(new_images, new_labels):
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        for parameter, gradient in gradients:  # because a step that was not replayed left its own
            parameter.grad = gradient
        optimizer.step()  # not recorded because its learning rate may change
        return result

    return replay


def random_states():
    """Return what changes when Python, NumPy or torch draws random numbers on the CPU."""
    return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
