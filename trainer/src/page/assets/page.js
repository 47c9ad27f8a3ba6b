// The page: made once, and updated where a live one gets news.
const THEMES = {
  light: '<circle cx="12" cy="12" r="4.2"/><path d="M12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6 7 7M17 17l1.4 1.4M18.4 5.6 17 7M7 17l-1.4 1.4"/>',
  dark: '<path d="M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5Z"/>',
};
const wanted = matchMedia("(prefers-color-scheme: dark)");

function theme(chosen) {
  const root = document.documentElement;
  root.dataset.theme = chosen || (wanted.matches ? "dark" : "light");
  const button = document.getElementById("theme");
  button.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true">${THEMES[root.dataset.theme]}</svg>`;
}

const perRun = (of) => (runs) => runs.flatMap((run, i) => of(run, runs.length > 1 ? run.name : null, colour(i)));
// Where a chart has many curves of one run, it is of the run that is looked at.
const detail = { run: 0 };
const detailed = (of) => (runs) => of(runs[Math.min(detail.run, runs.length - 1)]);
const range = (i, n) => `${(i / n).toFixed(1)}–${((i + 1) / n).toFixed(1)}`;

function makeCharts() {
  const made = [
    new Chart({ title: "Loss", wide: true, height: 300, canLog: true, lines: perRun((run, name, tint) => {
      const lines = withMean(run, name || "loss", run.curves.loss, tint);
      // Where a point is of several steps: from the least to the greatest.
      if (run.curves.width > 1) {
        const edge = (y, band) => ({ label: "", colour: tint, x: run.curves.step, y, pale: true, band, edge: true });
        lines.unshift(edge(run.curves.loss_max, true), edge(run.curves.loss_min, false));
      }
      return lines;
    }) }),
    new Chart({ title: "Loss by noise level", hint: "σ of the samples", canLog: true, wide: true, height: 260, lines: detailed((run) => run.curves.sigma.map((y, i, all) => (
      { label: range(i, all.length), colour: sigmaColour(i, all.length), x: run.curves.step, y: smoothed(y, Math.max(view.smoothing, 0)) }))) }),
    new Chart({ title: "Validation loss", canLog: true, lines: perRun((run, name, tint) => [
      { label: name || "weights", colour: tint, x: run.validation.step, y: run.validation.raw, points: true },
      { label: name ? name + ", average" : "their average (EMA)", colour: name ? tint : colour(2), x: run.validation.step, y: run.validation.ema, points: true }]) }),
    new Chart({ title: "Validation by noise level", hint: "σ", canLog: true, lines: detailed((run) => (run.validation.sigma[0] || []).map((_, i, all) => (
      { label: range(i, all.length), colour: sigmaColour(i, all.length), x: run.validation.step, y: run.validation.sigma.map((bins) => bins[i]), points: true }))) }),
    new Chart({ title: "Gradient norm", hint: "before clipping", canLog: true, lines: perRun((run, name, tint) => withMean(run, name || "all", run.curves.grad_norm, tint)) }),
    new Chart({ title: "Gradient norm by part", canLog: true, lines: detailed((run) => Object.entries(run.curves.groups).map(([label, y], i) => (
      { label, colour: colour(i), x: run.curves.step, y: smoothed(y, view.smoothing) }))) }),
    new Chart({ title: "Learning rate", lines: perRun((run, name, tint) => [{ label: name || "lr", colour: tint, x: run.curves.step, y: run.curves.lr }]) }),
    new Chart({ title: "Throughput", hint: "samples/s", lines: perRun((run, name, tint) => withMean(run, name || "samples/s", run.curves.samples_per_sec, tint)) }),
    new Chart({ title: "Memory", hint: "of tensors, GB", lines: perRun((run, name, tint) => [{ label: name || "in use", colour: tint, x: run.curves.step, y: run.curves.memory.map((gb) => gb || null) }]) }),
    new Chart({ title: "Loss scale", lines: perRun((run, name, tint) => [{ label: name || "scale", colour: tint, x: run.curves.step, y: run.curves.loss_scale }]) }),
  ];
  const value = el("output", {}, view.smoothing.toFixed(2));
  const smoothing = el("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: String(view.smoothing), oninput: () => {
    view.smoothing = Number(smoothing.value);
    value.textContent = view.smoothing.toFixed(2);
    drawCharts();
  } });
  const log = el("button", { type: "button", class: "button", "aria-pressed": "false", onclick: () => {
    view.log = !view.log;
    log.setAttribute("aria-pressed", String(view.log));
    drawCharts();
  } }, "Log scale");
  const pointed = () => { const u = made[0].u; return u && isNumber(u.cursor.idx) ? u.data[0][u.cursor.idx] : null; };
  const button = (text, name, onclick) => el("button", { type: "button", "aria-label": name, title: name, onclick }, text);
  const reset = button("All steps", "Show all steps", () => setZoom(...view.full));
  const which = el("select", { "aria-label": "Run of the charts with many curves", onchange: () => { detail.run = Number(which.value); drawCharts(); } });
  document.addEventListener("zoomed", () => { reset.disabled = !view.zoom; });
  const node = el("section", { id: "curves" }, el("div", { class: "head" }, el("h2", {}, "Curves"), el("div", { class: "tools" }, which,
    el("label", { class: "control" }, "Smoothing", smoothing, value), log,
    el("span", { class: "buttons" }, button("−", "Zoom out", () => zoomBy(2, pointed())), button("+", "Zoom in", () => zoomBy(0.5, pointed())), reset))),
    el("div", { class: "grid" }, made.map((chart) => chart.node)));
  return { node, update(runs) {
    const any = runs.some((run) => run.curves.step.length);
    node.hidden = !any;
    options(which, runs.map((run, i) => [String(i), run.name]), String(Math.min(detail.run, runs.length - 1)));
    const before = view.full[1];
    view.full = [1, Math.max(2, ...runs.map((run) => run.step))];
    if (view.zoom && view.zoom[1] >= before) view.zoom[1] = Math.max(view.zoom[1], view.full[1]);
    if (any) drawCharts();
  } };
}

