// The map of kept neurons (layers x groups of neurons), with bars for the kept share of each layer.

import { isDense, maskBefore, maskAt } from "./answer.js";
import { cellColour } from "./colour.js";
import { byId, el } from "./dom.js";
import { percent } from "./format.js";

const LEFT = 26;
const GAP = 14;
const EMPTY = 28; // rows before the first answer
const COLOURS = ["--sunken", "--soft", "--ink", "--mark"];
const BARS = 0.24; // share of the width for the bars

/**
 * Draws the mask of a token on a canvas; arrow keys and the pointer select a cell, and a click or Enter
 * pins it.  `onPin` gets the pinned cell, `{layer, bin}`, or null.
 */
export class NeuronView {
  constructor(canvas, cell, onPin = () => {}) {
    this.canvas = canvas;
    this.cell = cell;
    this.onPin = onPin;
    this.at = this.pinned = this.mask = this.before = null;
    this.layers = 0;
    canvas.addEventListener("pointermove", (event) => this.#read(this.#under(event)));
    canvas.addEventListener("pointerleave", () => this.#read(this.pinned));
    canvas.addEventListener("blur", () => this.#read(this.pinned));
    canvas.addEventListener("click", (event) => this.#pin(this.#under(event)));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /**
   * Show the mask of the token `index` (null: the newest token); with `changes`, also how it differs
   * from the previous mask.  Draws only if something changed or `anew`; returns whether it drew.
   */
  show(answer, index = null, changes = false, anew = true) {
    const last = [this.answer, this.mask, this.before, this.layers, this.everyone];
    if (answer !== this.answer) this.at = this.pinned = null;
    this.answer = answer;
    this.layers = answer.start?.layers ?? 0;
    this.neurons = answer.start?.neurons ?? [];
    this.mask = maskAt(answer, index);
    this.before = changes ? maskBefore(answer, this.mask) : null;
    this.everyone = this.layers > 0 && !this.mask && (isDense(answer) || answer.tokens.length > 1);
    const now = [this.answer, this.mask, this.before, this.layers, this.everyone];
    if (!anew && now.every((value, i) => value === last[i])) return false;
    this.draw();
    return true;
  }

  /** Describe the map for screen readers. */
  label(text) {
    const label = `Which neurons run: ${text}`;
    if (this.canvas.getAttribute("aria-label") !== label) this.canvas.setAttribute("aria-label", label);
  }

  draw() {
    const width = this.canvas.clientWidth || 480;
    const row = this.layers ? Math.max(3, Math.min(9, Math.floor(250 / this.layers))) : 8;
    const height = Math.max(1, this.layers || EMPTY) * row + 4;
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
    if (this.mask || this.everyone) for (let layer = 0; layer < this.layers; layer++) this.#layer(pen, layer);
    else this.#empty(pen);
    this.#labels(pen);
    if (this.at) this.#cursor(pen);
  }

  /** Draw empty rows, before the first mask. */
  #empty(pen) {
    const { row, raster, bars } = this.place;
    pen.fillStyle = this.colours["--sunken"];
    for (let layer = 0; layer < (this.layers || EMPTY); layer++) {
      pen.fillRect(LEFT, layer * row + 2, raster, row - 1);
      pen.fillRect(LEFT + raster + GAP, layer * row + 2, bars, row - 1);
    }
  }

  get bins() {
    return this.mask?.raster?.[0]?.length || 96;
  }

  share(layer, bin) {
    return shareIn(this.mask, layer, bin);
  }

  #layer(pen, layer) {
    const { row, raster, bars } = this.place;
    const [top, thick] = [layer * row + 2, Math.max(1, row - 1)];
    const drawn = !this.mask || this.mask.raster;
    for (let bin = 0; drawn && bin < this.bins; bin++) {
      const from = Math.floor((bin * raster) / this.bins);
      pen.fillStyle = cellColour(this.share(layer, bin), this.change(layer, bin));
      pen.fillRect(LEFT + from, top, Math.ceil(((bin + 1) * raster) / this.bins) - from, thick);
    }
    const kept = this.mask ? this.mask.kept_share[layer] : 1;
    const left = drawn ? LEFT + raster + GAP : LEFT;
    const room = drawn ? bars : raster + GAP + bars;
    pen.fillStyle = cellColour(0.12); // the bar's background, visible on every page colour
    pen.fillRect(left, top, room, thick);
    pen.fillStyle = cellColour(0.85);
    pen.fillRect(left, top, room * kept, thick);
  }

  /** Share of a group that the re-mask added; negative if it dropped neurons. */
  change(layer, bin) {
    return this.before ? this.share(layer, bin) - shareIn(this.before, layer, bin) : 0;
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
    for (const [colour, line] of [["--sunken", 5], ["--mark", 2.5]]) { // visible on light and dark cells
      pen.strokeStyle = this.colours[colour];
      pen.lineWidth = line;
      pen.strokeRect(LEFT + this.at.bin * width - 1, this.at.layer * row + 1, width + 2, row + 1);
    }
  }

  #under(event) {
    const { row, raster } = this.place;
    const bin = Math.floor(((event.offsetX - LEFT) / raster) * this.bins);
    const layer = Math.floor((event.offsetY - 2) / row);
    const inside = bin >= 0 && bin < this.bins && layer >= 0 && layer < this.layers;
    return inside ? { layer, bin } : null;
  }

  #key(event) {
    if (event.key === "Escape") return this.#pin(null);
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.#pin(this.at);
    }
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move || !this.layers) return undefined;
    event.preventDefault();
    const now = this.at ?? { layer: 0, bin: -move[1] };
    const within = (value, end) => Math.min(end - 1, Math.max(0, value));
    return this.#read({ layer: within(now.layer + move[0], this.layers), bin: within(now.bin + move[1], this.bins) });
  }

  /** Pin this cell; unpin it if it is already pinned. */
  #pin(at) {
    const same = at && this.pinned && at.layer === this.pinned.layer && at.bin === this.pinned.bin;
    this.pinned = same ? null : at;
    this.onPin(this.pinned);
    this.#read(this.pinned);
  }

  #read(at) {
    this.at = at;
    this.draw();
    this.cell.textContent = at ? this.#words(at) : "";
  }

  #words(at) {
    const width = this.neurons[at.layer] ?? 0;
    const [from, to] = [at.bin, at.bin + 1].map((edge) => Math.round((edge * width) / this.bins));
    const neurons = `layer ${at.layer}, neurons ${from} to ${Math.max(from, to - 1)}`;
    const masks = this.answer.masks.filter((mask) => mask.raster);
    if (!masks.length) return `${neurons}: ${percent(this.share(at.layer, at.bin), 0)} kept`;
    const kept = masks.map((mask) => `${percent(shareIn(mask, at.layer, at.bin), 0)} kept by mask ${mask.number}`);
    return `${neurons}: ${kept.slice(-4).join(", ")}`;
  }
}

