// The page: shows what the worker tells, and tells it what is wanted.
const $ = (id) => document.getElementById(id);
const SIDE = 8, DIGITS = 10;
const dark = matchMedia("(prefers-color-scheme: dark)");
let worker = null, run = false, steps = 0, seed = 1, parameters = 0, seconds = [];
// What workers run, by the device on which they train. Each ends with its device; `kept` is what the next one goes on from, `next` its
// device while that is asked for.
let modules = {}, settings = [], device = "cpu", kept = null, next = null;
// All workers, first the one that trains, and how many of the others have lent themselves to it as threads.
let workers = [], lent = 0;
let curve = { step: [], loss: [], mean: [] };

function state(name, text) {
  $("state").className = "pill " + name;
  $("state").textContent = text || name;
}

function controls(on) {
  for (const id of ["run", "restart", "devices", "guidance", "noise", "download", "load"]) $(id).disabled = !on;
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
  memory({ memory }) {
    const { module, threads } = modules[device];
    while (workers.length < threads) start().postMessage({ call: "lend", module, memory });
  },
  lent() {
    lent += 1;
    if (lent === workers.length - 1) worker.postMessage({ call: "share", threads: workers.length, kept });
  },
  ready({ step, ...told }) {
    ({ steps, parameters } = told);
    const count = curve.step.filter((each) => each <= step).length;
    curve = Object.fromEntries(Object.entries(curve).map(([name, values]) => [name, values.slice(0, count)]));
    for (const row of [...$("story").children]) if (!step || Number(row.dataset.step) > step) row.remove();
    seconds = [];
    if (!step) $("loss").textContent = $("at").textContent = "";
    $("progress").value = step / steps;
    $("numbers").textContent = step ? `step ${step} of ${steps}` : `${parameters.toLocaleString("en")} weights, ${steps} steps`;
    controls(true);
    chart();
    if (step >= steps) return heard.ended();
    ran(run);
    if (run) worker.postMessage({ call: "run", on: true });
    state(run ? "training" : step ? "paused" : "ready");
  },
  kept({ bytes, step }) {
    kept = { bytes, step };
    if (next) begin(next);
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
    row.dataset.step = mark;
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
    if (["init", "share", "lend"].includes(call) || next) return heard.failed({ text });
    $("told").textContent = text;
  },
  failed({ text }) {
    if (device === "gpu") {
      begin("cpu");
      $("device").textContent = `The GPU gave up (${text}). The CPU goes on${kept ? ` from step ${kept.step}` : ""}.`;
      return;
    }
    end();
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

// The GPU that the browser gives pages, or in words why there is none to train on.
async function gpu() {
  if (!navigator.gpu) return "this browser gives pages no GPU (it has no WebGPU)";
  if (!WebAssembly.Suspending) return "this browser's WebAssembly can't wait for a GPU (it has no JSPI)";
  return (await navigator.gpu.requestAdapter().catch(() => null)) || "this browser finds no GPU that pages may use";
}

// Threads of the CPU. Workers share memory where the page is alone in its process, which its server can say of it, and a file can't. More
// than eight would find too little in a step of the digits.
function threads(asked) {
  const one = document.body.dataset.from === "file" ? "a file may have no more, and flowtape web serves a page that may"
    : document.body.dataset.from !== "threads" ? "this flowtape was built without the module for more"
    : !window.crossOriginIsolated ? "this browser lets the page have no more" : null;
  const count = one ? 1 : Math.min(asked || navigator.hardwareConcurrency || 1, 8);
  $("threads").textContent = `The CPU trains on ${count > 1 ? count + " threads" : "one thread"}${one ? ": " + one : ""}.`;
  return count;
}

// A worker of the device. One that has ended is not heard any more.
function start() {
  const begun = new Worker(modules[device].script), there = () => workers.includes(begun);
  begun.onmessage = ({ data }) => there() && heard[data.kind](data);
  begun.onerror = (event) => there() && heard.failed({ text: event.message || "a worker could not be started" });
  workers.push(begun);
  return begun;
}

// Ends all workers: threads that wait for one that broke off would wait for ever.
function end() {
  for (const each of workers) each.terminate();
  [workers, lent] = [[], 0];
}

// A worker that trains on a device: anew, or from what was kept.
function begin(on) {
  end();
  [device, next] = [on, null];
  controls(false);
  document.querySelector(`#devices input[value=${on}]`).checked = true;
  worker = start();
  const { module, threads } = modules[on];
  worker.postMessage({ call: "init", module, settings, device, kept, view: wanted(), threads });
}

// What its server has beside the page.
async function fetched(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw `${path}: ${await answer.text()}`;
  return answer;
}

async function main() {
  const script = (text) => URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  const one = { script: script($("worker").textContent), module: await WebAssembly.compile(await unpacked("wasm")), threads: 1 };
  modules = { cpu: one, gpu: one };
  // Settings of the recipe in the address, for tests and the curious: page.html#seed=2&optimizer.lr=0.002, and threads=2
  const given = location.hash.length > 1 ? location.hash.slice(1).split("&").map(decodeURIComponent) : [];
  const asked = given.find((setting) => /^threads=\d+$/.test(setting)), count = threads(asked ? Number(asked.slice(8)) : 0);
  settings = given.filter((setting) => setting !== asked);
  if (count > 1) {
    const [text, module] = [await (await fetched("threads.js")).text(), await WebAssembly.compileStreaming(fetched("threads.wasm"))];
    modules.cpu = { script: script(text), module, threads: count };
  }
  begin("cpu");
  const found = await gpu(), named = ({ info }) => (info && (info.description || [info.vendor, info.architecture].join(" ").trim())) || "its name is not told";
  $("devices").hidden = typeof found === "string";
  $("device").textContent = typeof found === "string" ? `On the CPU alone: ${found}.` : `This browser's GPU: ${named(found)}.`;
}

const wanted = () => ({ guidance: Number($("guidance").value), seed });

const view = () => {
  $("scale").textContent = Number($("guidance").value).toFixed(1);
  worker.postMessage({ call: "view", ...wanted() });
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
  ran(false);
  kept = null;
  state("", "starting over");
  worker.postMessage({ call: "restart" });
});
$("devices").addEventListener("change", (event) => {
  next = event.target.value;
  controls(false);
  state("", `moving to the ${next.toUpperCase()}`);
  worker.postMessage({ call: "keep" });
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
