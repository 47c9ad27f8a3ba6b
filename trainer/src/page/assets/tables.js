// What stands in words and numbers: the run's status, its figures, its recipe, its data, its machine.
function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", { class: "facts" }, shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
}

function section(id, title, ...content) {
  return el("section", { id }, el("div", { class: "head" }, el("h2", {}, title)), ...content);
}

const status = (run) => el("span", { class: "pill " + run.status }, run.status);

function progress(run) {
  const share = run.steps ? Math.min(1, run.step / run.steps) : 0;
  return el("div", { class: "bar", role: "progressbar", "aria-label": "Steps done", "aria-valuemin": "0", "aria-valuemax": String(run.steps || 0), "aria-valuenow": String(run.step) },
    el("i", { style: { width: 100 * share + "%" } }));
}

function hero(run) {
  const { environment: env } = run;
  const rest = (run.steps - run.step) * recent(run.curves, "step_time");
  return el("div", { class: "hero" }, el("div", { class: "line" }, el("h1", {}, run.name), status(run)),
    el("p", { class: "muted path" }, [env.model, env.parameters && compact(env.parameters) + " trained parameters", env.samples && count(env.samples) + " samples", env.device].filter(Boolean).join("  ·  ")),
    el("div", { class: "line" }, el("span", {}, `step ${count(run.step)}`, el("span", { class: "muted" }, run.steps ? ` of ${count(run.steps)}` : "")),
      run.status === "training" && isNumber(rest) && rest > 0 ? el("span", { class: "muted" }, "about " + duration(rest) + " left") : null),
    progress(run));
}

// A small curve of at most 80 points.
function spark(values) {
  const found = values.filter(isNumber), every = Math.max(1, Math.floor(found.length / 80));
  const points = found.filter((_, i) => i % every === 0);
  if (points.length < 3) return null;
  const low = Math.min(...points), high = Math.max(...points), range = high - low || 1;
  const path = points.map((v, i) => `${i ? "L" : "M"}${((i / (points.length - 1)) * 100).toFixed(2)} ${(27 - ((v - low) / range) * 24).toFixed(2)}`).join("");
  return svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "area", d: path + "L100 30L0 30Z" }), svg("path", { d: path }));
}

function tile(label, value, unit, note, values) {
  return el("div", { class: "card tile" }, el("span", { class: "label" }, label), el("span", { class: "value" }, value, unit ? el("small", {}, unit) : null),
    el("span", { class: "note" }, note || ""), values ? spark(values) : null);
}

function best(run) {
  const v = run.validation, values = (v.ema || []).some(isNumber) ? v.ema : v.raw || [];
  const least = Math.min(...values.filter(isNumber));
  return isNumber(least) ? [last(values)[0], least, v.step[values.indexOf(least)], values] : null;
}

function tiles(run) {
  const c = run.curves, valid = best(run), [lr] = last(c.lr), [gb, unit] = memory(last(c.memory)[0]);
  const accuracy = run.figures.accuracy, seconds = run.figures.train_seconds;
  const shown = [tile("Loss", number(recent(c, "loss")), "", "mean of 100 steps", smoothed(c.loss, 0.9)),
    valid ? tile("Validation loss", number(valid[0]), "", `best ${number(valid[1])}, step ${count(valid[2])}`, valid[3]) : null,
    isNumber(accuracy) ? tile("Accuracy of samples", (100 * accuracy).toFixed(1), "%", "by nearest real ones") : null,
    tile("Speed", number(recent(c, "samples_per_sec")), "samples/s", duration(recent(c, "step_time")) + " a step", smoothed(c.samples_per_sec, 0.8)),
    tile("Gradient norm", number(recent(c, "grad_norm")), "", "before clipping", smoothed(c.grad_norm, 0.9)),
    tile("Learning rate", number(lr), "", "", c.lr),
    gb === NONE ? null : tile("Memory", gb, unit, "of tensors"),
    isNumber(seconds) ? tile("Training", duration(seconds), "", "") : null].filter(Boolean);
  const node = el("div", { class: "tiles" }, shown);
  // In rows of one length.
  node.style.setProperty("--across", String(shown.length > 6 ? Math.ceil(shown.length / 2) : shown.length));
  return node;
}

// Several runs beside each other.
function comparison(runs) {
  const columns = [["Loss", (r) => number(recent(r.curves, "loss"))], ["Validation", (r) => (best(r) ? number(best(r)[0]) : NONE)],
    ["Accuracy", (r) => (isNumber(r.figures.accuracy) ? (100 * r.figures.accuracy).toFixed(1) + " %" : NONE)],
    ["Samples/s", (r) => number(recent(r.curves, "samples_per_sec"))], ["Memory", (r) => memory(last(r.curves.memory)[0]).join(" ")],
    ["Training", (r) => duration(r.figures.train_seconds)]].filter(([, of]) => runs.some((run) => of(run).trim() !== NONE));
  return el("div", { class: "card" }, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" }, el("table", { class: "wide-table" },
    el("thead", {}, el("tr", {}, el("th", {}, "Run"), el("th", {}, "Status"), el("th", { class: "n" }, "Step"), columns.map(([name]) => el("th", { class: "n" }, name)))),
    el("tbody", {}, runs.map((run, i) => el("tr", {}, el("td", {}, el("span", { class: "dot", style: { background: colour(i) } }), run.name), el("td", {}, status(run)),
      el("td", { class: "n" }, count(run.step) + (run.steps ? " / " + count(run.steps) : "")), columns.map(([, of]) => el("td", { class: "n" }, of(run)))))))));
}

const shownValue = (value) => (value === null || value === undefined ? NONE : typeof value === "string" ? value : JSON.stringify(value));