/** The share of a group of neurons that a mask keeps; 1 without a mask. */
export function shareIn(mask, layer, bin) {
  const row = mask?.raster?.[layer];
  return row ? row[bin] / 255 : 1;
}

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A sentence about the map at the token `index` (null: the newest token). */
export function summary(answer, index = null) {
  if (!answer.start) return "layers from the input (top) to the output, groups of neighbouring neurons from left to right; dark cells are kept.";
  if (isDense(answer)) return "a dense answer: all neurons run.";
  const mask = maskAt(answer, index);
  const token = index === null ? answer.tokens.at(-1) : answer.tokens.find((item) => item.index === index);
  if (!mask) return answer.tokens.length > 1 ? "all neurons run while the text is observed." : "all neurons run on the prompt.";
  const old = token?.phase === "observe" ? "; here all neurons run, because the text is observed for the next mask" : "";
  const shares = mask.kept_share;
  const [least, most] = [Math.min(...shares), Math.max(...shares)];
  return `mask ${mask.number}, from token ${mask.token} on${old}; layer ${shares.indexOf(least)} keeps the least ` +
    `(${percent(least, 0)}), layer ${shares.indexOf(most)} the most (${percent(most, 0)}).`.replaceAll(" %", "\u00a0%");
}

/** The scale below the map. */
export function drawRamp() {
  const canvas = byId("ramp");
  canvas.width = 256;
  const pen = canvas.getContext("2d");
  for (let x = 0; x < 256; x++) {
    pen.fillStyle = cellColour(x / 255);
    pen.fillRect(x, 0, 1, 8);
  }
}

/** Fill the table of kept shares. */
export function fillLayers(table, mask, layers) {
  const rows = Array.from({ length: layers }, (_, layer) => el("tr", {},
    el("th", { scope: "row" }, String(layer)),
    el("td", { className: "number" }, percent(mask ? mask.kept_share[layer] : 1)),
  ));
  table.tBodies[0].replaceChildren(...rows);
}
