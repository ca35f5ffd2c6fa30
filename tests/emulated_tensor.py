"""An emulated CUDA tensor that computes on the CPU, and counters of its costs.

For use inside of `tests.emulated_cuda.emulated_cuda` only.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
PACKAGE = str(Path(rlhf.__file__).parent)
#: Files whose functions only copy: costs are counted at their callers' lines.
HELPERS = {"modeling/device.py"}

#: Operations whose result or its size the host must wait for.
SYNCS = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.equal,
    aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive, aten._unique,
    aten._unique2, aten.bincount, aten.is_nonzero,
    aten.masked_scatter_backward,  # a masked_select by its formula
    aten.multinomial,  # reads whether its input is valid (native/Distributions.cpp)
}  # fmt: skip
#: Operations by tensors of indices, which may lie on the CPU; a mask costs a `nonzero`.
INDEXING = {
    aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index,
    aten._unsafe_index_put,
}  # fmt: skip
#: Operations that take no CPU tensor at all, not even one without dimensions.
STRICT = {
    aten.cat, aten.stack, aten.index_select, aten.gather, aten.scatter, aten.scatter_,
    aten.scatter_add, aten.scatter_add_, aten.index_fill, aten.index_fill_, aten.embedding,
    aten.mm, aten.addmm, aten.bmm, aten.searchsorted, aten.masked_scatter, aten.masked_scatter_,
}  # fmt: skip
#: Beginnings of the names of operations that launch no kernel; views are known by their schema.
FREE = ("detach", "alias", "empty", "lift", "_unsafe_view", "_reshape_alias")
#: Containers in the arguments of operations.
CONTAINERS = (tuple, list, dict)


class EmulatedDevice:
    """Counters of a program's use of the emulated device, by source line in `rlhf`."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        #: True while C++ runs an operation on emulated tensors: what it creates is emulated too.
        self.inside = False
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._completed = 0
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        #: Waits of the host for the device, by source line and operation.
        self.syncs: Counter[str] = Counter()
        #: Copies to the device that wait for it as well: those without `non_blocking`.
        self.uploads: Counter[str] = Counter()
        #: Copies to the device with `non_blocking`.
        self.async_uploads: Counter[str] = Counter()
        #: Operations other than views, by name: about as many as kernels would be launched.
        self.kernels: Counter[str] = Counter()

    @property
    def operations(self) -> int:
        """Number of operations other than views since `reset`."""
        return self.kernels.total()

    def report(self) -> str:
        """Return all waits and copies as text, the most frequent first."""
        counters = {
            "syncs": self.syncs, "uploads": self.uploads, "async uploads": self.async_uploads
        }  # fmt: skip
        lines = [f"{self.operations} operations"]
        for title, counter in counters.items():
            lines.append(f"{counter.total()} {title}")
            lines += [f"{count:6d}  {source}" for source, count in counter.most_common()]
        return "\n".join(lines)

    def sync(self, name: str) -> None:
        """Count a wait for the device, and complete all copies to pinned memory."""
        self.syncs[f"{source_line()} {name}"] += 1
        self.complete(self.mark())

    def upload(self, source: Tensor, name: str, non_blocking: bool = False) -> None:
        """Count a copy to the device."""
        if source.numel():
            counter = self.async_uploads if non_blocking else self.uploads
            counter[f"{source_line()} {name}"] += 1

    def download(self, source: EmulatedTensor, target: Tensor, non_blocking: bool) -> None:
        """Copy to the host: at once, or to pinned memory when the host waits for the device.

        Until then the target holds NaN or the least integer, so that early reads are detected.
        """
        self.kernels["download"] += 1
        if not (non_blocking and is_pinned(target)):
            self.sync("copy to the CPU")
            target.copy_(source.inner)
            return
        self._copies.append((target, source.inner.to(target.dtype, copy=True)))
        integer = not (target.is_floating_point() or target.dtype == torch.bool)
        target.fill_(torch.iinfo(target.dtype).min if integer else torch.nan)

    def mark(self) -> int:
        """Return the current point in the device's queue, for `complete`."""
        return self._completed + len(self._copies)

    def complete(self, mark: int) -> None:
        """Complete the copies to pinned memory that were queued before `mark`."""
        while self._copies and self._completed < mark:
            target, source = self._copies.pop(0)
            self._completed += 1
            with torch.no_grad():
                target.copy_(source)


