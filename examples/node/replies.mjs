// Replies of a calibrated ONNX export to many questions, in each of three ways, as JSON lines; times as ratios on stderr.
//
//   node replies.mjs FOLDER QUESTIONS.jsonl [--dtype q8] [--batch 4] [--tokens 64] [--min-tokens 64] > replies.jsonl
//
// One question a line: {"image": path below the file's folder, "prompt": text}. One thread. For times, give replies one length.
import fs from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";

import { RawImage } from "@huggingface/transformers";

import { ShiftDC } from "./shiftdc.mjs";

const WAYS = { uncalibrated: "none", static: "static", exact: "caption" };
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    dtype: { type: "string", default: "fp32" },
    batch: { type: "string", default: "1" },
    tokens: { type: "string", default: "64" },
    "min-tokens": { type: "string", default: "0" },
  },
});
const [folder, file] = positionals;
if (file === undefined) {
  console.error("usage: node replies.mjs FOLDER QUESTIONS.jsonl [--dtype fp32|fp16|q8|q4] [--batch N] [--tokens N] [--min-tokens N]");
  process.exit(2);
}

const session_options = { intraOpNumThreads: 1, interOpNumThreads: 1 };
const shiftdc = await ShiftDC.load(path.resolve(folder), { dtype: values.dtype, session_options });
const questions = fs.readFileSync(file, "utf8").trim().split("\n").map((line) => JSON.parse(line));
const ratios = { static: [], exact: [] };
const batch = Number(values.batch);
const length = { max_new_tokens: Number(values.tokens), min_new_tokens: Number(values["min-tokens"]) };
await answers(questions.slice(0, batch)); // the first run is slower
for (let start = 0; start < questions.length; start += batch) {
  const { replies, seconds } = await answers(questions.slice(start, start + batch));
  for (const way in ratios) ratios[way].push(seconds[way] / seconds.uncalibrated);
  for (const reply of replies) console.log(JSON.stringify(reply));
}
const cost = Object.entries(ratios).map(([way, found]) => `${way} ${median(found).toFixed(2)}`);
console.error(`median time as a ratio to uncalibrated, ${questions.length} questions: ${cost.join(", ")}`);

async function answers(asked) {
  const images = await Promise.all(asked.map((q) => RawImage.read(path.join(path.dirname(file), q.image))));
  const requests = asked.map((q) => q.prompt);
  const replies = asked.map(() => ({}));
  const seconds = {};
  for (const [way, reference] of Object.entries(WAYS)) {
    const start = performance.now();
    const texts = await shiftdc.replies(requests, images, { reference, ...length });
    seconds[way] = (performance.now() - start) / 1000;
    texts.forEach((text, i) => (replies[i][way] = text));
  }
  return { replies, seconds };
}

function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}
