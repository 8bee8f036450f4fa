"""Counts what Triton kernels read and write, element by element, while the interpreter runs them.

    with counted_traffic() as traffic:
        token_stats(policy, ref, labels, backend="triton")
    traffic.reads(policy)        # how often each element was read, in policy's shape
    traffic.bytes_read()         # all of them, whatever was read

A byte that is loaded twice counts twice, a lane that is masked off counts nothing. Bytes are those that the kernels ask for;
that caches and whole sectors agree is for a GPU to show. What PyTorch itself reads is not seen here.

It is also a fence: an access outside the storages of the tensors that the launch was given fails before memory is touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Access:
    """The lanes of one load or store that were not masked off."""

    kernel: str
    addresses: np.ndarray  # of the first byte of each lane
    size: int  # bytes of a lane

    @property
    def bytes(self) -> int:
        return self.addresses.size * self.size


@dataclass(repr=False)
class Traffic:
    loads: list[Access] = field(default_factory=list)
    stores: list[Access] = field(default_factory=list)
    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = field(default_factory=list)
    """(kernel, grid, arguments by name) in order. Holds their tensors, so that no address is used for two of them."""

    def reads(self, tensor: Tensor, kernel: str = "") -> Tensor:
        """How often each element of the tensor was read, by the kernels whose name contains `kernel`; int64, in its shape."""
        return _per_element(tensor, [access for access in self.loads if kernel in access.kernel])

    def writes(self, tensor: Tensor, kernel: str = "") -> Tensor:
        return _per_element(tensor, [access for access in self.stores if kernel in access.kernel])

    def bytes_read(self, kernel: str = "") -> int:
        return sum(access.bytes for access in self.loads if kernel in access.kernel)

    def bytes_written(self, kernel: str = "") -> int:
        return sum(access.bytes for access in self.stores if kernel in access.kernel)

    def argument(self, name: str, kernel: str = "") -> Any:
        """The argument of that name of the last launch of such a kernel."""
        return next(args[name] for launched, _, args in reversed(self.launches) if kernel in launched and name in args)


def _per_element(tensor: Tensor, accesses: list[Access]) -> Tensor:
    storage = tensor.untyped_storage()
    per_byte = np.zeros(storage.nbytes(), dtype=np.int64)
    for access in accesses:
        first = access.addresses - storage.data_ptr()
        first = first[(first >= 0) & (first < storage.nbytes())]
        np.add.at(per_byte, first[:, None] + np.arange(access.size), 1)
    whole = storage.nbytes() // tensor.element_size() * tensor.element_size()
    per_element = torch.from_numpy(per_byte[:whole].reshape(-1, tensor.element_size()).max(axis=1))
    return per_element.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Every load and store of every kernel that runs inside."""
    from triton.runtime import interpreter

    traffic = Traffic()
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    load, store, execute = builder.create_masked_load, builder.create_masked_store, executor.__call__
    running: list[tuple[str, list[tuple[int, int]]]] = []  # (kernel, ranges of addresses that are its arguments')

    def accessed(pointers: Any, mask: Any) -> Access:
        kernel, ranges = running[-1]
        lanes, mask = np.broadcast_arrays(pointers.data, mask.data)
        access = Access(kernel, lanes[mask].astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(access.addresses.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (access.addresses >= begin) & (access.addresses + access.size <= end)
        assert inside.all(), f"{kernel} accesses {(~inside).sum()} addresses outside the tensors that it was given"
        return access

    def counting_load(self: Any, pointers: Any, mask: Any, *args: Any, **options: Any) -> Any:
        traffic.loads.append(accessed(pointers, mask))
        return load(self, pointers, mask, *args, **options)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        traffic.stores.append(accessed(pointers, mask))
        return store(self, pointers, value, mask, *args, **options)

    def counting_execute(self: Any, *args: Any, **options: Any) -> Any:
        named = dict(zip(self.arg_names, args, strict=False)) | options
        storages = [value.untyped_storage() for value in named.values() if isinstance(value, Tensor)]
        traffic.launches.append((self.fn.__name__, tuple(self.grid), named))
        running.append((self.fn.__name__, [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]))
        try:
            return execute(self, *args, **options)
        finally:
            running.pop()

    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        raise AssertionError("an atomic access: its order, and so the result's bits, would not repeat")

    with (
        mock.patch.object(builder, "create_masked_load", counting_load),  # loads without a mask arrive here too
        mock.patch.object(builder, "create_masked_store", counting_store),
        mock.patch.object(builder, "create_atomic_rmw", refuse),
        mock.patch.object(builder, "create_atomic_cas", refuse),
        mock.patch.object(executor, "__call__", counting_execute),
    ):
        yield traffic