#: Devices of the open contexts; the first one is for tensors that outlive their context.
DEVICES = [EmulatedDevice()]


def source_line() -> str:
    """Return `path:line function` of the innermost frame in `rlhf`.

    In a backward pass, that of the forward pass.
    """
    node = torch._C._current_autograd_node()
    if node is not None and "source" in node.metadata:
        return f"{node.metadata['source']} (backward)"
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE) and path[len(PACKAGE) + 1 :] not in HELPERS:
            name = frame.f_code.co_qualname.partition(".<")[0]
            return f"{path[len(PACKAGE) + 1 :]}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return "elsewhere"


def is_cuda(device: Any) -> bool:
    """Return whether an argument `device` names the emulated device."""
    if isinstance(device, int):
        return True  # torch's meaning of a number where an accelerator is available
    return device is not None and torch.device(device).type == "cuda"


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a CPU tensor counts as pinned; views of a pinned one do not."""
    return getattr(tensor, "emulated_pinned", False)


def pin(tensor: Tensor) -> Tensor:
    """Mark a CPU tensor as pinned."""
    tensor.emulated_pinned = True  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


class EmulatedTensor(Tensor):
    """A tensor that Python sees on cuda:0; `inner` is the CPU tensor that computes."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, inner: Tensor, requires_grad: bool = False) -> EmulatedTensor:
        self = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # nn.Module.to keeps a parameter's identity only for a subclass that has these two.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> EmulatedTensor:
        return EmulatedTensor(inner["inner"])

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {CUDA}"

    def __deepcopy__(self, memo: dict[int, Any]) -> EmulatedTensor:
        if id(self) not in memo:
            memo[id(self)] = copy = EmulatedTensor(self.inner.clone(), self.requires_grad)
            if getattr(self, "_is_param", False):  # how torch knows parameters of a subclass
                copy._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
        return memo[id(self)]

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor):  # an argument of the kernel, no upload
            value = EmulatedTensor(torch.tensor(value, dtype=self.dtype))
        super().__setitem__(index, value)

    device: Any = property(lambda _: CUDA)
    is_cuda: Any = property(lambda _: True)
    is_cpu: Any = property(lambda _: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, EmulatedTensor), "data of another device"
        Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self.inner = value.inner.detach()

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, copy = parse_to(args, kwargs)
        if device is None or is_cuda(device):
            return super().to(dtype or self.dtype, copy=copy)
        return transfer(self, dtype, non_blocking)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        DEVICES[-1].sync("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"device": CUDA, "dtype": self.dtype, **kwargs})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin a CUDA tensor, only dense CPU tensors can be pinned")


def holds(kind: type, tree: Any) -> bool:
    """Return whether nested containers hold an instance of a type.

    torch's pytree takes ten times as long; this runs in each operation.
    """
    for leaf in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(leaf, kind):
            return True
        if isinstance(leaf, CONTAINERS) and holds(kind, leaf):
            return True
    return False


