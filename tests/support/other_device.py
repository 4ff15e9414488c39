"""A device beside the CPU that needs no hardware: its numbers lie in this process, its tensors refuse to mix with the CPU's.

Inside `other_device()` tensors can be made on or moved to `OTHER`, and every operation on them fails where CUDA's would for
tensors on two devices. It says nothing about a GPU's arithmetic, kernels or compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Unavailable(_DummyBackendModule):
    """Libraries that look for an accelerator, in other tests of this process, find none."""

    def is_available(self):
        return False


_NAME = "other"
_setup_privateuseone_for_python_backend(_NAME, backend_module=_Unavailable())
OTHER = torch.device(_NAME, 0)

aten = torch.ops.aten
_COPYING = (aten._to_copy.default, aten.copy_.default)
_WAITING = (aten._local_scalar_dense.default, aten.nonzero.default)
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class OtherTensor(torch.Tensor):
    """A tensor on the other device; `numbers` is the one on the CPU that holds its values."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            device=OTHER,
        )  # fmt: skip

    def __init__(self, numbers):
        self.numbers = numbers

    def __repr__(self):
        return f"OtherTensor({self.numbers})"

    def data_ptr(self):
        return self.numbers.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the other device to numpy; copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    """`operation` on the numbers; what comes out lies where CUDA would leave it."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if operation not in _COPYING:
        _check_devices(operation, args, tensors)
    place = _result_device(operation, args, kwargs, tensors)
    numbers, options = tree_map(_numbers, (args, kwargs))
    if options.get("device") is not None:
        options["device"] = "cpu"
    options.pop("pin_memory", None)
    out = operation(*numbers, **options)
    if place.type != _NAME:
        return out
    if isinstance(out, torch.Tensor) and operation._schema.is_mutable and out is numbers[0]:  # in place
        return args[0]
    return tree_map(lambda x: OtherTensor(x) if type(x) is torch.Tensor else x, out)


def _numbers(value):
    return value.numbers if isinstance(value, OtherTensor) else value


def _result_device(operation, args, kwargs, tensors):
    if operation is aten.copy_.default:
        return args[0].device
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return OTHER if any(isinstance(t, OtherTensor) for t in tensors) else torch.device("cpu")


def _check_devices(operation, args, tensors):
    """As CUDA: a number without dimensions may come from the CPU, and so may indices and masks."""
    strangers = [t for t in tensors if not isinstance(t, OtherTensor) and t.dim()]
    if not strangers or not any(isinstance(t, OtherTensor) for t in tensors):
        return
    if operation in _INDEXING and isinstance(args[0], OtherTensor) and not any(t.is_floating_point() for t in strangers):
        return
    places = ", ".join(str(t.device) for t in tensors)
    raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found them on {places}")


class _Factories(TorchDispatchMode):
    """Tensors made on the other device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class Waits(TorchDispatchMode):
    """Counts how often the CPU asks for numbers of the device, for which it would have to wait; inside `other_device()`."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fetching = operation is aten._to_copy.default and torch.device(kwargs.get("device") or OTHER).type == "cpu"
        if args and isinstance(args[0], OtherTensor) and (fetching or operation in _WAITING):
            self.count += 1
        return operation(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Functions that never reach the dispatcher, or ask it for kernels of the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            values = tree_map(_numbers, args)  # a list may hold tensors
            return function(*values, **{**kwargs, "device": None}).to(kwargs["device"])
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _indices(index):
    """Lists among them as tensors, since from a list torch makes one on the device itself."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Attention:
    """`scaled_dot_product_attention` in the shape of an operation."""

    _schema = aten.add.Tensor._schema  # of what changes nothing in place

    def __new__(cls, *args, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not (torch.is_grad_enabled() and query.requires_grad):
        return _run(_Attention, (query, key, value), options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # of numbers to add, here
        options["attn_mask"] = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, **options)[0]  # in parts, each of which has a gradient


@contextmanager
def other_device() -> Iterator[torch.device]:
    # no threads for backward passes, which the device would have to end with the process
    with torch.autograd.set_multithreading_enabled(False), _Functions(), _Factories():
        yield OTHER
