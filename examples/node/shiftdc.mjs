// Replies of a calibrated ONNX export with transformers.js, in node and in the browser.
//
// The decoder graph corrects prompts that hold an image. It takes positions from the attention mask, and reads in the first
// forward's `position_ids` how to correct:
//   ordinary positions              by the mean shift baked at export (what a call without position_ids gets)
//   [-1, targets], one row each     towards targets: the `shiftdc_reference` that a text-only prompt's forward returns
//   [-2, amounts]                   by amounts
//   [-3]                            not at all
// qwen2_vl and qwen2_5_vl need positions there, which transformers.js makes: their graphs correct by the mean shift only.

import { AutoModelForImageTextToText, AutoProcessor, Tensor, full } from "@huggingface/transformers";

const AMOUNTS = -2n;
const OFF = -3n;

export class ShiftDC {
  /** `folder`: an export's onnx folder or its URL path. Options go to transformers.js: dtype, device, progress_callback. */
  static async load(folder, options = {}) {
    const processor = await AutoProcessor.from_pretrained(folder, options);
    const model = await AutoModelForImageTextToText.from_pretrained(folder, { subfolder: "", ...options });
    return new ShiftDC(model, processor);
  }

  constructor(model, processor) {
    this.model = model;
    this.processor = processor;
    this.settings = model.config.shiftdc;
    this.wording = this.settings?.onnx?.prompts;
    if (!this.wording) throw new Error("config.json has no shiftdc.onnx.prompts: give the onnx folder of an export.");
  }

  /**
   * Replies to requests, each about the image in its place.
   * `reference`: caption, text, blank, static, or none for the uncalibrated model; by default the export's own.
   * The other options go to generate().
   */
  async replies(requests, images, { reference = this.settings.reference, ...options } = {}) {
    const inputs = await this.inputs(requests, images);
    return this.generate({ ...inputs, ...(await this.correction(inputs, requests, images, reference)) }, options);
  }

  /** What replies() adds to the inputs of a batch. */
  async correction(inputs, requests, images, reference) {
    if (reference === "static") return {};
    if (this.settings.onnx.message === false) {
      throw new Error(`reference: expected static, found ${reference}; for ${this.model.config.model_type} the others run in Python only.`);
    }
    if (reference === "none") return off(inputs);
    const target = await this.target(inputs, requests, images, reference);
    return { position_ids: this.settings.rule === "precomputed" ? await this.amounts(inputs, target) : target };
  }

  /** Where the correction leads: the coordinates of the same requests with a caption in place of the image, or neither. */
  async target(inputs, requests, images, reference) {
    if (reference === "blank") return this.coordinates({ ...inputs, pixel_values: this.blank(inputs.pixel_values) });
    if (reference === "text") return this.coordinates(await this.inputs(requests));
    if (reference !== "caption") throw new Error(`reference: expected caption, text, blank, static or none, found ${reference}.`);
    const captions = await this.captions(requests, images);
    const texts = requests.map((request, i) => filled(this.wording.text_counterpart, { request, caption: captions[i] }));
    return this.coordinates(await this.inputs(texts));
  }

  /** Neutral images; where zeros are padding they have another value, and padding stays padding. */
  blank(pixels) {
    const value = this.settings.onnx.blank_pixel ?? 0;
    const size = pixels.dims.slice(-3).reduce((a, b) => a * b);
    const made = full(pixels.dims, value);
    for (let start = 0; value && start < made.data.length; start += size) {
      if (!pixels.data.subarray(start, start + size).some((x) => x)) made.data.fill(0, start, start + size);
    }
    return made;
  }

  /** The model's own captions of the images in view of the requests. */
  async captions(requests, images) {
    const inputs = await this.inputs(requests.map((request) => filled(this.wording.caption, { request })), images);
    return this.generate({ ...inputs, ...off(inputs) }, { max_new_tokens: this.settings.caption_max_new_tokens });
  }

  /** Uncorrected coordinates along the safety directions as a message: int64 [batch, layers + 1]. */
  async coordinates(inputs) {
    return (await this.model({ ...inputs, ...off(inputs) })).shiftdc_reference;
  }

  async amounts(inputs, target) {
    const found = await this.coordinates(inputs);
    const amounts = found.data.map((x, i) => (i % found.dims[1] ? x - target.data[i] : AMOUNTS));
    return new Tensor("int64", amounts, found.dims);
  }

  /** Prompts of one user turn, left-padded, with an image each or without. */
  async inputs(requests, images) {
    const prompts = requests.map((text) => {
      const content = [...(images ? [{ type: "image" }] : []), { type: "text", text }];
      return this.processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    });
    const begun = prompts[0].startsWith(this.processor.tokenizer.bos_token ?? "\0"); // by the template; once is enough
    const options = { padding: true, add_special_tokens: !begun };
    if (!images) return this.processor.tokenizer(prompts, options);
    const family = this.model.config.model_type; // their processors differ
    if (family === "llava") return this.processor(images, prompts, options);
    if (family.startsWith("qwen2") && images.length > 1) throw new Error(`${family}: its processor takes one image, found ${images.length}.`);
    const nested = family === "idefics3" || family === "smolvlm";
    return this.processor(prompts, nested ? images.map((image) => [image]) : images, options);
  }

  /** Greedy replies as texts. */
  async generate(inputs, options) {
    const ids = await this.model.generate({ ...inputs, do_sample: false, ...options });
    const written = ids.slice(null, [inputs.input_ids.dims[1], null]);
    return this.processor.batch_decode(written, { skip_special_tokens: true }).map((text) => text.trim());
  }
}

const off = (inputs) => ({ position_ids: full([inputs.input_ids.dims[0], 1], OFF) });

/** `wording` with its {slots} filled; what stands in a value is never taken for a slot. */
const filled = (wording, values) => wording.replace(/\{(\w+)\}/g, (slot, name) => values[name] ?? slot);