def mapped(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same tree with `function` of each leaf of a type."""
    if isinstance(tree, kind):
        return function(tree)
    if not isinstance(tree, CONTAINERS):
        return tree
    if isinstance(tree, dict):
        return {key: mapped(kind, function, value) for key, value in tree.items()}
    values = [mapped(kind, function, value) for value in tree]
    if hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*values)
    return type(tree)(values)


def inner_of(tree: Any) -> Any:
    """Return the arguments with emulated tensors replaced by their CPU tensors."""
    return mapped(EmulatedTensor, lambda t: t.inner, tree)


def parse_to(args: Any, kwargs: Any) -> tuple[Any, torch.dtype | None, bool, bool]:
    """Return device, dtype, non_blocking and copy from the arguments of Tensor.to."""
    device, dtype, other = (kwargs.get(name) for name in ("device", "dtype", "other"))
    flags = [arg for arg in args if isinstance(arg, bool)]
    for arg in args:
        if isinstance(arg, Tensor):
            other = arg
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, str | int | torch.device) and not isinstance(arg, bool):
            device = arg
    if other is not None:
        device, dtype = other.device, other.dtype
    flags += [kwargs.get(name, False) for name in ("non_blocking", "copy")][len(flags) :]
    return device, dtype, flags[0], flags[1]


def transfer(source: Tensor, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
    """Return a copy on the other device, through which gradients flow back."""
    if torch.is_grad_enabled() and source.requires_grad:
        result: Any = _Transfer.apply(source, dtype, non_blocking)
        return result
    dtype, gpu = dtype or source.dtype, DEVICES[-1]
    if not isinstance(source, EmulatedTensor):
        gpu.upload(source, "to", non_blocking)
        gpu.kernels["upload"] += 1
        return EmulatedTensor(source.detach().to(dtype, copy=True))
    target = torch.empty_like(source.inner, dtype=dtype)
    # torch allocates pinned memory for it (`_to_copy` in native/TensorConversions.cpp).
    gpu.download(source, pin(target) if non_blocking else target, non_blocking)
    return target


class _Transfer(torch.autograd.Function):
    """`transfer` with a gradient."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, dtype: Any, non_blocking: bool) -> Tensor:
        ctx.dtype = source.dtype
        return transfer(source.detach(), dtype, non_blocking)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return transfer(grads[0], ctx.dtype, False), None, None


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation with at least one emulated tensor among its arguments."""
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    wrappers: dict[int, EmulatedTensor] = {}
    mixed = False

    def unwrapped(tensor: Tensor) -> Tensor:
        nonlocal mixed
        if type(tensor) is not EmulatedTensor:
            mixed = True
            return tensor
        wrappers[id(tensor.inner)] = tensor
        return tensor.inner

    def wrapped(tensor: Tensor) -> EmulatedTensor:
        wrapper = wrappers.get(id(tensor))  # what an operation in place returns
        if wrapper is None:
            return EmulatedTensor(tensor)
        if wrapper.shape != tensor.shape:
            raise NotImplementedError(f"{func} changes a shape in place")
        return wrapper

    inner_args = [mapped(Tensor, unwrapped, arg) for arg in args]
    inner_kwargs = mapped(Tensor, unwrapped, kwargs) if kwargs else kwargs
    if mixed:
        _check_devices(func, args, kwargs)
    _count(func, args, kwargs)
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    return mapped(Tensor, wrapped, func(*inner_args, **inner_kwargs))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    gpu = DEVICES[-1]
    if not isinstance(target, EmulatedTensor):
        assert isinstance(source, EmulatedTensor)
        gpu.download(source, target, non_blocking)
        return target
    if isinstance(source, EmulatedTensor):
        source = source.inner
    else:
        gpu.upload(source, "copy_", non_blocking)
    gpu.kernels["aten.copy_"] += 1
    target.inner.copy_(source)
    return target


def _check_devices(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise as CUDA does where CPU tensors are mixed with emulated ones."""
    for i, (name, written) in enumerate(_arguments(func)):
        value = args[i] if i < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(tensor, Tensor) or isinstance(tensor, EmulatedTensor):
                continue
            if name == "indices" and isinstance(args[0], EmulatedTensor):
                DEVICES[-1].upload(tensor, "CPU index")
                continue
            scalar = tensor is value and tensor.dim() == 0 and tensor.device.type == "cpu"
            if not scalar or written or func.overloadpacket in STRICT:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:0 and {tensor.device}! (argument {name} of {func})"
                )


@functools.cache
def _arguments(func: Any) -> list[tuple[str, bool]]:
    """Return each argument's name, and whether the operation writes to it."""
    return [
        (argument.name, argument.alias_info is not None and argument.alias_info.is_write)
        for argument in func._schema.arguments
    ]


def _count(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    cost, gpu = _cost(func), DEVICES[-1]
    # CUDA's masked_fill reads a value that lies on the device (native/cuda/Indexing.cu).
    value = cost.fills and isinstance(args[2], EmulatedTensor)
    masks = cost.indexes and any(
        isinstance(i, EmulatedTensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )
    repeats = cost.repeats and kwargs.get("output_size") is None
    if cost.syncs or masks or value or repeats:
        gpu.sync(f"{cost.name}{' by a mask' if masks else ''}")
    if cost.launches:
        gpu.kernels[cost.name] += 1


class _Cost(NamedTuple):
    """What of an operation's cost does not depend on its arguments, and what else to look at."""

    name: str
    syncs: bool
    indexes: bool
    fills: bool
    repeats: bool
    launches: bool


@functools.cache
def _cost(func: Any) -> _Cost:
    packet = func.overloadpacket
    return _Cost(
        str(packet),
        packet in SYNCS,
        packet in INDEXING,
        packet in (aten.masked_fill, aten.masked_fill_),
        packet is aten.repeat_interleave,
        not func.is_view and not packet.__name__.startswith(FREE),
    )
