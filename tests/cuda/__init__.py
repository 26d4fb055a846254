"""An emulated CUDA device for machines that have none, and what all systems do on it.

Tensors say ``cuda:0`` and hold CPU data, streams are vector clocks (``streams``), memory comes from a caching allocator
with one pool a stream (``memory``), operands on host and device do not mix (``device``), collectives refuse CPU tensors
(``collectives``). Found are races between streams, memory that is handed out again too early, mixes of devices and
collectives of CPU tensors. Not seen: numbers of CUDA's kernels, times, NCCL itself, autograd's own thread, how deep a
launch queue is.

For another script, in a process of its own (there is no way back):

    from tests.cuda import emulated

    emulated.install()                   # torch.cuda.is_available() is True from here on, in the calling thread
    with emulated.task("my check"):      # what messages call the work inside
        torch.ones(3, device="cuda") + 1
    races, reuses = emulated.hazards()   # since the last call: {text: how often}; both must be empty

Process groups are gloo's (``init_process_group("gloo")``), with NCCL's rules. The mode is of one thread: whoever works
in another thread calls ``emulated.enter()`` there first.
"""
