"""A model that is run layer by layer: one layer's weights in memory at a time, read once for many batches.

transformers and accelerate leave the layers on disk (accelerate's hooks know where, and read them). All batches enter a
layer while its weights are held; each batch is a thread of the model's own code, and they run by turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import bad, first_line
from harness.routing import checkpoint as checkpoints

AT_ONCE = 32  # batches for which a layer is read once; each is a thread, with its own workers for matrix products
#: oneDNN keeps code for each shape of a product: the process for 1,024, and each thread that PyTorch has for as many
#: again. The rows of experts have ever other shapes; in bfloat16 that grew by a layer at each layer. Read at the first
#: product
FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


def load(checkpoint: Path, folder: Path, device: str) -> Any:
    """The model, its layers on disk: in the checkpoint, or in ``folder`` where they had to be brought into another
    form. All else is on ``device``."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        remedy = "needs accelerate, which is not installed: pip install 'accelerate>=1.1'"
        raise bad("--by-layer", True, remedy) from None
    for name, value in FEW_SHAPES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that weights are on disk is meant
    library = checkpoints.transformers()
    try:
        config = library.AutoConfig.from_pretrained(str(checkpoint), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            empty = library.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as in checkpoints.load, which tells it better
        reason = first_line(error)
        raise bad("checkpoint", str(checkpoint), f"cannot be loaded ({reason}); give an MoE checkpoint") from None
    layers = [name for name, _ in _layers(empty)]
    places: dict[str, str] = dict.fromkeys(layers, "disk")
    for name, _ in [*empty.named_parameters(), *empty.named_buffers()]:
        if not any(name.startswith(f"{layer}.") for layer in layers):
            module = name.rpartition(".")[0]
            around = any(layer.startswith(f"{module}.") for layer in layers)
            places[name if around or not module else module] = device
    return checkpoints.load(checkpoint, device_map=places, offload_folder=str(folder), offload_buffers=True)


def run(model: nn.Module, num_batches: int, forward: Callable[[int], Any], checkpoint: Path) -> list[Any]:
    """``forward`` of every batch, which calls the model once. Its first error is raised when all have ended."""
    made = []
    for first in range(0, num_batches, AT_ONCE):
        made += _run(model, range(first, min(first + AT_ONCE, num_batches)), forward, checkpoint)
    return made


def _run(model: nn.Module, batches: range, forward: Callable[[int], Any], checkpoint: Path) -> list[Any]:
    layers = dict(_layers(model))
    turns = [_Turn(index) for index in batches]
    by_thread: dict[int, _Turn] = {}
    stopped = threading.Event()

    def enter(module: nn.Module, *_: Any) -> None:
        turn = by_thread[threading.get_ident()]
        turn.stops.put(module)
        turn.go.acquire()
        if stopped.is_set():
            raise _Stopped

    def work(turn: _Turn) -> None:
        by_thread[threading.get_ident()] = turn
        turn.go.acquire()
        try:
            if not stopped.is_set():
                turn.result = forward(turn.index)
        except BaseException as error:
            turn.error = error
        turn.stops.put(None)

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers.values()]
    names = {layer: name for name, layer in layers.items()}
    threads = [threading.Thread(target=work, args=(turn,), daemon=True) for turn in turns]
    for thread in threads:
        thread.start()
    try:
        at = {turn.next() for turn in turns}  # where all batches wait; None: at their end
        while at != {None} and not (error := _first(turns)):
            if len(at) > 1:
                raise bad("checkpoint", str(checkpoint), "not every sequence takes the same way through its layers")
            (layer,) = at
            with _held(layer):
                checkpoints.check_numbers(layer, checkpoint, f"{names[layer]}.")
                at = {turn.next() for turn in turns}
    finally:
        stopped.set()
        for turn in turns:
            turn.go.release()
        for thread in threads:
            thread.join()
        for hook in hooks:
            hook.remove()
    if error := _first(turns):
        raise error
    return [turn.result for turn in turns]


class _Stopped(Exception):
    """Ends a batch because another one failed."""


class _Turn:
    """One batch and its thread."""

    def __init__(self, index: int):
        self.index = index
        self.go = threading.Semaphore(0)
        self.stops: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.result: Any = None
        self.error: BaseException | None = None

    def next(self) -> Any:
        """Let it run into the next layer, or to its end (None)."""
        self.go.release()
        stop = self.stops.get()
        _give_back()
        return stop


def _give_back() -> None:
    """glibc keeps what each thread has freed for that thread; with many threads that would be more than a layer."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _first(turns: list[_Turn]) -> BaseException | None:
    return next((turn.error for turn in turns if turn.error and not isinstance(turn.error, _Stopped)), None)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Members of the outermost lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outer:
        for child, layer in model.get_submodule(name).named_children():
            yield f"{name}.{child}", layer


@contextlib.contextmanager
def _held(layer: nn.Module) -> Iterator[None]:
    """The layer's weights are in memory: accelerate's hooks read them now and not at each call."""
    hooks = [(module, module._hf_hook) for module in layer.modules() if hasattr(module, "_hf_hook")]
    leaves = [(module, leaf) for module, hook in hooks for leaf in getattr(hook, "hooks", [hook]) if leaf.offload]
    for module, hook in leaves:
        hook.pre_forward(module)
        hook.offload = False
    try:
        yield
    finally:
        for module, hook in leaves:
            hook.offload = True
            hook.post_forward(module, None)
