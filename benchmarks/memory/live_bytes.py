"""Bytes of all live tensors that PyTorch operators have allocated: peak memory on the CPU, by kind."""

import weakref
from collections import Counter
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that operators have allocated, by kind.

    FSDP2 allocates and frees its gathered weights by resizing their storages, which identifies them. A storage that is
    first seen through a view was allocated outside PyTorch operators, like the copies that gloo works on: it is not
    counted.
    """

    def __init__(self):
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.bytes_by_kind = Counter()
        self.bytes_by_kind_at_peak = Counter()
        self._known: dict[int, tuple] = {}  # address of the storage -> (bytes, kind, weak reference)
        self._resize = torch.UntypedStorage.resize_

    def add(self, tensor: Tensor, kind: str = "rest", excluded: set[int] = frozenset()) -> None:
        """Count the storages of `tensor` that are neither known nor `excluded`."""
        for storage in storages(tensor):
            key = storage._cdata
            if key not in self._known and key not in excluded:
                self._known[key] = (storage.nbytes(), kind, weakref.ref(storage, partial(self._free, key)))
                self._change(kind, storage.nbytes())

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are live now."""
        self.peak_bytes = self.live_bytes
        self.bytes_by_kind_at_peak = self.bytes_by_kind.copy()

    def _free(self, key: int, _) -> None:
        size, kind, _ = self._known.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self.live_bytes += size
        self.bytes_by_kind[kind] += size
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()

    def _resize_and_count(self, storage: torch.UntypedStorage, size: int) -> None:
        self._resize(storage, size)
        if storage._cdata in self._known:
            previous_size, kind, reference = self._known[storage._cdata]
            self._known[storage._cdata] = (size, "gathered", reference)
            self._change(kind, -previous_size)
            self._change("gathered", size)

    def __enter__(self):
        torch.UntypedStorage.resize_ = lambda storage, size: self._resize_and_count(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {storage._cdata for tensor in tensors((args, kwargs)) for storage in storages(tensor)}
        for tensor in tensors(result):
            self.add(tensor, excluded=inputs)
        return result


def tensors(tree) -> list[Tensor]:
    """Return the tensors of a pytree."""
    return [leaf for leaf in tree_iter(tree) if torch.is_tensor(leaf)]


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storage of a tensor, or the storages inside a wrapper such as a DTensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [storage for value in inner if torch.is_tensor(value) for storage in storages(value)]
