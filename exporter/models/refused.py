"""Model types that cannot be calibrated, and why."""

from __future__ import annotations

ENCODER = "it is an encoder-decoder, and the method is for decoders"

#: Types that transformers lists for image-text-to-text.
OF_TRANSFORMERS = {
    "blip": "it writes captions and answers no requests, and its decoder sees the image through cross-attention",
    "diffusion_gemma": "it writes a reply by denoising a block of tokens, so that no reply goes on from a prompt's last token",
    "evolla": "it answers questions about proteins and takes no images",
    "florence2": ENCODER,
    "fuyu": "its processor writes where an answer begins only into prompts with an image, so text prompts are no counterparts",
    "git": "it writes captions and short answers about an image, which is no part of its prompt's tokens",
    "got_ocr2": "its processor composes prompts of its own and takes neither a conversation nor a request without an image",
    "idefics": "its processor has no chat template and puts every image behind the whole prompt",
    "instructblipvideo": "it takes videos of four frames, and neither an image nor text alone",
    "kosmos-2": "a mask over ordinary words marks its images, no token, and a batch cannot mix them with text",
    "kosmos-2.5": "a mask marks its images, no token, and its processor takes no prompt without an image",
    "mistral4": "it reads text only; Mistral Small 4, which sees, is of type mistral3",
    "pi0": "it moves a robot and writes no text",
    "pix2struct": ENCODER,
    "pp_chart2table": "its chat template asks for the table of a chart whatever was said, and takes no prompt without an image",
    "pp_formulanet": ENCODER,
    "shieldgemma2": "it judges an image by a policy and answers no requests",
    "t5gemma2": ENCODER,
    "udop": ENCODER,
    "unlimited_ocr": "it reads pages only, its cache forgets the prompt by design, and its processor gives lists beside tensors",
    "vision-encoder-decoder": ENCODER,
}

#: Models of the paper, by model_type or name.
OF_THE_PAPER = {
    "qwen": "the original Qwen-VL is code of its own repository, which pins transformers 4.32 and imports classes that "
    "transformers 5 no longer has; take Qwen2-VL or a successor",
    "share4v": "ShareGPT4V as published is code for LLaVA's first repository; convert it to LLaVA's transformers layout",
    "minigpt4": "MiniGPT-4 is no transformers checkpoint but a research code base with weights in pickle files",
}

REFUSED = {**OF_TRANSFORMERS, **OF_THE_PAPER}
