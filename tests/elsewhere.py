"""Tensors that say they are on a GPU, while their numbers are on the CPU: what mixes devices raises as it would there, without a GPU.

Importing this takes torch's one place for a foreign device ("elsewhere") in this process, so `test_elsewhere.py` runs its checks in one of
their own. Inside of `Elsewhere()` everything works: autograd, modules, optimisers. It does not know which kernels CUDA lacks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"


class _Backend:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(f"{NAME}:0")
_WRITES = ("aten::copy_", "aten::_foreach_copy_", "aten::set_")
_ACROSS = ("aten::_to_copy", *_WRITES)
"""Operators that take tensors of two devices."""


class There(torch.Tensor):
    """A tensor whose numbers are `inner`, and whose device is another."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(torch.tensor(key) if isinstance(key, list) else key)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("a tensor on a GPU has no numpy array: copy it to the CPU first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __reduce_ex__(self, *_: Any) -> Any:
        raise TypeError("a tensor on a GPU would be pickled")


class Elsewhere(TorchDispatchMode):
    """What is made for this device is made of `There`. Backward runs in the same thread."""

    def __enter__(self) -> Any:
        torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = func._schema.name, kwargs.get("device")
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if name == "aten::_local_scalar_dense":
        return _inner(args[0]).item()
    there = any(isinstance(one, There) for one in tensors)
    if there and name not in _ACROSS:
        _check(name, tensors)
    if device is not None:
        there = torch.device(device).type == NAME
    if name in _WRITES:
        there = isinstance(tree_leaves(args[0])[0], There)
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name} on a GPU needs a generator there")
    plain = {key: torch.device("cpu") if key == "device" and there else tree_map(_inner, value) for key, value in kwargs.items()}
    inner = tree_map(_inner, args)
    made = _product(*inner) if name == "aten::mm" and len(inner) > 2 else func(*inner, **plain)
    if not there:
        return made
    if name == "aten::_to_copy" and made is inner[0]:
        made = made.clone()
    wrapped = tree_map(lambda one: There(one) if isinstance(one, Tensor) and not isinstance(one, There) else one, made)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, There) else one


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.mm` with `out_dtype`, which the CPU does not have."""
    return left.to(dtype) @ right.to(dtype)


def _check(name: str, tensors: list[Tensor]) -> None:
    """CPU tensors may go with others as numbers (but not into `cat` and `stack`), and as indices."""
    index = name.startswith(("aten::index_put", "aten::_index_put")) or name == "aten::index"
    for one in tensors:
        number = not one.dim() and name not in ("aten::cat", "aten::stack")
        if not (isinstance(one, There) or number or index):
            raise RuntimeError(f"{name} got tensors of two devices: {[(one.device.type, list(one.shape)) for one in tensors]}")
