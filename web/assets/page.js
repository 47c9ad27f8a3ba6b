// The page: shows what the worker tells, and tells it what is wanted.
const $ = (id) => document.getElementById(id);
const SIDE = 8, DIGITS = 10;
const dark = matchMedia("(prefers-color-scheme: dark)");
let worker = null, run = false, steps = 0, seed = 1, parameters = 0, seconds = [];
// What all workers run; those that there are, first the one that trains; how many have lent themselves to it.
let script = null, module = null, workers = [], lent = 0;
let curve = { step: [], loss: [], mean: [] };

function state(name, text) {
  $("state").className = "pill " + name;
  $("state").textContent = text || name;
}

function controls(on) {
  for (const id of ["run", "restart", "guidance", "noise", "download", "load"]) $(id).disabled = !on;
}

// Rows of digits as grey pixels, -1 is black, with a pixel between them that nothing is drawn on.
function draw(canvas, pixels, from, rows) {
  const pitch = SIDE + 1;
  canvas.width = DIGITS * pitch - 1;
  canvas.height = rows * pitch - 1;
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < rows * DIGITS * SIDE * SIDE; i++) {
    const [picture, y, x] = [Math.floor(i / (SIDE * SIDE)), Math.floor(i / SIDE) % SIDE, i % SIDE];
    const at = ((Math.floor(picture / DIGITS) * pitch + y) * canvas.width + (picture % DIGITS) * pitch + x) * 4;
    image.data.fill(Math.round((Math.max(-1, Math.min(1, pixels[from + i])) + 1) * 127.5), at, at + 3);
    image.data[at + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The curve, drawn by uPlot; made anew where light became dark.
let plot = null;
function chart() {
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  if (plot) plot.destroy();
  plot = new uPlot({
    width: $("curve").clientWidth, height: $("curve").clientHeight, legend: { show: false }, padding: [8, 8, 0, 0],
    cursor: { show: false }, scales: { x: { time: false }, y: { range: (u, min, max) => [0, Math.max(0.1, max * 1.05)] } },
    axes: [{ ...axis, size: 28, space: 60, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? t : "")) }, { ...axis, size: 40 }],
    series: [{}, { stroke: colour("--accent") + "55", width: 1, points: { show: false } }, { stroke: colour("--accent"), width: 2, points: { show: false } }],
  }, [curve.step, curve.loss, curve.mean], $("curve"));
}

let due = false;
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (plot) plot.setData([curve.step, curve.loss, curve.mean]);
  });
}

function ran(on) {
  run = on;
  $("run").textContent = on ? "Pause" : curve.step.length ? "Go on" : "Train";
}

const heard = {
  // The worker's memory is there: others join it, and when all did, it begins.
  memory({ memory, threads }) {
    while (workers.length < threads) start().postMessage({ call: "lend", module, memory });
  },
  lent() {
    lent += 1;
    if (lent === workers.length - 1) worker.postMessage({ call: "share", threads: workers.length });
  },
  ready(told) {
    ({ steps, parameters } = told);
    curve = { step: [], loss: [], mean: [] };
    seconds = [];
    $("story").replaceChildren();
    $("loss").textContent = $("at").textContent = "";
    $("progress").value = 0;
    $("numbers").textContent = `${parameters.toLocaleString("en")} weights, ${steps} steps`;
    controls(true);
    ran(false);
    state("ready");
    chart();
  },
  step({ step, loss, seconds: took }) {
    const before = curve.mean.length ? curve.mean[curve.mean.length - 1] : loss;
    // A running mean that begins quickly.
    const weight = Math.min(0.9, 1 - 1 / (curve.mean.length + 1));
    curve.step.push(step);
    curve.loss.push(loss);
    curve.mean.push(weight * before + (1 - weight) * loss);
    seconds = [...seconds.slice(-19), took];
    const mean = seconds.reduce((a, b) => a + b) / seconds.length, left = (steps - step) * mean;
    $("loss").textContent = curve.mean[curve.mean.length - 1].toFixed(3);
    const rest = step < steps ? ` · ${left > 90 ? Math.round(left / 60) + " min" : Math.round(left) + " s"} left` : "";
    $("numbers").textContent = `step ${step} of ${steps} · ${mean.toFixed(2)} s a step${rest}`;
    $("progress").value = step / steps;
    if (run) state("training");
    redraw();
  },
  samples({ pixels, mark, step, guidance }) {
    draw($("samples"), pixels, 0, pixels.length / (DIGITS * SIDE * SIDE));
    $("samples").className = "digits";
    $("at").textContent = `step ${step}, guidance ${guidance.toFixed(1)}`;
    if (mark === null) return;
    const canvas = document.createElement("canvas"), row = document.createElement("li"), name = document.createElement("span");
    canvas.className = "digits";
    draw(canvas, pixels, 0, 1);
    name.textContent = mark ? `step ${mark}` : "untrained";
    row.append(name, canvas);
    $("story").append(row);
  },
  ended() {
    ran(false);
    $("run").disabled = true;
    $("run").textContent = "Trained";
    state("finished");
  },
  weights({ bytes, step }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
    link.download = `digits-step-${step}.safetensors`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    $("told").textContent = `${link.download}, ${(bytes.byteLength / 1e6).toFixed(1)} MB`;
  },
  loaded({ name }) {
    $("told").textContent = `${name} is loaded`;
  },
  refused({ call, text }) {
    if (["init", "share", "lend"].includes(call)) return heard.failed({ text });
    $("told").textContent = text;
  },
  failed({ text }) {
    // Without one of them the others would wait for it for ever.
    for (const each of workers) each.terminate();
    ran(false);
    controls(false);
    state("failed");
    $("numbers").textContent = text;
  },
};

