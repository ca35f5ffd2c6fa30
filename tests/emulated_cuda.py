"""An emulated CUDA device: finds device bugs and counts host syncs without a GPU.

`with emulated_cuda() as gpu:` makes `torch.device("cuda")` usable. A tensor there is an
`EmulatedTensor`, which wraps a CPU tensor and computes on it, so that results equal those of the
CPU's kernels. Operations that mix devices raise as CUDA does. Not emulated: CUDA's kernels and
their rounding, streams other than the current one, allocation, graphs, several processes.

For C++ an emulated tensor is a CPU tensor: in a CPU build of torch, autograd refuses CUDA. Python
sees cuda:0. Hence two modes: `_PythonCalls` obeys the devices that Python passes as arguments,
`_CreatedInside` wraps what C++ creates by itself inside of an operation on emulated tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulated_tensor import (
    CUDA,
    DEVICES,
    EmulatedDevice,
    EmulatedTensor,
    holds,
    inner_of,
    is_cuda,
    is_pinned,
    parse_to,
    pin,
    source_line,
    transfer,
)

__all__ = ["EmulatedDevice", "EmulatedTensor", "emulated_cuda"]

#: Functions that create a tensor from the host's data, so that a device gets a copy.
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


@contextmanager
def emulated_cuda() -> Iterator[EmulatedDevice]:
    """Make torch.device("cuda") usable inside. Move results to the CPU before leaving.

    Accelerate's process-wide state is reset before and afterwards.
    """
    calls = _PythonCalls()
    with ExitStack() as stack:
        DEVICES.append(EmulatedDevice())
        stack.callback(DEVICES.pop)
        for target, name, value in [*_patches(), (torch.autograd, *_backward(calls))]:
            stack.enter_context(patch.object(target, name, value))
        for module in (_foreach_utils, sys.modules["torch.optim.optimizer"]):
            types: Any = module._foreach_supported_types
            types.append(EmulatedTensor)
            stack.callback(types.remove, EmulatedTensor)
        for state in (AcceleratorState, PartialState):
            state._reset_state()
            stack.callback(state._reset_state)
        stack.enter_context(_CreatedInside())
        stack.enter_context(calls)
        yield DEVICES[-1]


class _PythonCalls(TorchFunctionMode):
    """Obeys devices in the arguments of torch's functions when Python calls them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if kwargs.pop("pin_memory", False):
            return pin(func(*args, **kwargs))
        if func in _METHODS and type(args[0]) is not EmulatedTensor:
            return _METHODS[func](*args, **kwargs)
        emulated = holds(EmulatedTensor, args) or holds(EmulatedTensor, kwargs)
        device = kwargs.get("device")
        if kwargs.get("generator") is not None:
            _check_generator(kwargs["generator"], emulated or is_cuda(device))
        if device is not None:
            if is_cuda(device) and not emulated:
                return _create(func, args, kwargs)
            if emulated:
                del kwargs["device"]
                if not is_cuda(device):
                    args, kwargs = inner_of((args, kwargs))
                    return func(*args, **kwargs)
        gpu = DEVICES[-1]
        # As `_inside`, which takes longer.
        before, gpu.inside = gpu.inside, emulated
        try:
            result = func(*args, **kwargs)
        finally:
            gpu.inside = before
        if type(result) is EmulatedTensor and (node := result.grad_fn) is not None:
            metadata = node.metadata
            if "source" not in metadata:
                metadata["source"] = source_line()
        return result


