// Plot of the drift detector: similarity of each window of tokens, threshold, re-masks, dense ranges.

import { rebuilt, spanOf } from "./answer.js";
import { shape } from "./dom.js";
import { counted } from "./format.js";

const HEIGHT = 168;
const EDGE = { left: 38, right: 66, top: 24, bottom: 30 };

/**
 * Draw the detector's checks of an answer, or of a results folder, into `box`.  The dot of check
 * number N has `data-check="N"`.
 */
export function drawDrift(box, answer) {
  const width = Math.max(260, Math.round(box.clientWidth || 480));
  const series = bySeries(answer.checks);
  const scale = scales(width, answer, series);
  const id = `hatch-of-${box.id || "run"}`; // the page may show two plots
  const parts = [hatch(id), ...bands(answer, scale, id), ...axes(scale, width)];
  const places = new Map(answer.checks.map((check, place) => [check, place]));
  for (const checks of series) parts.push(...lines(checks, answer, scale, series.length === 1 ? places : null));
  parts.push(...marks(answer, scale));
  const plot = shape("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": inWords(answer, series),
  }, ...parts.filter(Boolean));
  box.replaceChildren(plot);
}

const usable = (check) => check.threshold != null || check.similarity > 0;

function bySeries(checks) {
  const series = new Map();
  for (const check of checks.filter(usable)) {
    const name = `${check.sequence} ${check.row} ${check.layer}`;
    series.set(name, [...(series.get(name) ?? []), check]);
  }
  return [...series.values()].slice(0, 12);
}

function scales(width, answer, series) {
  const all = series.flat();
  const values = all.flatMap((check) => [check.similarity, check.threshold]).filter((v) => v != null);
  const last = Math.max(answer.tokens.at(-1)?.index ?? 0, all.at(-1)?.step ?? 0, 1);
  const end = Math.max(64, Math.ceil(last / 32) * 32);
  const low = Math.min(0.7, ...values);
  const [bottom, top] = [Math.floor(10 * low) / 10, 1]; // the same for all answers, unless a value is lower
  return {
    end, bottom, top,
    x: (step) => EDGE.left + (step / end) * (width - EDGE.left - EDGE.right),
    y: (value) => HEIGHT - EDGE.bottom - ((value - bottom) / (top - bottom)) * (HEIGHT - EDGE.top - EDGE.bottom),
    empty: !values.length,
  };
}

/** Diagonal lines over dense ranges, so that they are visible without colours. */
function hatch(id) {
  const line = shape("path", { d: "M0 6L6 0", class: "remask-line", opacity: 0.35 });
  const pattern = { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" };
  return shape("defs", {}, shape("pattern", pattern, line));
}

function bands(answer, { x }, id) {
  const ranges = [];
  for (const token of answer.tokens) {
    if (token.phase !== "observe") continue;
    const last = ranges.at(-1);
    if (last && last.to === token.index - 1) last.to = token.index;
    else ranges.push({ from: token.index, to: token.index });
  }
  const box = (band, extra) => shape("rect", {
    x: x(band.from - 1), y: EDGE.top, width: x(band.to) - x(band.from - 1),
    height: HEIGHT - EDGE.top - EDGE.bottom, ...extra,
  });
  return ranges.flatMap((band) => [
    box(band, { class: "dense-band" }),
    box(band, { fill: `url(#${id})` }),
    x(band.to) - x(band.from) > 40 &&
      label((x(band.from) + x(band.to)) / 2, HEIGHT - EDGE.bottom - 6, "dense", "of-band", "middle"),
  ]);
}

const label = (x, y, text, name = "", anchor = "start") =>
  shape("text", { x, y, class: name, "text-anchor": anchor }, text);

function axes(scale, width) {
  const floor = HEIGHT - EDGE.bottom;
  const parts = [shape("path", { d: `M${EDGE.left} ${floor}H${width - EDGE.right}`, class: "axis" })];
  const step = scale.end > 256 ? 128 : scale.end > 128 ? 64 : 32;
  for (let tick = 0; tick <= scale.end; tick += step) {
    parts.push(label(scale.x(tick), floor + 15, String(tick), "", "middle"));
  }
  parts.push(label((EDGE.left + width - EDGE.right) / 2, floor + 28, "tokens", "", "middle"));
  if (scale.empty) return parts;
  const [first, gap] = ticks(scale.bottom, scale.top);
  for (let value = first; value <= scale.top; value += gap) {
    parts.push(shape("path", { d: `M${EDGE.left} ${scale.y(value)}H${width - EDGE.right}`, class: "axis" }));
    parts.push(label(EDGE.left - 6, scale.y(value) + 4, value.toFixed(2), "", "end"));
  }
  return parts;
}

/** Round values for ticks: the first inside the range, and the distance to the next. */
function ticks(bottom, top) {
  const gap = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25].find((step) => (top - bottom) / step < 4) ?? 0.5;
  return [Math.ceil(bottom / gap) * gap, gap];
}