// The module stands in the page, packed.
async function unpacked(id) {
  if (!window.DecompressionStream || !window.WebAssembly) throw "this browser is too old for the page: it has no WebAssembly, or cannot unpack it";
  const packed = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// Memory is shared by workers where the page is alone in its process, which its server can say of it, and a file can't. More than
// eight threads would find too little in a step of the digits.
function threads(asked) {
  const one = document.body.dataset.from === "file" ? "a file may have no more, and flowtape web serves a page that may"
    : document.body.dataset.from !== "threads" ? "this flowtape was built without the module for more"
    : !window.crossOriginIsolated ? "this browser lets the page have no more" : null;
  const count = one ? 1 : Math.min(asked || navigator.hardwareConcurrency || 1, 8);
  $("threads").textContent = count > 1 ? `On ${count} threads of the CPU.` : `On one thread of the CPU${one ? ": " + one : ""}.`;
  return count;
}

function start() {
  const begun = new Worker(script);
  begun.onmessage = ({ data }) => heard[data.kind](data);
  begun.onerror = (event) => heard.failed({ text: event.message || "a worker could not be started" });
  workers.push(begun);
  return begun;
}

async function main() {
  // Settings of the recipe in the address, for tests and the curious: page.html#seed=2&optimizer.lr=0.002, and threads=2
  const given = location.hash.length > 1 ? location.hash.slice(1).split("&").map(decodeURIComponent) : [];
  const asked = given.find((setting) => /^threads=\d+$/.test(setting)), settings = given.filter((setting) => setting !== asked);
  const count = threads(asked ? Number(asked.slice(8)) : 0);
  const fetched = async (path) => {
    const answer = await fetch(path);
    if (!answer.ok) throw `${path}: ${await answer.text()}`;
    return answer;
  };
  const text = count > 1 ? await (await fetched("threads.js")).text() : $("worker").textContent;
  script = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  module = await WebAssembly.compile(count > 1 ? await (await fetched("threads.wasm")).arrayBuffer() : await unpacked("wasm"));
  worker = start();
  worker.postMessage({ call: "init", module, settings, threads: count });
}

const view = () => {
  $("scale").textContent = Number($("guidance").value).toFixed(1);
  worker.postMessage({ call: "view", guidance: Number($("guidance").value), seed });
};
$("guidance").addEventListener("input", view);
$("noise").addEventListener("click", () => {
  seed += 1;
  view();
});
$("run").addEventListener("click", () => {
  ran(!run);
  state(run ? "training" : "paused");
  worker.postMessage({ call: "run", on: run });
});
$("restart").addEventListener("click", () => {
  controls(false);
  state("", "starting over");
  worker.postMessage({ call: "restart" });
});
$("download").addEventListener("click", () => worker.postMessage({ call: "weights" }));
$("load").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  const bytes = await file.arrayBuffer();
  worker.postMessage({ call: "load", bytes, name: file.name }, [bytes]);
});
dark.addEventListener("change", chart);
chart();
new ResizeObserver(() => plot && plot.setSize({ width: $("curve").clientWidth, height: $("curve").clientHeight })).observe($("curve"));
main().catch((error) => heard.failed({ text: String(error) }));