class _CreatedInside(TorchDispatchMode):
    """Wraps what C++ creates by itself inside of an operation on emulated tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: a wrapper that keeps the compiler out takes time in each operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # the caller is C++ from here on
            result = func(*args, **kwargs)
        if type(result) is not Tensor or not DEVICES[-1].inside:
            return result
        created = not (holds(Tensor, args) or holds(Tensor, kwargs))
        return EmulatedTensor(result) if created else result


@contextmanager
def _inside(emulated: bool) -> Iterator[None]:
    """Run a function of torch with or without emulated arguments."""
    gpu = DEVICES[-1]
    before, gpu.inside = gpu.inside, emulated
    try:
        yield
    finally:
        gpu.inside = before


def _backward(calls: _PythonCalls) -> tuple[str, Callable[..., Any]]:
    """Return name and replacement of autograd's entry, with `calls` on inside it.

    torch disables a mode while it handles Tensor.backward.
    """
    name = "_engine_run_backward"
    run = getattr(torch.autograd, name)

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _inside(True), calls:
            return run(*args, **kwargs)

    return name, backward


def _check_generator(generator: torch.Generator, emulated: bool) -> None:
    """Raise as torch does if an operation draws from a generator of another device."""
    if (generator.device.type == "cuda") != emulated:
        expected, actual = ("cuda", "cpu") if emulated else ("cpu", "cuda")
        raise RuntimeError(
            f"Expected a '{expected}' device type for generator but found '{actual}'"
        )


def _create(func: Any, args: Any, kwargs: dict[str, Any]) -> EmulatedTensor:
    """Return the result of a factory function, on the emulated device."""
    with _inside(False):
        inner = func(*args, **{**kwargs, "device": "cpu"})
    gpu = DEVICES[-1]
    if func in FROM_DATA:
        gpu.upload(inner, func.__name__)
    if not func.__name__.startswith("empty"):
        gpu.kernels[func.__name__] += 1
    return EmulatedTensor(inner.detach(), inner.requires_grad)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, non_blocking, _ = parse_to(args, kwargs)
    return transfer(tensor, dtype, non_blocking) if is_cuda(device) else tensor.to(*args, **kwargs)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    if isinstance(value, EmulatedTensor):
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(value, tensor.requires_grad))
    else:
        Tensor.data.__set__(tensor, value)  # pyright: ignore[reportAttributeAccessIssue]


#: Methods of a CPU tensor that concern devices.
_METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: lambda tensor, *_, **__: transfer(tensor, None, False),
    Tensor.pin_memory: lambda tensor, *_: pin(tensor.clone()),
    Tensor.is_pinned: lambda tensor, *_: is_pinned(tensor),
    Tensor.data.__set__: _set_data,  # pyright: ignore[reportAttributeAccessIssue]
}


class _Generator(torch._C.Generator):
    """A generator that may be on the emulated device, where it draws the CPU's numbers."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls)
        self.emulated = is_cuda(device)
        return self

    @property
    def device(self) -> torch.device:
        return CUDA if self.emulated else torch.device("cpu")


class _Event:
    """A CUDA event: waiting for it completes the copies that were queued before it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.mark = 0

    def record(self, *_: Any) -> None:
        self.mark = DEVICES[-1].mark()

    def synchronize(self) -> None:
        DEVICES[-1].syncs[f"{source_line()} Event.synchronize"] += 1
        DEVICES[-1].complete(self.mark)

    def query(self) -> bool:
        DEVICES[-1].complete(self.mark)
        return True


class _Stream:
    """The current stream."""

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def wait_event(self, *_: Any) -> None: ...

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        DEVICES[-1].sync("Stream.synchronize")


def _patches() -> list[tuple[Any, str, Any]]:
    """Return replacements of the functions that call the driver."""

    def as_cpu(function: Any) -> Any:
        return lambda *args: function(*("cpu" if a == "cuda" else a for a in args))

    # C++ lowers the products of emulated tensors by the CPU's switch.
    switches = ("is_autocast_enabled", "set_autocast_enabled")
    dtypes = ("get_autocast_dtype", "set_autocast_dtype")
    stream = _Stream()
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(tensorlists: Any, with_indices: bool = False) -> Any:
        """Group tensors as torch does, by the devices that Python sees."""
        groups = group(tensorlists, with_indices)
        return {
            (lists[0][0].device, dtype): (lists, i) for (_, dtype), (lists, i) in groups.items()
        }

    def synchronize(*_: Any) -> None:
        DEVICES[-1].sync("synchronize")

    return [
        *((torch, name, as_cpu(getattr(torch, name))) for name in (*switches, *dtypes)),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
        (torch, "Generator", _Generator),
        (torch, "Event", _Event),
        (torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "synchronize", synchronize),
        (torch.accelerator, "current_stream", lambda *_: stream),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (torch.cuda, "get_rng_state_all", lambda: [torch.get_rng_state()]),
        (torch.cuda, "set_rng_state_all", lambda _: None),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_name", lambda *_: "emulated"),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "manual_seed_all", lambda _: None),
        (torch.cuda, "synchronize", synchronize),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "Event", _Event),
    ]
