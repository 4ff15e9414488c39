"""METHOD.md section 1, written down plainly: hooks on the stock model, one prompt at a time, prompts as text.

Shares no code with the package; the tests compare the two.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch


class Naive:
    """A stock LLaVA with its processor."""

    def __init__(self, model, processor, caption_prompt, text_prompt):
        self.model, self.processor = model, processor
        self.caption_prompt, self.text_prompt = caption_prompt, text_prompt
        self.layers = model.model.language_model.layers

    def ids(self, request, image=None):
        content = ([{"type": "image"}] if image is not None else []) + [{"type": "text", "text": request}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(text=text, images=image, return_tensors="pt")

    @torch.no_grad()
    def activations(self, inputs):
        """Output of every decoder layer at the last token: [layers, hidden]; NaN for layers that were skipped."""
        kept = {}

        def keep(module, args, out):
            kept[module] = self.states(out[0] if isinstance(out, tuple) else out)[0, -1].clone()

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        self.forward(inputs)
        for h in handles:
            h.remove()
        nothing = torch.full_like(next(iter(kept.values())), torch.nan)
        return torch.stack([kept.get(layer, nothing) for layer in self.layers])

    def forward(self, inputs):
        self.model(**inputs)

    #: of a layer's output, where it has several residual streams
    stream_axis = None

    def states(self, out):
        """[batch, time, numbers]: all streams side by side."""
        return out if self.stream_axis is None else out.movedim(self.stream_axis, 2).flatten(2)

    def unstated(self, states, like):
        return (
            states
            if self.stream_axis is None
            else states.unflatten(2, (like.shape[self.stream_axis], -1)).movedim(2, self.stream_axis)
        )

    def directions(self, rows):
        """Unit difference of means (Eq. 4) of the text-only counterparts, in float64."""
        means = {}
        for label in ("safe", "unsafe"):
            chosen = [r for r in rows if r["label"] == label and r["split"] == "fit"]
            means[label] = torch.stack(
                [
                    self.activations(self.ids(self.text_prompt.format(q=r["request"], caption=r["caption"]))).double()
                    for r in chosen
                ]
            ).mean(0)
        s = means["safe"] - means["unsafe"]
        return s / s.norm(dim=-1, keepdim=True)

    def caption(self, request, image, tokens):
        inputs = self.ids(self.caption_prompt.format(q=request), image)
        out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return [t for t in out.tolist() if t not in (2, 3)]

    @contextmanager
    def calibrated(self, layers, d, prompt_length, *, reference=None, amounts=None, strength=1.0, one_sided=False):
        """Subtract strength * (x.d - r) d (Eq. 7), or fixed amounts, from the last prompt token."""

        def hook_for(n, layer):
            def hook(module, args, out):
                whole = out[0] if isinstance(out, tuple) else out
                x = self.states(whole)
                if x.shape[1] < prompt_length:
                    return None  # a decode step
                x = x.clone()
                for row in range(len(x)):
                    last = x[row, prompt_length - 1].float()
                    amount = amounts[n] if amounts is not None else last @ d[layer] - reference[n]
                    if one_sided:
                        amount = amount.clamp_min(0)
                    x[row, prompt_length - 1] = (last - strength * amount * d[layer]).to(x.dtype)
                x = self.unstated(x, whole)
                return (x, *out[1:]) if isinstance(out, tuple) else x

            return hook

        handles = [self.layers[layer].register_forward_hook(hook_for(n, layer)) for n, layer in enumerate(layers)]
        try:
            yield
        finally:
            for h in handles:
                h.remove()