/** The similarities of a layer; the line is interrupted where a new mask was selected. */
function lines(checks, answer, scale, places) {
  const { x, y } = scale;
  const runs = cut(checks);
  const path = (run, of) => run.map((c, i) => `${i ? "L" : "M"}${x(c.step)} ${y(of(c))}`).join("");
  const parts = [];
  for (const run of runs) {
    parts.push(shape("path", { d: path(run, (c) => c.similarity), class: "similarity" }));
    const armed = run.filter((c) => c.threshold != null);
    if (armed.length) parts.push(shape("path", { d: thresholdPath(armed, scale, until(run, runs, answer, scale)), class: "threshold" }));
    if (places) parts.push(...run.map((c) => dot(c, x, y, places.get(c))));
  }
  const last = checks.at(-1);
  if (places && last) parts.push(...endLabels(last, x, y));
  return parts;
}

function cut(checks) {
  const runs = [];
  for (const check of checks) {
    const before = runs.at(-1)?.at(-1);
    if (!before || check.window <= before.window) runs.push([check]);
    else runs.at(-1).push(check);
  }
  return runs;
}

/** Where a run's threshold line ends: at its last check, or for the newest run at the next mask, if any. */
function until(run, runs, answer, scale) {
  const last = run.at(-1).step;
  if (run !== runs.at(-1)) return last;
  return rebuilt(answer).find((mask) => mask.step > last)?.step ?? scale.end;
}

/** The path of the threshold; it starts where the first window begins, so that one window shows it. */
function thresholdPath(checks, { x, y }, end) {
  const [first, last] = [checks[0], checks.at(-1)];
  const steps = checks.map((c) => `L${x(c.step)} ${y(c.threshold)}`).join("");
  return `M${x(Math.max(0, first.step - 10))} ${y(first.threshold)}${steps}L${x(end)} ${y(last.threshold)}`;
}

const isLow = (check) => check.threshold != null && check.similarity < check.threshold;

/** The dot of a window, inside a larger circle that is easier to point at. */
function dot(check, x, y, place) {
  const at = { cx: x(check.step), cy: y(check.similarity) };
  return shape("g", { "data-check": place },
    shape("circle", { ...at, r: 9, class: "similarity-reach" }),
    shape("circle", { ...at, r: isLow(check) ? 4 : 3, class: `similarity-dot${isLow(check) ? " low" : ""}` }));
}

/** A window of the detector as text. */
export function windowInWords(answer, check) {
  const [from, to] = spanOf(answer, check);
  if (check.similarity == null) return `tokens ${from} to ${to}: the first window, with nothing to compare yet`;
  return `tokens ${from} to ${to}: similarity ${check.similarity.toFixed(2)}` +
    (check.threshold == null ? ", detector not armed" : `, threshold ${check.threshold.toFixed(2)}`) +
    (isLow(check) ? `, low window number ${check.counter}` : "") + (check.state === "suppressed" ? ", suppressed" : "");
}

/** The number of the check whose window contains this token, or -1. */
export const checkOf = (answer, index) => answer.checks.findIndex((check) => {
  if (!usable(check)) return false;
  const [from, to] = spanOf(answer, check);
  return from <= index && index <= to;
});

function endLabels(last, x, y) {
  const place = x(last.step) + 8;
  const similarity = y(last.similarity);
  const parts = [label(place, similarity + 4, "similarity", "of-line")];
  if (last.threshold == null) return parts;
  let threshold = y(last.threshold);
  if (Math.abs(threshold - similarity) < 14) threshold = similarity + (threshold < similarity ? -14 : 14);
  return [...parts, label(place, threshold + 4, "threshold", "of-threshold")];
}

function marks(answer, { x }) {
  return rebuilt(answer).flatMap((mask) => {
    const at = x(mask.step);
    return [
      shape("path", { d: `M${at} ${EDGE.top - 2}V${HEIGHT - EDGE.bottom}`, class: "remask-line" }),
      shape("path", { d: `M${at - 6} ${EDGE.top - 8}h12l-6 8z`, class: "remask-head" },
        shape("title", {}, `re-mask at token ${mask.step}: ${mask.cause}`)),
      label(at, EDGE.top - 12, "re-mask", "of-remask", "middle"),
    ];
  });
}

function inWords(answer, series) {
  if (!series.length) return "No window of the drift detector is complete yet.";
  const last = series[0].at(-1);
  const against = last.threshold == null ? "the detector is not armed" : `threshold ${last.threshold.toFixed(2)}`;
  return `Similarity ${last.similarity.toFixed(2)} at token ${last.step}, ${against}; ` +
    `${counted(rebuilt(answer).length, "re-mask")}.`;
}
