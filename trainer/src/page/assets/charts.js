// Curves over steps, drawn by uPlot. All show the same steps: what is zoomed in one is zoomed in all.
const charts = [];
const view = { full: [0, 1], zoom: null, smoothing: 0.8, log: false };

// A running mean that forgets, as TensorBoard's; what is missing stays missing.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function setZoom(min, max) {
  const [from, to] = view.full;
  const inside = min > from || max < to;
  view.zoom = inside && max - min >= 1 ? [Math.max(from, min), Math.min(to, max)] : inside ? view.zoom : null;
  charts.forEach((chart) => chart.zoom());
  document.dispatchEvent(new Event("zoomed"));
}

// By a factor, around a step (the middle, if none is pointed at).
function zoomBy(factor, around) {
  const [min, max] = view.zoom || view.full;
  const at = isNumber(around) ? around : (min + max) / 2;
  setZoom(at - (at - min) * factor, at + (max - at) * factor);
}

class Chart {
  // `lines` gives [{label, colour, x, y, pale, band, width}] of the runs.
  constructor({ title, hint, wide, height, unit, canLog, lines }) {
    Object.assign(this, { height: height || 220, canLog, lines, unit: unit || "" });
    this.at = el("span", { class: "at" });
    this.keys = el("div", { class: "keys" });
    this.plot = el("div", {
      class: "plot", tabindex: "0", role: "img",
      "aria-label": `${title}. Arrow keys move the cursor, plus and minus zoom, 0 shows everything.`,
      onkeydown: (event) => this.key(event), onblur: () => this.u && this.u.setCursor({ left: -10, top: -10 }),
    });
    this.plot.addEventListener("touchmove", (event) => this.touch(event), { passive: true });
    this.plot.addEventListener("touchstart", (event) => this.touch(event), { passive: true });
    this.node = el("article", { class: "card chart" + (wide ? " wide" : "") },
      el("header", {}, el("h3", {}, title), hint ? el("span", { class: "muted small" }, hint) : null, this.at), this.keys, this.plot);
    this.node.hidden = true;
    new ResizeObserver(() => this.u && this.u.setSize({ width: this.plot.clientWidth, height: this.height })).observe(this.plot);
    charts.push(this);
  }

  update(runs) {
    this.runs = runs;
    this.shown = this.lines(runs).filter((line) => line.y.some(isNumber));
    this.node.hidden = this.shown.length === 0;
    if (this.node.hidden) return;
    const data = uPlot.join(this.shown.map((line) => [line.x, line.y]));
    const shape = JSON.stringify([this.shown.map((l) => [l.label, l.colour, !!l.pale]), view.log, isDark()]);
    if (shape !== this.shape || !this.u) {
      this.shape = shape;
      if (this.u) this.u.destroy();
      this.u = new uPlot(this.options(), data, this.plot);
    } else {
      this.u.setData(data, false);
    }
    this.zoom();
    this.values();
  }

  options() {
    const log = this.canLog && view.log;
    const axis = { stroke: css("--soft"), font: "12px " + css("--sans"), ticks: { show: false }, grid: { stroke: css("--grid"), width: 1 } };
    const bands = [];
    this.shown.forEach((line, i) => line.band && bands.push({ series: [i + 1, i + 2], fill: line.colour + "26" }));
    return {
      width: Math.max(50, this.plot.clientWidth), height: this.height, padding: [10, 18, 0, 0],
      legend: { show: false }, bands,
      scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
      axes: [
        { ...axis, space: 70, size: 30, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? compactStep(t) : "")) },
        { ...axis, size: this.plot.clientWidth < 500 ? 46 : 58, gap: 8, values: (u, ticks) => ticks.map((t) => (t === null ? "" : number(t))) },
      ],
      cursor: {
        sync: { key: "steps", setSeries: false, scales: ["x", null] }, y: false, points: { size: 8, width: 2 },
        drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => setZoom(...view.full) },
      },
      series: [{}, ...this.shown.map((line) => ({
        label: line.label, stroke: line.pale ? line.colour + (isDark() ? "55" : "4d") : line.colour, spanGaps: true,
        width: line.band || line.edge ? 0 : line.pale ? 1 : 2, auto: !line.pale, points: { show: line.points === true && line.y.length < 60, size: 6 },
      }))],
      hooks: {
        setCursor: [() => this.values()],
        setSelect: [(u) => {
          const { left, width } = u.select;
          if (width < 5) return;
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          setZoom(u.posToVal(left, "x"), u.posToVal(left + width, "x"));
        }],
      },
    };
  }

  zoom() {
    if (!this.u) return;
    const [min, max] = view.zoom || view.full;
    this.u.setScale("x", { min, max });
  }

  // What the cursor points at; without one the last values.
  values() {
    if (!this.u) return;
    const idx = this.u.cursor.idx, steps = this.u.data[0];
    const pointed = isNumber(idx);
    this.at.textContent = pointed ? "step " + count(steps[idx]) : "";
    const named = this.shown.map((line, i) => [line, this.u.data[i + 1]]).filter(([line]) => !line.pale);
    this.keys.replaceChildren(...named.map(([line, values]) => {
      let at = pointed ? idx : values.length - 1;
      while (at > 0 && !isNumber(values[at])) at--;
      return el("span", {}, el("i", { style: { background: line.colour } }), el("em", { title: line.label }, line.label), el("b", {}, number(values[at]) + this.unit));
    }));
  }

  key(event) {
    const u = this.u, steps = u && u.data[0];
    if (!u || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = isNumber(u.cursor.idx) ? u.cursor.idx : null;
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (move) {
      const [min, max] = view.zoom || view.full;
      const first = steps.findIndex((s) => s >= min);
      const end = steps.length - 1 - [...steps].reverse().findIndex((s) => s <= max);
      const idx = Math.min(end, Math.max(first, at === null ? (move > 0 ? first : end) : at + move * (event.shiftKey ? 10 : 1)));
      u.setCursor({ left: u.valToPos(steps[idx], "x"), top: 5 });
    } else if (event.key === "+" || event.key === "=") zoomBy(0.5, at === null ? null : steps[at]);
    else if (event.key === "-") zoomBy(2, at === null ? null : steps[at]);
    else if (event.key === "0" || event.key === "Escape") setZoom(...view.full);
    else return;
    event.preventDefault();
  }

  touch(event) {
    const over = this.u && this.u.over.getBoundingClientRect();
    if (over) this.u.setCursor({ left: event.touches[0].clientX - over.left, top: 5 });
  }
}

const compactStep = (step) => (step >= 10000 ? compact(step).replace(" ", "") : String(step));

// A curve with what it is smoothed from behind it.
function withMean(run, label, values, tint) {
  const x = run.curves.step;
  if (view.smoothing === 0) return [{ label, colour: tint, x, y: values }];
  return [{ label: "", colour: tint, x, y: values, pale: true }, { label, colour: tint, x, y: smoothed(values, view.smoothing) }];
}
