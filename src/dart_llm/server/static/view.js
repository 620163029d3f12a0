// The right half: counters, drift and neurons of one answer, drawn once per frame at most.

import { achieved, alive, denseShare, finished, isDense, newAnswer, rebuilt, speed } from "./answer.js";
import { byId, el } from "./dom.js";
import { drawDrift } from "./drift.js";
import { causeInWords, counted, exactly, percent, plain } from "./format.js";
import { NeuronView, drawRamp, fillLayers, summary } from "./neurons.js";

export class View {
  constructor() {
    this.neurons = new NeuronView(byId("neurons"), byId("neurons-cell"));
    this.answer = newAnswer("Nothing has been answered yet");
    this.waiting = this.anew = false;
    byId("changes").addEventListener("change", () => this.refresh());
    new ResizeObserver(() => this.refresh(true)).observe(byId("drift-plot"));
    new IntersectionObserver(([seen]) => (byId("strip").dataset.there = seen.isIntersecting), {
      rootMargin: "0px 0px -40% 0px",
    }).observe(byId("view"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.refresh(true));
  }

  /** Show this answer from now on. */
  show(answer) {
    this.answer = answer;
    this.refresh();
  }

  /** Draw what is new; `anew`: all of it, as after a change of size or of colours. */
  refresh(anew = false) {
    this.anew ||= anew;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      draw(this.answer, this.neurons, this.anew);
      this.waiting = this.anew = false;
    });
  }
}

function draw(answer, neurons, anew) {
  byId("view-of").textContent = heading(answer);
  counters(answer);
  if (anew || newInPlot(answer)) drawDrift(byId("drift-plot"), answer);
  byId("drift-note").textContent = driftNote(answer);
  const changes = showsChanges(answer);
  const text = summary(answer, alive(answer));
  neurons.label(text);
  byId("neurons-note").textContent = sentence(text);
  if (neurons.show(answer, changes, anew)) {
    drawRamp(changes);
    fillLayers(byId("layers"), alive(answer), answer.start?.layers ?? 0);
  }
  remasks(answer);
  strip(answer);
}

let plotted = [];

/** Whether the plot of drift has anything to add: most tokens bring it nothing. */
function newInPlot(answer) {
  const observed = answer.tokens.findLastIndex((token) => token.phase === "observe");
  const now = [answer, answer.checks.length, answer.remasks.length, observed, Math.ceil(answer.tokens.length / 32)];
  const same = now.every((value, i) => value === plotted[i]);
  plotted = now;
  return !same;
}

function showsChanges(answer) {
  byId("changes").disabled = answer.masks.length < 2;
  return byId("changes").checked && answer.masks.length > 1;
}

/** The counters in one line, for screens too narrow to see both halves. */
function strip(answer) {
  byId("strip").hidden = !answer.tokens.length;
  byId("strip-text").textContent = [
    `${percent(achieved(answer))} removed`, counted(rebuilt(answer).length, "re-mask"), `${plain(speed(answer))}/s`,
  ].join(" \u00b7 ");
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function heading(answer) {
  if (!answer.start) return answer.label;
  const state = finished(answer) ? "" : ", live";
  return `${answer.label || answer.start.method}${state}: ${counted(answer.tokens.length, "token")}`;
}

function counters(answer) {
  byId("count-sparsity").textContent = percent(achieved(answer));
  byId("of-sparsity").textContent = answer.start?.sparsity == null
    ? "mean over tokens" : `of ${exactly(answer.start.sparsity)} asked`;
  byId("count-dense").textContent = percent(denseShare(answer), 0);
  byId("of-dense").textContent = isDense(answer) ? "nothing is pruned" : "of its tokens";
  byId("count-remasks").textContent = answer.start ? String(rebuilt(answer).length) : plain(null);
  byId("count-speed").textContent = plain(speed(answer), 1);
}

function driftNote(answer) {
  const last = answer.checks.at(-1);
  const rule = answer.start?.config?.drift?.rule;
  if (!answer.start) return "Similarity inside the model of each window of tokens to those that the neurons were chosen from.";
  if (isDense(answer)) return "A dense answer has no detector.";
  if (!last) return rule ? `Rule ${rule}: no window is complete yet.` : "No window is complete yet.";
  if (last.threshold == null) return `Rule ${rule}: learning what the beginning is like.`;
  if (last.state === "held") return `Rule ${rule}: low, but a new mask would cost too many dense tokens.`;
  const low = last.similarity < last.threshold;
  return `Rule ${rule}: ${low ? `unlike the beginning, ${counted(last.counter, "low window")} in a row` : "like the beginning"}.`;
}

function remasks(answer) {
  const items = answer.remasks.map((mask) => {
    const same = mask.overlap == null ? "" : `; ${percent(mask.overlap, 0)} of its neurons were alive before`;
    return el("li", {}, `Token ${mask.step}: ${causeInWords(mask.cause)}, from ${plain(mask.evidence_tokens)} tokens of evidence${same}.`);
  });
  byId("remask-list").replaceChildren(...(items.length ? items : [el("li", {}, "None yet.")]));
}
