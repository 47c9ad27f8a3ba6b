// The worker: trains step after step on one device, and listens in between. What stands before it is wasm-bindgen's `wasm_bindgen`.
let digits = null, gpu = null, device = "cpu", running = false, settings = [];
let view = { guidance: 2, seed: 1 };
let last = { sampledAt: 0, cost: 0 };
const ROWS = 3, INFERENCE_STEPS = 10;

// The module can be suspended while it waits for a GPU (JSPI). Where WebAssembly can't be, the page asks for none.
WebAssembly.Suspending ??= function (call) { return call; };
WebAssembly.JSTag ??= new WebAssembly.Tag({ parameters: ["externref"] });

const post = (kind, value, move) => self.postMessage({ kind, ...value }, move || []);

// Pictures of the model as it is; `mark` is a step that the page keeps a row of.
async function sample(mark) {
  const begun = performance.now();
  const pixels = await digits.samples(ROWS, view.guidance, INFERENCE_STEPS, view.seed);
  last = { sampledAt: performance.now(), cost: performance.now() - begun };
  sampled = done;
  post("samples", { pixels, mark, step: done, guidance: view.guidance }, [pixels.buffer]);
}

// All that another worker needs to go on.
async function keep() {
  const bytes = await digits.checkpoint();
  post("kept", { bytes, step: done }, [bytes.buffer]);
}

// Steps done, and those when the last pictures were made.
let done = 0, sampled = 0;
const isMark = (step) => step <= 20 ? step % 10 === 0 : step < 100 ? step === 50 : step % (step < 400 ? 100 : 200) === 0;

async function turn() {
  try {
    const { step, loss, lr, seconds } = await digits.step();
    done = step;
    post("step", { step, loss, lr, seconds });
    // A tenth of the time at most goes to pictures.
    const mark = isMark(step) || step >= digits.steps;
    if (mark) await sample(step);
    else if (performance.now() - last.sampledAt > 10 * last.cost) await sample(null);
    // A GPU may be lost.
    if (mark && device === "gpu") await keep();
    if (step >= digits.steps) {
      running = false;
      post("ended", {});
    }
  } catch (error) {
    running = false;
    // A trap leaves nothing to go on with; what has a reason is a text.
    const trap = error instanceof WebAssembly.RuntimeError;
    post("failed", { text: trap ? `the trainer broke off in a step (${error.message}): reload the page to begin anew` : String(error) });
  }
}

// A new model, or one that goes on from what another worker kept.
async function begin(kept) {
  if (digits) digits.free();
  digits = null;
  if (device === "gpu") digits = await wasm_bindgen.GpuDigits.open(gpu ??= await wasm_bindgen.Gpu.open(), settings);
  else digits = new wasm_bindgen.Digits(settings);
  if (kept) await digits.restore(kept.bytes);
  done = kept ? kept.step : 0;
  post("ready", { steps: digits.steps, parameters: digits.parameters, step: done });
  await sample(done ? null : 0);
}

const calls = {
  async init(given) {
    ({ settings, device, view } = given);
    const { memory } = await wasm_bindgen({ module_or_path: given.module });
    if (given.threads > 1) post("memory", { memory });
    else await begin(given.kept);
  },
  // What the page tells when the other threads are there.
  async share({ threads, kept }) {
    wasm_bindgen.share(threads);
    await begin(kept);
  },
  // This worker is one of them: it hears nothing any more.
  async lend({ module, memory }) {
    await wasm_bindgen({ module_or_path: module, memory });
    post("lent", {});
    wasm_bindgen.lend();
  },
  async run({ on }) {
    running = on;
    if (!on && sampled < done) await sample(null);
  },
  async restart() {
    running = false;
    await begin(null);
  },
  keep,
  async view({ guidance, seed }) {
    view = { guidance, seed };
    await sample(null);
  },
  async weights() {
    const bytes = await digits.weights();
    post("weights", { bytes, step: done }, [bytes.buffer]);
  },
  async load({ bytes, name }) {
    try {
      await digits.load_weights(new Uint8Array(bytes));
    } catch (error) {
      throw String(error).replace(/^memory/, name);
    }
    post("loaded", { name });
    await sample(null);
    if (device === "gpu") await keep();
  },
};

// One after the other, since messages come while a GPU is waited for: what is asked for, else a step. A view that is asked for while
// another is drawn takes the place of those before it.
let queue = [], busy = false;
self.onmessage = ({ data }) => {
  if (data.call === "view") queue = queue.filter((call) => call.call !== "view");
  queue.push(data);
  setTimeout(work, 0);
};
async function work() {
  if (busy) return;
  busy = true;
  while (queue.length || running) {
    await (queue.length ? answer(queue.shift()) : turn());
    // Messages are heard in between.
    await new Promise((heard) => setTimeout(heard, 0));
  }
  busy = false;
}
async function answer(data) {
  try {
    await calls[data.call](data);
  } catch (error) {
    post("refused", { call: data.call, text: String(error) });
  }
}
