"""What each layer of a model costs in a training step, and how a run of a model is watched."""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from model_check import is_out_of_memory
from utils import describe_error

try:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
except ImportError:  # before torch 2.1
    FlopCounterMode = None


@dataclasses.dataclass(eq=False)  # because two calls may look alike
class Layer:
    """A line of the report: a call of a block or layer, or of a function outside any layer."""

    name: str
    depth: int
    type: str
    is_block: bool = False
    output_shape: tuple[int, ...] | None = None  # of one image
    missing: str = "failed"  # why there is no output
    weight: int = 0
    bias: int = 0
    parameters: int = 0
    share: float = 0.0  # per cent of the model's parameters
    buffers: int = 0
    MACs: int | None = 0  # per image; None if torch does not count them
    kept: int = 0  # bytes, for the batch

    # Height and width, if it changes them
    fields: list[dict] = dataclasses.field(default_factory=list)
    unknown: str | None = None  # why the receptive field is not known

    @property
    def output(self) -> str:
        """The output's shape as 8x26x26, or why there is none."""
        return self.missing if self.output_shape is None else "x".join(map(str, self.output_shape))


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is a leaf module of torch.nn, or its attention.

    The functions that it calls then have no lines of their own.
    """
    is_leaf = isinstance(module, nn.MultiheadAttention) or not list(module.children())
    return is_leaf and type(module).__module__.startswith("torch.nn.")


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in nested lists, tuples, dicts and dataclasses, each once."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    found = [tensor for item in value for tensor in tensors_in(item)]
    return list(dict.fromkeys(found))


def map_tensors(function: Callable[[Tensor], object], value: object) -> object:
    """Return a copy of a value with function(tensor) in place of each tensor in it."""
    replaced = {id(tensor): function(tensor) for tensor in tensors_in(value)}
    return copy.deepcopy(value, replaced)


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy that shares what cannot be copied.

    These are Python modules, and tensors left over from a computation.
    """
    attributes = [vars(module) for module in model.modules()]
    computed = [tensor for tensor in tensors_in(attributes) if not tensor.is_leaf]
    shared = [*sys.modules.values(), *computed]
    return copy.deepcopy(model, {id(value): value for value in shared})


@contextmanager
def hooks(model: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    """Call enter(name, module, args, kwargs) before each module and leave(..., output) after it."""
    # Through nn.Module because scripted modules offer no hooks
    add_before = nn.Module.register_forward_pre_hook
    add_after = nn.Module.register_forward_hook
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(add_before(module, partial(enter, name), with_kwargs=True))
            stack.enter_context(add_after(module, partial(leave, name), with_kwargs=True))
        yield


class Run(TorchFunctionMode):
    """A run of a model on images (N, 1, H, W), with a `Layer` for each call of a module.

    Creating it runs the model. `failure` says why the model fails, or is None.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        super().__init__()
        self.images = images
        self.layers: list[Layer] = []
        self.running: list[Layer] = []
        self.failure = None
        try:
            self.run(model)
        except Exception as error:  # whatever a user's forward raises
            if is_out_of_memory(error):
                raise
            name = [self.layers[0], *self.running][-1].name
            height, width = images.shape[2:]
            mode = "" if model.training else "in evaluation mode, "
            fails = f"{name} fails on images of {height}x{width}"
            self.failure = f"{mode}{fails}: {describe_error(error)}"

    def run(self, model: nn.Module) -> None:
        """Run the model on the images."""
        with hooks(model, self.enter, self.leave), self:
            model(self.images)

    def enter(self, name, module, args, kwargs):
        """Note that a module starts to run."""
        class_name = type(module).__name__
        layer = Layer(name or class_name, len(self.running), class_name, not is_layer(module))
        self.layers.append(layer)
        self.running.append(layer)

    def leave(self, name, module, args, kwargs, output):
        """Note what a module returns."""
        self.running.pop().output_shape = self.shape_of(output)

    def shape_of(self, output: object) -> tuple[int, ...]:
        """Return the shape of one image in the first tensor of an output."""
        sizes = [*tensors_in(output)[0].shape] if tensors_in(output) else []
        if len(self.images) in sizes:
            sizes.remove(len(self.images))  # wherever the batch axis lies
            return tuple(sizes)
        return tuple(sizes[1:])


class CostRun(Run):
    """A forward and a backward pass in training mode.

    What counts for a module excludes the modules inside it.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.at_work = 0  # bytes: input and output of the largest call of a function
        self.used = set()  # where the memory of the functions' inputs and outputs begins
        self.counter = None
        if FlopCounterMode:
            # Attention on a CPU, for which torch's counter has no formula
            attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
            formulas = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
            self.counter = FlopCounterMode(display=False, custom_mapping=formulas)

        # By their addresses; kept alive, so that no address is used twice
        given = [images, *nn.Module.parameters(model), *model.buffers()]
        self.held = {address(tensor): tensor for tensor in given}
        self.given = set(self.held)
        super().__init__(model, images)

    def run(self, model: nn.Module) -> None:
        """Run forward to measure, then both ways without the hooks, which hide errors."""
        with (
            saved_tensors_hooks(self.keep, lambda tensor: tensor),
            self.counter or nullcontext(),
            hooks(model, self.count, self.count),  # before enter and leave change `running`
        ):
            super().run(model)
        self.held.clear()
        outputs = [tensor for tensor in tensors_in(model(self.images)) if tensor.requires_grad]
        torch.autograd.backward([output.abs().sum() for output in outputs])  # abs for complex ones
        self.add_uncalled(model)

    def add_uncalled(self, model: nn.Module) -> None:
        """Add the layers, and modules with parameters or buffers, that are not called."""
        called = {layer.name for layer in self.layers}
        for name, module in model.named_modules():
            own = [*nn.Module.parameters(module, recurse=False), *module.buffers(recurse=False)]
            if name and name not in called and (own or is_layer(module)):
                is_used = any(address(tensor) in self.used for tensor in own)
                missing = "not called itself" if is_used else "never called"
                self.layers.append(Layer(name, 1, type(module).__name__, missing=missing))

    def enter(self, name, module, args, kwargs):
        """Note that a module starts to run, and whether torch may not count its operations."""
        super().enter(name, module, args, kwargs)
        if not self.counter or isinstance(module, nn.RNNBase | nn.Bilinear):
            self.running[-1].MACs = None

    def count(self, *_):
        """Add the operations since the last time to the module that runs."""
        if self.counter and self.running:
            layer = self.running[-1]
            macs = self.counter.get_total_flops() // 2 // len(self.images)
            self.counter.flop_counts.clear()
            if macs:
                layer.MACs = macs + (layer.MACs or 0)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, for the first of the calls that keep its memory."""
        if address(tensor) not in self.held:
            self.running[-1].kept += tensor.untyped_storage().nbytes()
            self.held[address(tensor)] = tensor
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Make a call of a function, and note how much it needs."""
        output = func(*args, **kwargs or {})
        sizes = {
            address(tensor): tensor.untyped_storage().nbytes()
            for tensor in tensors_in((args, kwargs, output))
        }
        self.used.update(sizes)
        work = sum(size for at, size in sizes.items() if at not in self.given)
        self.at_work = max(self.at_work, work)
        return output
