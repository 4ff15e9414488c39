"""Hooks on layers that are gone afterwards, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from exporter.modeling.modeling_shiftdc import as_output, token_states

#: (number of the layer, its output [batch, time, hidden]) -> what takes the output's place; None leaves it.
Hook = Callable[[int, torch.Tensor], torch.Tensor | None]


@contextmanager
def hooked(layers: Sequence[nn.Module], hook: Hook, stream_axis: int | None = None) -> Iterator[None]:
    """`hook` sees, and may replace, what each of `layers` puts out; it runs after the hooks that are there already.

    stream_axis: of the model's traits.
    """
    handles = [layer.register_forward_hook(_of_layer(number, hook, stream_axis)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_layer(number: int, hook: Hook, stream_axis: int | None) -> Callable[..., Any]:
    def see(module: nn.Module, args: object, output: Any) -> Any:
        """Some layers put out a tuple, of which the first is the hidden state."""
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hook(number, token_states(hidden, stream_axis))
        if changed is None:
            return None
        changed = as_output(changed, hidden, stream_axis)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return see
