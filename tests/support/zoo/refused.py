"""Types of image-text-to-text that cannot be calibrated, and why."""

from __future__ import annotations

ENCODER = "encoder-decoder: no decoder reads the request"
REFUSED: dict[str, str] = {
    "blip": "a captioner: its decoder sees the image through cross-attention and answers no requests",
    "git": "a captioner: an image is no part of its prompt's tokens, and it answers no requests but short questions about it",
    "evolla": "it answers questions about proteins, and takes no images",
    "florence2": ENCODER,
    "pix2struct": ENCODER,
    "pp_formulanet": ENCODER,
    "udop": ENCODER,
    "vision-encoder-decoder": ENCODER,
    "fuyu": "its processor writes where an answer begins only into prompts with an image, so text prompts are no counterparts",
    "kosmos-2": "a mask of positions over ordinary words marks its images, no token, and a batch cannot mix them with text",
    "kosmos-2.5": "a mask of positions marks its images, no token, and its processor takes no prompt without one",
    "got_ocr2": "its processor composes its own prompts: it takes neither a conversation nor a request without an image",
    "pp_chart2table": "its chat template asks for the table of a chart whatever was said; it takes no prompt without an image",
}
