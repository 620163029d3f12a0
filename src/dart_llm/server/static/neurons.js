// The raster of what is alive (layers x groups of neurons) with the kept share of each layer beside it.

import { alive, isDense } from "./answer.js";
import { changeColour, rampColour } from "./colour.js";
import { byId, el } from "./dom.js";
import { percent } from "./format.js";

const LEFT = 26;
const GAP = 14;
const COLOURS = ["--sunken", "--soft", "--ink"];
const BARS = 0.24; // of the width, for the kept shares

/** Draws answers on a canvas; arrow keys and the pointer read single cells. */
export class NeuronView {
  constructor(canvas, cell) {
    this.canvas = canvas;
    this.cell = cell;
    this.at = null;
    this.mask = null;
    this.before = null;
    this.layers = 0;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#read(null));
    canvas.addEventListener("blur", () => this.#read(null));
    canvas.addEventListener("keydown", (event) => this.#step(event));
  }

  /**
   * Show what is alive in this answer now, or with `changes` what its last re-mask changed.
   * Nothing is drawn where nothing is new, unless `anew`; returns whether it was.
   */
  show(answer, changes = false, anew = true) {
    const last = [this.answer, this.mask, this.before, this.layers];
    this.answer = answer;
    this.layers = answer.start?.layers ?? 0;
    this.neurons = answer.start?.neurons ?? [];
    this.mask = alive(answer);
    this.before = changes && answer.masks.length > 1 ? answer.masks.at(-2) : null;
    if (this.before) this.mask = answer.masks.at(-1);
    const now = [this.answer, this.mask, this.before, this.layers];
    if (!anew && now.every((value, i) => value === last[i])) return false;
    this.draw();
    return true;
  }

  /** What screen readers are told of the raster. */
  label(text) {
    const whole = `What is alive: ${text}`;
    if (this.canvas.getAttribute("aria-label") !== whole) this.canvas.setAttribute("aria-label", whole);
  }

  draw() {
    const width = this.canvas.clientWidth || 480;
    const row = this.layers ? Math.max(3, Math.min(9, Math.floor(250 / this.layers))) : 9;
    const height = Math.max(1, this.layers || 28) * row + 4;
    const ratio = devicePixelRatio || 1;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.place = { width, row, bars: Math.round((width - LEFT) * BARS) };
    this.place.raster = width - LEFT - GAP - this.place.bars;
    this.colours = Object.fromEntries(COLOURS.map((name) => [name, colourOf(name)]));
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    for (let layer = 0; layer < this.layers; layer++) this.#layer(pen, layer);
    if (!this.layers) this.#empty(pen);
    this.#labels(pen);
    if (this.at) this.#cursor(pen);
  }

  /** Rows without a value, before anything was answered. */
  #empty(pen) {
    const { row, raster, bars } = this.place;
    pen.fillStyle = this.colours["--sunken"];
    for (let top = 2; top < 28 * row; top += row) {
      pen.fillRect(LEFT, top, raster, row - 1);
      pen.fillRect(LEFT + raster + GAP, top, bars, row - 1);
    }
  }

  get bins() {
    return this.mask?.raster?.[0]?.length || 96;
  }

  share(layer, bin) {
    const row = this.mask?.raster?.[layer];
    return row ? row[bin] / 255 : 1;
  }

  #layer(pen, layer) {
    const { row, raster, bars } = this.place;
    const [top, thick] = [layer * row + 2, Math.max(1, row - 1)];
    const drawn = !this.mask || this.mask.raster;
    for (let bin = 0; drawn && bin < this.bins; bin++) {
      const from = Math.floor((bin * raster) / this.bins);
      pen.fillStyle = this.#colour(layer, bin);
      pen.fillRect(LEFT + from, top, Math.ceil(((bin + 1) * raster) / this.bins) - from, thick);
    }
    const kept = this.mask ? this.mask.kept_share[layer] : 1;
    const left = drawn ? LEFT + raster + GAP : LEFT;
    const room = drawn ? bars : raster + GAP + bars;
    pen.fillStyle = rampColour(0); // as in the raster: dark is removed, light is kept
    pen.fillRect(left, top, room, thick);
    pen.fillStyle = rampColour(255);
    pen.fillRect(left, top, room * kept, thick);
  }