const shown = { runs: [] };
function drawCharts() {
  charts.forEach((chart) => chart.update(shown.runs));
}

// A part that is made anew where what it says changed.
function part(make) {
  const place = el("div");
  let known = null;
  return { node: place, update(runs, again) {
    const fresh = make(runs);
    const now = fresh ? fresh.outerHTML : "";
    if (now === known && !again) return;
    const open = place.querySelector("details[open]") !== null;
    known = now;
    place.replaceChildren(...(fresh ? [fresh] : []));
    if (open) place.querySelectorAll("details").forEach((details) => { details.open = true; });
  } };
}

function start() {
  const embedded = JSON.parse(document.getElementById("data").textContent);
  const viewer = new Viewer();
  theme(stored());
  const parts = [
    part((runs) => (runs.length > 1 ? el("div", {}, el("div", { class: "hero" }, el("h1", {}, `${runs.length} runs`)), el("div", { style: { height: "18px" } }), comparison(runs)) : el("div", {}, hero(runs[0]), tiles(runs[0])))),
    part(notices), makeCharts(), viewer, part(figures), part(recipe), part(data), part(environment),
  ];
  document.getElementById("main").append(...parts.map((one) => one.node));
  const nav = document.getElementById("nav"), foot = document.getElementById("foot");
  const update = (all, again) => {
    shown.runs = all.runs;
    parts.forEach((one) => one.update(all.runs, again));
    const sections = [...document.querySelectorAll("main section")].filter((one) => !one.hidden);
    nav.replaceChildren(...sections.map((one) => el("a", { href: "#" + one.id }, one.querySelector("h2").textContent)));
  };
  const empty = embedded.runs.every((run) => run.curves.step.length === 0);
  update(embedded, false);
  if (empty && !embedded.live) document.getElementById("curves").after(el("p", { class: "empty" }, "No step is done yet."));
  foot.append(el("span", {}, "Flowtape " + embedded.version), el("span", {}, embedded.live ? "live, from this machine alone" : "everything is in this file"), el("span", {}, "Curves by uPlot"));
  const redraw = (chosen) => { theme(chosen); update({ runs: shown.runs }, true); };
  document.getElementById("theme").addEventListener("click", () => {
    const chosen = isDark() ? "light" : "dark";
    try { localStorage.setItem("flowtape-theme", chosen); } catch (e) { /* a file may not keep anything */ }
    redraw(chosen);
  });
  wanted.addEventListener("change", () => redraw(stored()));
  if (embedded.live) poll(update);
}

function stored() {
  try { return localStorage.getItem("flowtape-theme"); } catch (e) { return null; }
}

// Asks for news, less often where nobody looks or nothing answers.
async function poll(update) {
  let wait = 2000, tag = null;
  for (;;) {
    await new Promise((done) => setTimeout(done, document.hidden ? 10000 : wait));
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        update(await answer.json(), false);
      }
      wait = 2000;
      document.body.dataset.away = "";
    } catch (e) {
      wait = Math.min(30000, wait * 1.5);
      document.body.dataset.away = "away";
    }
  }
}

start();
