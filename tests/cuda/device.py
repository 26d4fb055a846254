"""The emulated device: CPU tensors whose storage has a block of device memory, and a mode that watches all they do.

A tensor is on the device when its storage has a ``memory.Block``; then it says ``cuda:0``. Every operation, those of
autograd too, comes by ``EmulatedDevice``, which says where results are, refuses what mixes host and device, and tells
``memory`` which bytes were read and written on the current stream. Kernels are those of the CPU.

C++ makes tensors "where that one is", and for C++ all are on the CPU: a tensor that was made inside an operation and
not asked for from Python is *loose*, and is on the device as soon as it meets another one that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda import collectives, memory, streams
from tests.cuda.memory import Block, block_of, place

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_native_device = torch.Tensor.device.__get__  # type: ignore[attr-defined]

#: operations that make memory and leave it as it is
_UNTOUCHED = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided"}
#: whose result, or its size, is known on the host
_READ_BY_HOST = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "unique_dim", "masked_select",
                 "unique_consecutive", "bincount", "repeat_interleave"}  # fmt: skip
#: that may have operands on both, behind a first one on the device
_MIXES = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index"}


class Operation(NamedTuple):
    name: str
    collective: bool
    written: frozenset[int | str]  # arguments, by place and by name
    views: bool  # makes another view of an operand and touches nothing


@functools.cache
def _operation(func: Any) -> Operation:
    schema = func._schema
    namespace, name = schema.name.split("::")
    written: set[int | str] = set()
    for where, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {where, argument.name}
    aliases = any(each.alias_info is not None for each in schema.returns)
    return Operation(name, namespace == "c10d", frozenset(written), aliases and not written)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of an argument: itself, or in lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


class EmulatedDevice(TorchDispatchMode):
    """The mode of the calling thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap every operation in a guard that takes as long as the operation; nothing is compiled here."""
        return False

    asked_by_host = 0  # depth of factories called from Python, which say themselves where their tensor is
    to_host = False  # a copy to the CPU is meant

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = _operation(func)
        if operation.views:
            return func(*args, **kwargs)
        if operation.collective:
            return collectives.run(func, args, kwargs)
        on_device: list[tuple[torch.Tensor, Block, bool]] = []
        elsewhere: list[tuple[torch.Tensor, bool]] = []
        for key, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, (torch.Tensor, list, tuple)):
                writes = key in operation.written
                for tensor in (value,) if isinstance(value, torch.Tensor) else tensors_in(value):
                    block = block_of(tensor)
                    if block is None:
                        elsewhere.append((tensor, writes))
                    else:
                        on_device.append((tensor, block, writes))
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs = {**kwargs, "device": CPU}
            if wanted.type == "cuda":
                return self._made(operation, func(*args, **kwargs), on_device)
        if not on_device:
            return self._on_host(func, args, kwargs, elsewhere)
        if operation.name == "copy_" and block_of(args[0]) is None and not _is_loose(args[0]):
            return self._copied_to_host(func, args, kwargs, on_device)
        for tensor, writes in elsewhere:
            if writes or (tensor is args[0] if operation.name in _MIXES else tensor.dim()):
                on_device.append((tensor, adopt(tensor, operation.name), writes))
        out = func(*args, **kwargs)
        if self.to_host and operation.name == "_to_copy":
            memory.use(operation.name, on_device)
            streams.current().synchronize()
            return out
        out = self._made(operation, out, on_device)
        if operation.name in _READ_BY_HOST or (operation.name == "index" and _by_mask(args[1])):
            streams.current().synchronize()
        return out

    def _on_host(self, func: Any, args: Any, kwargs: Any, operands: list[Any]) -> Any:
        out = func(*args, **kwargs)
        loose = not self.asked_by_host and all(_is_loose(tensor) for tensor, _ in operands)
        for tensor in [*tensors_in(out), *(tensor for tensor, writes in operands if writes)]:
            tensor.untyped_storage().loose = loose  # type: ignore[attr-defined]
        return out

    def _copied_to_host(self, func: Any, args: Any, kwargs: Any, on_device: list[Any]) -> Any:
        out = func(*args, **kwargs)
        memory.use("copy_", on_device)
        if not kwargs.get("non_blocking", len(args) > 2 and args[2]):
            streams.current().synchronize()
        return out

    def _made(self, operation: Operation, out: Any, operands: list[Any]) -> Any:
        """Results are on the device; what was read and written is one piece of work."""
        for tensor in tensors_in(out):
            if block_of(tensor) is None:
                block = place(tensor)
                if operation.name not in _UNTOUCHED:
                    operands.append((tensor, block, True))
        if operands and operation.name not in _UNTOUCHED:
            memory.use(operation.name, operands)
        return out


def _is_loose(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "loose", False)


def adopt(tensor: torch.Tensor, what: str) -> Block:
    """A loose tensor is on the device from now on; another one cannot be."""
    if not _is_loose(tensor):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({what} in [{memory.task}])"
        )
    return place(tensor)


def _by_mask(indices: Any) -> bool:
    return any(each.dtype in (torch.bool, torch.uint8) for each in tensors_in(indices))


class _Move(torch.autograd.Function):
    """A copy on the other side; its gradient comes back to this one."""

    @staticmethod
    def forward(ctx, tensor, to_device):  # type: ignore[no-untyped-def, override]
        ctx.back = block_of(tensor) is not None
        return moved(tensor, to_device)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def, override]
        return moved(gradient, ctx.back), None


def moved(tensor: torch.Tensor, to_device: bool) -> torch.Tensor:
    """A copy, without autograd."""
    if to_device:
        return torch.ops.aten._to_copy.default(tensor.detach(), device=CUDA)
    EmulatedDevice.to_host = True
    try:
        return torch.ops.aten._to_copy.default(tensor.detach())
    finally:
        EmulatedDevice.to_host = False


# ------------------------------------------------------------------------------------------ what tensors say and do


def _is_cuda(tensor: torch.Tensor) -> bool:
    return block_of(tensor) is not None


def _device(tensor: torch.Tensor) -> torch.device:
    if tensor.layout is not torch.strided or (native := _native_device(tensor)).type != "cpu":
        return _native_device(tensor)
    return native if block_of(tensor) is None else CUDA


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``: the part that moves is ours, the rest torch's."""
    if args and isinstance(args[0], torch.Tensor):
        kwargs, args = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}, args[1:]
    elif args and (isinstance(args[0], (str, int, torch.device)) or args[0] is None) and not isinstance(args[0], bool):
        kwargs, args = {"device": args[0], **kwargs}, args[1:]
    wanted = kwargs.pop("device", None)
    here = block_of(tensor) is not None
    there = here if wanted is None else is_cuda_device(wanted)
    if there == here:
        return _native_to(tensor, CPU, *args, **kwargs)  # where it is, for C++
    made = _Move.apply(tensor, there)
    args = tuple(each for each in args if isinstance(each, torch.dtype))
    kwargs = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format") and value is not None}
    return _native_to(made, *args, **kwargs) if args or kwargs else made