// What each recipe says; of several runs the keys in which they differ come first.
function recipe(runs) {
  const known = new Map();
  runs.forEach((run, i) => run.settings.forEach((setting) => {
    const row = known.get(setting.key) || { key: setting.key, default: setting.default, values: runs.map(() => null), differs: false };
    row.values[i] = setting.value;
    row.differs = row.differs || setting.differs;
    known.set(setting.key, row);
  }));
  const rows = [...known.values()];
  if (!rows.length) return null;
  const apart = (row) => runs.length > 1 && new Set(row.values.map(shownValue)).size > 1;
  const table = (rows) => el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Keys of the recipe" }, el("table", { class: runs.length > 1 ? "wide-table" : "rows" },
    el("thead", {}, el("tr", {}, el("th", {}, "Key"), runs.length > 1 ? runs.map((run) => el("th", {}, run.name)) : el("th", {}, "Value"), el("th", {}, "Default"))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("td", { class: "key" }, row.key), row.values.map((value) => el("td", { class: "val" }, shownValue(value))),
      row.default === undefined || row.default === null ? el("td", { class: "was none" }, NONE) : el("td", { class: "was" }, shownValue(row.default)))))));
  const told = rows.filter(apart).concat(rows.filter((row) => row.differs && !apart(row)));
  const rest = rows.filter((row) => !told.includes(row));
  return section("recipe", "Recipe", el("div", { class: "card" },
    el("p", { class: "muted small" }, runs.length > 1 ? "What differs between the runs, then what differs from the defaults." : "What differs from the defaults."),
    table(told), rest.length ? el("details", { class: "more" }, el("summary", {}, `${rest.length} keys as they are by default`), table(rest)) : null));
}

function flat(value, name = "", rows = []) {
  if (Array.isArray(value) || value === null || typeof value !== "object") rows.push([name, value]);
  else Object.entries(value).forEach(([key, inner]) => flat(inner, name ? name + " · " + key : key, rows));
  return rows;
}

function figures(runs) {
  const rows = new Map();
  runs.forEach((run, i) => flat(run.figures).forEach(([name, value]) => {
    if (name === "run_dir" || name === "") return;
    if (!rows.has(name)) rows.set(name, runs.map(() => undefined));
    rows.get(name)[i] = value;
  }));
  if (!rows.size) return null;
  const shown = (value) => (Array.isArray(value) ? value.map((v) => (isNumber(v) ? number(v) : shownValue(v))).join("  ") : isNumber(value) ? number(value) : shownValue(value));
  return section("figures", "Figures", el("div", { class: "card" }, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Figures" }, el("table", { class: "narrow" },
    runs.length > 1 ? el("thead", {}, el("tr", {}, el("th", {}, ""), runs.map((run) => el("th", { class: "n" }, run.name)))) : null,
    el("tbody", {}, [...rows].map(([name, values]) => el("tr", {}, el("td", {}, name.replaceAll("_", " ")), values.map((value) => el("td", { class: "n" }, shown(value))))))))));
}

// [C, H, W] or [C, F, H, W].
function sizes(dims) {
  const [height, width] = dims.slice(-2);
  return `${width} × ${height}` + (dims.length > 3 ? `, ${dims[1]} frames` : "");
}

function data(runs) {
  const cards = runs.filter((run) => (run.environment.buckets || []).length).map((run) => {
    const buckets = run.environment.buckets, most = Math.max(...buckets.map((bucket) => bucket.samples)), all = run.environment.samples;
    return el("div", { class: "card" }, runs.length > 1 ? el("h3", {}, run.name) : null, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Sizes of samples" }, el("table", { class: "wide-table" },
      el("thead", {}, el("tr", {}, el("th", {}, "Size"), el("th", {}, "Shape"), el("th", { class: "n" }, "Samples"), el("th", { class: "n" }, "Share"), el("th", {}, ""))),
      el("tbody", {}, buckets.map(({ dims, samples }) => el("tr", {}, el("td", {}, sizes(dims)), el("td", {}, (dims[dims.length - 1] / dims[dims.length - 2]).toFixed(2) + " : 1"),
        el("td", { class: "n" }, count(samples)), el("td", { class: "n" }, ((100 * samples) / all).toFixed(1) + " %"),
        el("td", { style: { width: "40%" } }, el("span", { class: "share", style: { width: (100 * samples) / most + "%" } }))))))));
  });
  return cards.length ? section("data", "Data", el("div", { class: cards.length > 1 ? "grid" : "" }, cards)) : null;
}

function environment(runs) {
  const cards = runs.filter((run) => Object.keys(run.environment).length).map(({ environment: env, name, path }) => el("div", { class: "card" }, runs.length > 1 ? el("h3", {}, name) : null, facts([
    ["Run folder", path], ["Began", env.began && new Date(env.began * 1000).toLocaleString("en", { dateStyle: "long", timeStyle: "short" })],
    ["From step", env.from_step || null], ["Device", env.device], ["Device's memory", env.device_memory_bytes && memory(env.device_memory_bytes / 2 ** 30).join(" ")],
    ["Processor", env.processor], ["Threads", env.threads], ["System", env.system], ["Model", env.model],
    ["Trained parameters", env.parameters && count(env.parameters)], ["Flowtape", env.flowtape]])));
  return cards.length ? section("environment", "Environment", el("div", { class: cards.length > 1 ? "grid" : "" }, cards)) : null;
}

function notices(runs) {
  const all = runs.flatMap((run) => run.notices.map((notice) => (runs.length > 1 ? run.name + ": " : "") + notice.text));
  return all.length ? section("warnings", "Warnings", el("ul", { class: "notices" }, all.map((text) => el("li", {}, text)))) : null;
}
