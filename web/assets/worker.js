// The worker: trains step after step, and listens in between. What stands before it is wasm-bindgen's `wasm_bindgen`.
let digits = null, running = false, scheduled = false, settings = [];
let view = { guidance: 2, seed: 1 };
let last = { sampledAt: 0, cost: 0 };
const ROWS = 3, INFERENCE_STEPS = 10;

const post = (kind, value, move) => self.postMessage({ kind, ...value }, move || []);

// Pictures of the model as it is; `mark` is a step that the page keeps a row of.
function sample(mark) {
  const begun = performance.now();
  const pixels = digits.samples(ROWS, view.guidance, INFERENCE_STEPS, view.seed);
  last = { sampledAt: performance.now(), cost: performance.now() - begun };
  sampled = done;
  post("samples", { pixels, mark, step: done, guidance: view.guidance }, [pixels.buffer]);
}

// Steps done, and those when the last pictures were made.
let done = 0, sampled = 0;
const isMark = (step) => step <= 20 ? step % 10 === 0 : step < 100 ? step === 50 : step % (step < 400 ? 100 : 200) === 0;

function turn() {
  scheduled = false;
  if (!running) return;
  try {
    const { step, loss, lr, seconds } = digits.step();
    done = step;
    post("step", { step, loss, lr, seconds });
    // A tenth of the time at most goes to pictures.
    if (isMark(step) || step >= digits.steps) sample(step);
    else if (performance.now() - last.sampledAt > 10 * last.cost) sample(null);
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
  schedule();
}

// Messages are heard between steps.
function schedule() {
  if (running && !scheduled) {
    scheduled = true;
    setTimeout(turn, 0);
  }
}

function begin() {
  if (digits) digits.free();
  digits = new wasm_bindgen.Digits(settings);
  done = 0;
  post("ready", { steps: digits.steps, parameters: digits.parameters });
  sample(0);
}

const calls = {
  async init({ module, settings: given, threads }) {
    settings = given;
    const { memory } = await wasm_bindgen({ module_or_path: module });
    if (threads > 1) post("memory", { memory, threads });
    else begin();
  },
  // What the page tells when the other threads are there.
  share({ threads }) {
    wasm_bindgen.share(threads);
    begin();
  },
  // This worker is one of them: it hears nothing any more.
  async lend({ module, memory }) {
    await wasm_bindgen({ module_or_path: module, memory });
    post("lent", {});
    wasm_bindgen.lend();
  },
  run({ on }) {
    running = on;
    schedule();
    if (!on && sampled < done) sample(null);
  },
  restart() {
    running = false;
    begin();
  },
  view({ guidance, seed }) {
    view = { guidance, seed };
    sample(null);
  },
  weights() {
    const bytes = digits.weights();
    post("weights", { bytes, step: done }, [bytes.buffer]);
  },
  load({ bytes, name }) {
    try {
      digits.load_weights(new Uint8Array(bytes));
    } catch (error) {
      throw String(error).replace(/^memory/, name);
    }
    post("loaded", { name });
    sample(null);
  },
};

// One after the other: a view that is asked for while another is drawn takes the place of those before it.
let queue = [];
self.onmessage = ({ data }) => {
  if (data.call === "view") queue = queue.filter((call) => call.call !== "view");
  queue.push(data);
  setTimeout(answer, 0);
};
async function answer() {
  const data = queue.shift();
  if (!data) return;
  try {
    await calls[data.call](data);
  } catch (error) {
    post("refused", { call: data.call, text: String(error) });
  }
}