_native_to = torch.Tensor.to


def is_cuda_device(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _host_reads(native: Callable[..., Any]) -> Callable[..., Any]:
    def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return native(tensor if block_of(tensor) is None else moved(tensor, False), *args, **kwargs)

    return read


def _numpy(native: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if block_of(tensor) is not None:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        return native(tensor, *args, **kwargs)

    return numpy


def _record_stream(tensor: torch.Tensor, stream: streams.Stream) -> None:
    block = block_of(tensor)
    if block is None:
        raise RuntimeError("record_stream: the tensor is not on the device")
    block.recorded.add(stream.id)


def _factory(native: Callable[..., Any]) -> Callable[..., Any]:
    """A factory called from Python: without a device its tensor is on the host for sure."""

    @functools.wraps(native)
    def make(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = CUDA
        EmulatedDevice.asked_by_host += 1
        try:
            return native(*args, **kwargs)
        finally:
            EmulatedDevice.asked_by_host -= 1

    return make


def _like(native: Callable[..., Any]) -> Callable[..., Any]:
    """A factory that makes a tensor where another one is, unless it is told a device."""

    @functools.wraps(native)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        made = native(*args, **kwargs)
        return made if device is None else made.to(device)

    return make


def _from_data(native: Callable[..., Any]) -> Callable[..., Any]:
    """``tensor`` and ``as_tensor``, which go by no dispatcher on their way to a device."""
    factory = _factory(native)

    @functools.wraps(native)
    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor) and native.__name__ == "as_tensor":
            made = data.to(kwargs.get("dtype") or (args[0] if args else None) or data.dtype)
            return made if device is None else made.to(device)
        made = factory(data, *args, **kwargs)
        made = made if device is None else made.to(device)
        return made.requires_grad_() if requires_grad else made

    return make


def _resize_storage(native: Callable[..., Any]) -> Callable[..., Any]:
    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        block: Block | None = getattr(storage, "block", None)
        if block is not None:
            block.free()
            block.num_bytes = int(size)
        made = native(storage, size)
        if block is not None:
            block.allocate()
        return made

    return resize_


_FACTORIES = ("empty", "zeros", "ones", "full", "arange", "randn", "rand", "randint", "randperm", "eye", "linspace",
              "scalar_tensor", "empty_strided", "from_numpy", "frombuffer")  # fmt: skip


def install() -> None:
    """Change torch in this process."""
    tensor: Any = torch.Tensor
    tensor.device, tensor.is_cuda = property(_device), property(_is_cuda)
    tensor.is_cpu = property(lambda self: not _is_cuda(self))
    tensor.get_device = lambda self: 0 if _is_cuda(self) else -1
    tensor.to, tensor.record_stream = _to, _record_stream
    tensor.cpu = lambda self, *args, **kwargs: _to(self, "cpu")
    tensor.cuda = lambda self, *args, **kwargs: _to(self, "cuda")
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.tolist, tensor.numpy = _host_reads(tensor.tolist), _numpy(tensor.numpy)
    torch.UntypedStorage.resize_ = _resize_storage(torch.UntypedStorage.resize_)  # type: ignore[method-assign]
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
        setattr(torch, name, _like(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full"):
        setattr(tensor, name, _like(getattr(tensor, name)))
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _from_data(getattr(torch, name)))
    _install_module()
    collectives.install()


class _Properties(NamedTuple):
    name: str = "emulated CUDA device"
    major: int = 9
    minor: int = 0
    total_memory: int = 80 << 30
    multi_processor_count: int = 132


def _install_module() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream = streams.Stream, streams.Event, streams.use
    cuda.current_stream, cuda.synchronize = streams.current, streams.synchronize
    cuda.default_stream = lambda device=None: streams.DEFAULT
    cuda._lazy_init = lambda: None
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda.is_initialized = lambda: True
    cuda.set_device = cuda.empty_cache = cuda.manual_seed_all = lambda *args: None
    cuda.get_device_properties = lambda device=None: _Properties()
    cuda.get_device_name = lambda device=None: _Properties().name
    cuda.get_device_capability = lambda device=None: (_Properties().major, _Properties().minor)
    cuda.memory_allocated = cuda.memory_reserved = lambda device=None: memory.now_bytes
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda device=None: memory.peak_bytes
    cuda.mem_get_info = lambda device=None: (_Properties().total_memory - memory.now_bytes, _Properties().total_memory)

    def reset(device: Any = None) -> None:
        memory.peak_bytes = memory.now_bytes

    cuda.reset_peak_memory_stats = reset
