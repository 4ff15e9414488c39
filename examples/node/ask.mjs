// Ask a calibrated ONNX export about a picture: node ask.mjs FOLDER IMAGE "REQUEST" [--dtype q8] [--tokens 64]
import path from "node:path";
import { parseArgs } from "node:util";

import { RawImage } from "@huggingface/transformers";

import { ShiftDC } from "./shiftdc.mjs";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { dtype: { type: "string", default: "fp32" }, tokens: { type: "string", default: "64" } },
});
const [folder, file, request] = positionals;
if (request === undefined) {
  console.error('usage: node ask.mjs FOLDER IMAGE "REQUEST" [--dtype fp32|fp16|q8|q4] [--tokens 64]');
  process.exit(2);
}

const shiftdc = await ShiftDC.load(path.resolve(folder), { dtype: values.dtype });
const image = await RawImage.read(file);
for (const [name, reference] of [["calibrated", undefined], ["static", "static"], ["uncalibrated", "none"]]) {
  const start = performance.now();
  const [reply] = await shiftdc.replies([request], [image], { reference, max_new_tokens: Number(values.tokens) });
  console.log(`${name.padEnd(12)} ${((performance.now() - start) / 1000).toFixed(2)} s  ${reply}`);
}
