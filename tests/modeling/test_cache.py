"""The cache with room: what transformers' own keeps, without copying it."""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from exporter.modeling.image_prefix_shiftdc import SPARE, PreallocatedLayer, copied


def states(tokens, batch=2):
    return torch.randn(batch, 3, tokens, 4), torch.randn(batch, 3, tokens, 4)


def both(run):
    """What `run` does to a layer of either kind; they must hold the same afterwards."""
    layers = PreallocatedLayer(), DynamicLayer()
    for layer in layers:
        torch.manual_seed(0)
        run(layer)
    for name in ("keys", "values"):
        assert torch.equal(getattr(layers[0], name), getattr(layers[1], name))
    assert layers[0].get_seq_length() == layers[1].get_seq_length()
    return layers[0]


def test_tokens_added_and_cut_off():
    def run(layer):
        for tokens, cut in ((5, 0), (1, 0), (1, -2), (3, -8), (4, 0), (SPARE, -7), (SPARE + 1, 0), (1, 0)):
            layer.update(*states(tokens))
            layer.crop(cut)

    both(run)


def test_rows_repeated_reordered_and_left_out():
    def run(layer):
        layer.update(*states(4))
        layer.batch_repeat_interleave(2)
        layer.update(*states(1, batch=4))
        layer.reorder_cache(torch.tensor([3, 1, 1, 0]))
        layer.update(*states(1, batch=4))
        layer.batch_select_indices(torch.tensor([0, 2]))
        layer.update(*states(2))

    both(run)


def test_a_copy_and_a_reset_have_tokens_of_their_own():
    def run(layer):
        layer.update(*states(4))
        other = copy.deepcopy(layer)
        other.update(*states(3))
        layer.update(*states(3))
        assert not torch.equal(other.keys, layer.keys)
        other.reset()
        assert other.get_seq_length() == 0
        other.update(*states(2))

    both(run)


def test_what_was_written_in_inference_mode_goes_on_outside_of_it():
    def run(layer):
        with torch.inference_mode():
            layer.update(*states(4))
        with torch.no_grad():
            layer.update(*states(1))

    both(run)


def test_a_token_is_written_behind_the_others():
    layer = PreallocatedLayer()
    layer.update(*states(4))
    place = layer.keys.data_ptr()
    for _ in range(SPARE):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == place
    layer.update(*states(1))
    assert layer.keys.data_ptr() != place


def test_a_copy_writes_elsewhere():
    whole = DynamicCache()
    whole.layers = [PreallocatedLayer(), PreallocatedLayer()]
    for layer in whole.layers[:1]:
        layer.update(*states(5))
        layer.crop(-1)  # room behind the tokens
    kept = whole.layers[0].keys.clone()
    one, two = copied(whole), copied(whole)
    new = [states(1), states(1)]
    found = [c.layers[0].update(*n)[0] for c, n in zip((one, two), new, strict=True)]
    for keys, n in zip(found, new, strict=True):
        assert torch.equal(keys, torch.cat([kept, n[0]], dim=2))
    assert torch.equal(whole.layers[0].keys, kept) and whole.get_seq_length() == 4
    assert one.layers[1].get_seq_length() == 0
