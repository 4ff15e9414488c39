// The page: one picture, one request, three replies of a calibrated ONNX export.
//
// ?model=/demo-shiftdc/onnx   address of an export's onnx folder on this server
// ?dtype=fp32                 fp32, fp16, q8 or q4
// ?device=wasm                wasm or webgpu
// ?tokens=64                  longest reply

import { RawImage, env } from "@huggingface/transformers";

import { ShiftDC } from "../node/shiftdc.mjs";

const WAYS = { uncalibrated: "none", static: "static", exact: "caption" };
const LABELS = { uncalibrated: "Asking the base model", static: "Asking with the static shift", exact: "Captioning the picture and asking" };

const query = new URLSearchParams(location.search);
const option = (name, value) => query.get(name) ?? value;
const form = document.querySelector("form");
const button = form.querySelector("button");
const picture = form.querySelector(".picture");
const status = document.querySelector("[role=status]");
const progress = document.querySelector("progress");
const replies = document.querySelector(".replies");

env.allowLocalModels = true;
env.allowRemoteModels = false;
env.useBrowserCache = env.useWasmCache = false; // files are made anew under the same address
env.backends.onnx.wasm.wasmPaths = runtime(option("device", "wasm"));

form.image.addEventListener("change", showPicture);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(answer).finally(() => (button.disabled = false));
});
picture.addEventListener("dragover", () => picture.classList.add("over"));
for (const kind of ["dragleave", "drop"]) picture.addEventListener(kind, () => picture.classList.remove("over"));

const shiftdc = await busy(load);
button.disabled = false;

/** Files of ONNX Runtime beside its module; the build for WebGPU is twice as large. */
function runtime(device) {
  const name = device === "webgpu" ? "ort-wasm-simd-threaded.asyncify" : "ort-wasm-simd-threaded";
  const address = (end) => new URL(`${name}.${end}`, import.meta.resolve("onnxruntime-web/webgpu")).href;
  return { mjs: address("mjs"), wasm: address("wasm") };
}

async function load() {
  const loaded = {};
  const shiftdc = await ShiftDC.load(option("model", "/demo-shiftdc/onnx"), {
    dtype: option("dtype", "fp32"),
    device: option("device", "wasm"),
    progress_callback: ({ file, loaded: bytes, total }) => {
      if (!total) return;
      loaded[file] = bytes / total;
      const files = Object.values(loaded);
      progress.value = files.reduce((a, b) => a + b) / files.length;
    },
  });
  const grey = new RawImage(new Uint8ClampedArray(64 * 64 * 3).fill(127), 64, 64, 3);
  await shiftdc.replies(["a"], [grey], { reference: "none", max_new_tokens: 2 }); // the first run is slower
  return shiftdc;
}

async function answer() {
  const image = await RawImage.read(form.image.files[0]);
  const request = form.prompt.value.trim();
  for (const place of replies.querySelectorAll(".reply, .time")) place.textContent = "";
  for (const [done, [way, reference]] of Object.entries(WAYS).entries()) {
    progress.value = done / Object.keys(WAYS).length;
    await say(LABELS[way]);
    const start = performance.now();
    const [reply] = await shiftdc.replies([request], [image], { reference, max_new_tokens: Number(option("tokens", 64)) });
    const card = document.getElementById(way);
    card.querySelector(".reply").textContent = reply;
    card.querySelector(".time").textContent = `${((performance.now() - start) / 1000).toFixed(2)} s`;
  }
}

/** Runs one piece of work with the form closed; an error is shown, and the replies stay marked as not there. */
async function busy(work) {
  button.disabled = true;
  progress.hidden = false;
  replies.ariaBusy = "true";
  status.parentElement.classList.remove("error");
  try {
    const result = await work();
    await say("Ready");
    replies.ariaBusy = "false";
    return result;
  } catch (error) {
    status.parentElement.classList.add("error");
    await say(`${error.message ?? error}`);
    throw error;
  } finally {
    progress.hidden = true;
  }
}

/** Shows a sentence, and lets the browser paint it. */
function say(sentence) {
  status.textContent = sentence;
  return new Promise((painted) => setTimeout(painted));
}

function showPicture() {
  const [file] = form.image.files;
  picture.querySelector("img")?.remove();
  picture.querySelector("span").hidden = Boolean(file);
  if (!file) return;
  const image = new Image();
  image.alt = file.name;
  image.src = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(image.src);
  picture.append(image);
}
