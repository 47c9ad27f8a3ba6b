// Elements and numbers. What comes from a run is set as text or as an attribute, never as markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const NONE = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

// Four digits, whatever the size.
function number(value) {
  if (!isNumber(value)) return NONE;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 9999.5) return whole.format(value);
  if (size < 1e-3) return value.toExponential(2).replace("e-", "e−");
  return String(value.toPrecision(4)).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

const count = (value) => (isNumber(value) ? whole.format(value) : NONE);

function compact(value) {
  if (!isNumber(value)) return NONE;
  for (const [size, unit] of [[1e9, " B"], [1e6, " M"], [1e3, " k"]]) if (value >= size) return (value / size).toPrecision(3) + unit;
  return String(value);
}

function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 60) return seconds.toPrecision(seconds < 10 ? 2 : 3) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return minutes + " min";
  return Math.floor(minutes / 60) + " h " + String(minutes % 60).padStart(2, "0") + " min";
}

function memory(gb) {
  if (!isNumber(gb) || gb <= 0) return [NONE, ""];
  return gb < 1 ? [whole.format(gb * 1024), "MB"] : [gb.toPrecision(3), "GB"];
}

// The last value that is one, and its place.
function last(values) {
  for (let i = (values || []).length - 1; i >= 0; i--) if (isNumber(values[i])) return [values[i], i];
  return [null, -1];
}

function mean(values) {
  const found = values.filter(isNumber);
  return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
}

// The mean of what came last, over so many steps.
const recent = (curves, name, steps = 100) => mean((curves[name] || []).slice(-Math.max(1, Math.round(steps / curves.width))));

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => document.documentElement.dataset.theme === "dark";
const LIGHT = ["#4453d6", "#d4581c", "#0f8a72", "#b4307c", "#96690c", "#0b78b0", "#7b3fe4", "#5d6b7e"];
const DARK = ["#94a0ff", "#ff9a62", "#4ed3b4", "#f583c4", "#e3b84b", "#5fc4f5", "#bd9bff", "#a3b2c6"];
const colour = (i) => (isDark() ? DARK : LIGHT)[i % LIGHT.length];
// From little noise (warm) to much (cold).
const sigmaColour = (i, n) => `hsl(${Math.round(402 - (i / Math.max(1, n - 1)) * 165)} ${isDark() ? 78 : 72}% ${isDark() ? 66 : 48}%)`;