  #colour(layer, bin) {
    if (!this.before) return rampColour(255 * this.share(layer, bin));
    return changeColour(this.change(layer, bin), this.colours["--sunken"]);
  }

  /** Share of a group that the last re-mask brought to life; less than 0: that it let go. */
  change(layer, bin) {
    return this.before ? this.share(layer, bin) - this.before.raster[layer][bin] / 255 : 0;
  }

  #labels(pen) {
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = this.colours["--soft"];
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(this.layers / 6 / 5) * 5);
    for (let layer = 0; layer < this.layers; layer += every) {
      pen.fillText(String(layer), LEFT - 6, layer * this.place.row + this.place.row / 2 + 2);
    }
  }

  #cursor(pen) {
    const { row, raster } = this.place;
    const width = raster / this.bins;
    pen.strokeStyle = this.colours["--ink"];
    pen.lineWidth = 2;
    pen.strokeRect(LEFT + this.at.bin * width - 1, this.at.layer * row + 1, width + 2, row + 1);
  }

  #point(event) {
    const { row, raster } = this.place;
    const bin = Math.floor(((event.offsetX - LEFT) / raster) * this.bins);
    const layer = Math.floor((event.offsetY - 2) / row);
    const inside = bin >= 0 && bin < this.bins && layer >= 0 && layer < this.layers;
    this.#read(inside ? { layer, bin } : null);
  }

  #step(event) {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move || !this.layers) return;
    event.preventDefault();
    const now = this.at ?? { layer: 0, bin: -move[1] };
    const within = (value, end) => Math.min(end - 1, Math.max(0, value));
    this.#read({ layer: within(now.layer + move[0], this.layers), bin: within(now.bin + move[1], this.bins) });
  }

  #read(at) {
    this.at = at;
    this.draw();
    this.cell.textContent = "";
    if (!at) return;
    const width = this.neurons[at.layer] ?? 0;
    const [from, to] = [at.bin, at.bin + 1].map((edge) => Math.round((edge * width) / this.bins));
    const kept = percent(this.mask ? this.mask.kept_share[at.layer] : 1, 0);
    this.cell.textContent = `layer ${at.layer} (${kept} kept), neurons ${from} to ${Math.max(from, to - 1)}: ` +
      `${percent(this.share(at.layer, at.bin), 0)} of them kept` +
      (this.before ? `, ${percent(this.change(at.layer, at.bin), 0)} against the mask before` : "");
  }
}

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The raster in one sentence. */
export function summary(answer, mask) {
  if (!answer.start) return "layers from the input (top) to the output, groups of neighbouring neurons from left to right; beside them each layer\u2019s kept share; light is kept, dark removed.";
  if (isDense(answer)) return "a dense answer, every neuron runs.";
  if (!mask) return answer.tokens.length > 1 ? "every neuron runs while the text is observed." : "every neuron reads the prompt.";
  const shares = mask.kept_share;
  const [least, most] = [Math.min(...shares), Math.max(...shares)];
  return `mask ${mask.number}, in force from token ${mask.token}; layer ${shares.indexOf(least)} keeps least ` +
    `(${percent(least, 0)}), layer ${shares.indexOf(most)} most (${percent(most, 0)}).`.replaceAll(" %", "\u00a0%");
}

/** The scale below the raster: shares, or changes of them. */
export function drawRamp(changes) {
  const canvas = byId("ramp");
  canvas.width = 256;
  const pen = canvas.getContext("2d");
  for (let x = 0; x < 256; x++) {
    pen.fillStyle = changes ? changeColour((x - 128) / 256, colourOf("--sunken")) : rampColour(x);
    pen.fillRect(x, 0, 1, 8);
  }
  byId("scale-low").textContent = changes ? "went dark" : "0 % kept";
  byId("scale-high").textContent = changes ? "came alive" : "100 %";
}

/** The kept shares as a table, for those who want numbers. */
export function fillLayers(table, mask, layers) {
  const rows = Array.from({ length: layers }, (_, layer) => el("tr", {},
    el("th", { scope: "row" }, String(layer)),
    el("td", { className: "number" }, percent(mask ? mask.kept_share[layer] : 1)),
  ));
  table.tBodies[0].replaceChildren(...rows);
}
