// The samples of runs over their steps, alone or two beside each other.
const KINDS = { "": "samples", i2v: "from a first frame", frames: "frames", i2v_frames: "frames, from a first frame" };

class Pane {
  constructor(viewer) {
    this.viewer = viewer;
    this.at = { run: 0, kind: "", place: Infinity };
    this.run = el("select", { "aria-label": "Run", onchange: () => this.go({ run: Number(this.run.value) }) });
    this.kind = el("select", { "aria-label": "Kind of samples", onchange: () => this.go({ kind: this.kind.value }) });
    this.step = el("span", { class: "step", "aria-live": "polite" });
    this.slider = el("input", { type: "range", min: "0", step: "1", "aria-label": "Step of the samples", oninput: () => this.go({ place: Number(this.slider.value) }) });
    this.img = el("img", { decoding: "async", onload: () => this.size() });
    this.node = el("div", { class: "pane" },
      el("div", { class: "row" }, this.run, this.kind, this.step),
      el("div", { class: "frame" }, this.img),
      el("div", { class: "row" }, el("button", { type: "button", class: "button", "aria-label": "Earlier samples", onclick: () => this.by(-1) }, "←"),
        this.slider, el("button", { type: "button", class: "button", "aria-label": "Later samples", onclick: () => this.by(1) }, "→")));
  }

  go(change) {
    Object.assign(this.at, change);
    this.draw();
  }

  by(steps) {
    this.go({ place: Math.min(this.shown.length - 1, Math.max(0, this.place + steps)) });
  }

  // Small pictures are shown larger, without blurring their pixels.
  size() {
    const { naturalWidth: width, naturalHeight: height } = this.img;
    this.img.classList.toggle("pixels", width < 700);
    const room = Math.min(640, window.innerHeight * 0.68);
    this.img.style.width = width ? Math.round(width * Math.max(1, Math.min(3, room / height))) + "px" : "";
  }

  draw() {
    const runs = this.viewer.runs;
    const run = runs[Math.min(this.at.run, runs.length - 1)];
    const kinds = [...new Set(run.pictures.map((picture) => picture.kind))];
    const kind = kinds.includes(this.at.kind) ? this.at.kind : kinds[0];
    this.shown = run.pictures.filter((picture) => picture.kind === kind);
    const end = this.shown.length - 1;
    this.place = Math.min(this.at.place, end);
    // Who looks at the last ones sees those that come.
    this.at.place = this.place === end ? Infinity : this.place;
    options(this.run, runs.map((run, i) => [String(i), run.name]), String(runs.indexOf(run)));
    options(this.kind, kinds.map((name) => [name, KINDS[name] || name]), kind);
    this.slider.max = String(Math.max(0, end));
    this.slider.value = String(this.place);
    this.slider.disabled = end < 1;
    const picture = this.shown[this.place];
    this.step.textContent = picture ? "step " + count(picture.step) : "none yet";
    this.img.hidden = !picture;
    if (!picture) return;
    this.slider.setAttribute("aria-valuetext", "step " + picture.step);
    this.img.alt = `Samples of ${run.name} after step ${picture.step}`;
    if (this.img.getAttribute("src") !== picture.source) this.img.src = picture.source;
  }
}

// The choices of a select; it is not shown where there is no choice.
function options(select, choices, chosen) {
  const known = JSON.stringify(choices);
  if (select.dataset.choices !== known) {
    select.dataset.choices = known;
    select.replaceChildren(...choices.map(([value, text]) => el("option", { value }, text)));
  }
  select.value = chosen;
  select.hidden = choices.length < 2;
}

class Viewer {
  constructor() {
    this.panes = [new Pane(this)];
    this.side = el("button", { type: "button", class: "button", "aria-pressed": "false", onclick: () => this.compare() }, "Side by side");
    this.play = el("button", { type: "button", class: "button", "aria-pressed": "false", onclick: () => this.playing() }, "Play");
    this.two = el("div", { class: "panes" }, this.panes[0].node);
    this.prompts = el("details", { class: "prompts" });
    this.left = el("p", { class: "muted small" });
    this.node = el("section", { id: "samples" },
      el("div", { class: "head" }, el("h2", {}, "Samples"), el("div", { class: "tools" }, this.play, this.side)),
      el("div", { class: "card" }, this.two, this.left, this.prompts));
  }

  update(runs) {
    this.runs = runs.filter((run) => run.pictures.length);
    this.node.hidden = this.runs.length === 0;
    if (this.node.hidden) return;
    this.panes.forEach((pane) => pane.draw());
    const out = this.runs.reduce((sum, run) => sum + run.pictures_left_out, 0);
    this.left.textContent = out ? `${out} more in the run's folder samples/: those here are spread over the run.` : "";
    this.left.hidden = !out;
    const prompts = [...new Set(this.runs.flatMap((run) => run.environment.prompts || []))];
    const known = JSON.stringify(prompts);
    this.prompts.hidden = prompts.length === 0;
    if (this.prompts.dataset.known === known) return;
    this.prompts.dataset.known = known;
    this.prompts.replaceChildren(el("summary", {}, prompts.length === 1 ? "The prompt" : `The ${prompts.length} prompts, row by row`),
      el("ol", {}, prompts.map((prompt) => el("li", {}, prompt))));
  }

  // A second pane with the first samples, of the next run where there is one.
  compare() {
    const two = this.panes.length === 1;
    this.panes = two ? [this.panes[0], new Pane(this)] : [this.panes[0]];
    if (two) {
      const own = this.panes[0].at;
      const many = this.runs.length > 1;
      this.panes[1].at = many ? { ...own, run: (own.run + 1) % this.runs.length } : { ...own, place: Infinity };
      if (!many) own.place = 0;
    }
    this.two.classList.toggle("two", two);
    this.two.replaceChildren(...this.panes.map((pane) => pane.node));
    this.side.setAttribute("aria-pressed", String(two));
    this.panes.forEach((pane) => pane.draw());
  }

  playing() {
    const pane = this.panes[0];
    const stop = () => { clearInterval(this.timer); this.timer = null; this.play.setAttribute("aria-pressed", "false"); this.play.textContent = "Play"; };
    if (this.timer) return stop();
    if (pane.place >= pane.shown.length - 1) pane.go({ place: 0 });
    this.play.setAttribute("aria-pressed", "true");
    this.play.textContent = "Pause";
    this.timer = setInterval(() => (pane.place >= pane.shown.length - 1 ? stop() : pane.by(1)), 700);
  }
}
