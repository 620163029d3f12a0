// The right half: counters, drift and neurons of one answer, drawn once per frame at most.

import { achieved, alive, denseShare, finished, isDense, rebuilt, speed } from "./answer.js";
import { byId, el } from "./dom.js";
import { drawDrift } from "./drift.js";
import { causeInWords, counted, percent, plain } from "./format.js";
import { NeuronView, drawRamp, fillLayers, summary } from "./neurons.js";

export class View {
  constructor() {
    this.neurons = new NeuronView(byId("neurons"), byId("neurons-cell"));
    this.answer = null;
    this.waiting = false;
    drawRamp();
    new ResizeObserver(() => this.refresh()).observe(byId("drift-plot"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.refresh());
  }

  /** Show this answer from now on. */
  show(answer) {
    this.answer = answer;
    this.refresh();
  }

  refresh() {
    if (!this.answer || this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      draw(this.answer, this.neurons);
    });
  }
}

function draw(answer, neurons) {
  byId("view-of").textContent = heading(answer);
  counters(answer);
  drawDrift(byId("drift-plot"), answer);
  byId("drift-note").textContent = driftNote(answer);
  neurons.show(answer);
  byId("neurons-note").textContent = sentence(summary(answer, alive(answer)));
  remasks(answer);
  fillLayers(byId("layers"), alive(answer), answer.start?.layers ?? 0);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function heading(answer) {
  if (!answer.start) return answer.label || "Waiting for the first record";
  const state = finished(answer) ? "" : ", live";
  return `${answer.label || answer.start.method}${state}: ${counted(answer.tokens.length, "token")}`;
}

function counters(answer) {
  byId("count-sparsity").textContent = percent(achieved(answer));
  byId("of-sparsity").textContent = answer.start?.sparsity == null
    ? "mean over tokens" : `of ${percent(answer.start.sparsity, 0)} asked`;
  byId("count-dense").textContent = percent(denseShare(answer), 0);
  byId("of-dense").textContent = isDense(answer) ? "nothing is pruned" : "while observing";
  byId("count-remasks").textContent = String(rebuilt(answer).length);
  byId("count-speed").textContent = plain(speed(answer), 1);
}

function driftNote(answer) {
  const last = answer.checks.at(-1);
  const rule = answer.start?.config?.drift?.rule;
  if (isDense(answer)) return "A dense answer has no detector.";
  if (!last) return rule ? `Rule ${rule}: no window is complete yet.` : "No window is complete yet.";
  if (last.threshold == null) return `Rule ${rule}: learning what this text is like.`;
  if (last.state === "held") return `Rule ${rule}: low, but a new mask would cost too many dense tokens.`;
  const low = last.similarity < last.threshold;
  return `Rule ${rule}: ${low ? `${counted(last.counter, "low window")} in a row` : "on topic"}.`;
}

function remasks(answer) {
  const items = answer.remasks.map((mask) => {
    const same = mask.overlap == null ? "" : `; ${percent(mask.overlap, 0)} of its neurons were alive before`;
    return el("li", {}, `Token ${mask.step}: ${causeInWords(mask.cause)}, from ${plain(mask.evidence_tokens)} tokens of evidence${same}.`);
  });
  byId("remask-list").replaceChildren(...(items.length ? items : [el("li", {}, "None yet.")]));
}
