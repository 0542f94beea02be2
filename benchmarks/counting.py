"""Work counted without doing it: operations, bytes and memory of anything that runs on torch's meta device."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Count:
    """What some work asks of a machine; counts of parts that run one after another add up with `+` and `*`.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add is two.
        bytes: read and written by all operations if each fetches its inputs anew and none are fused.
        kernels: operations that are not views: what a GPU launches, give or take fusing.
        peak: the most bytes of new tensors that are alive at once.
    """

    flops: int
    bytes: int
    kernels: int
    peak: int

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            max(self.peak, other.peak),
        )

    def __mul__(self, times: int) -> "Count":
        return Count(self.flops * times, self.bytes * times, self.kernels * times, self.peak)


class FlashAttention(TorchFunctionMode):
    """Attention whose table of weights is never in memory: what GPUs and processors run, but not the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
        # The only kernel of this kind with a count for every width of a head; a mask changes nothing that is counted.
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, torch.is_grad_enabled())[0]


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that hold a tensor; what is only repeated by broadcasting counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Meter(TorchDispatchMode):
    """Counts bytes, kernels and live memory of every operation under it."""

    def __init__(self):
        super().__init__()
        self.bytes = self.kernels = self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {tensor.untyped_storage() for tensor in read}
        for storage in {tensor.untyped_storage() for tensor in written} - given - set(self.known):
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        if not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")):
            self.kernels += 1
            self.bytes += sum(map(tensor_bytes, (*read, *written)))
        return result


def count(work: Callable[[], object]) -> Count:
    """Count what `work` does; its tensors must be on the meta device, where nothing is computed."""
    meter = Meter()
    with FlashAttention(), FlopCounterMode(display=False) as flops, meter:
        work()
    return Count(flops.get_total_flops(), meter.bytes, meter.kernels, meter.peak)
