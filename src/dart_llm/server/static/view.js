// The right half: counters, drift and neurons of an answer, drawn at most once per frame.

import { achieved, denseShare, finished, isDense, maskAt, newAnswer, rebuilt, spanOf, speed } from "./answer.js";
import { byId, el } from "./dom.js";
import { checkOf, drawDrift, windowInWords } from "./drift.js";
import { causeInWords, counted, exactly, percent, plain } from "./format.js";
import { NeuronView, drawRamp, fillLayers, shareIn, summary } from "./neurons.js";

/** The state before the first answer: no text, and an answer without records. */
const nothing = () => ({ answer: newAnswer("No answer yet"), text: null });

/**
 * Shows the answer of a box, and links its words with the plot and the map.  `token`: the selected
 * token (null: the newest); `check`: the number of the selected window of the drift detector (-1:
 * none); `cell`: the selected group of neurons.
 */
export class View {
  constructor() {
    this.neurons = new NeuronView(byId("neurons"), byId("neurons-cell"), (cell) => this.#pin(cell));
    this.waiting = this.anew = false;
    this.show(nothing());
    byId("changes").addEventListener("change", () => this.refresh());
    byId("scrub").addEventListener("input", () => this.#scrub(Number(byId("scrub").value)));
    this.#windows(byId("drift-plot"));
    new ResizeObserver(() => this.refresh(true)).observe(byId("drift-plot"));
    new IntersectionObserver(([seen]) => (byId("strip").dataset.there = seen.isIntersecting), {
      rootMargin: "0px 0px -40% 0px",
    }).observe(byId("view"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.refresh(true));
  }

  get answer() {
    return this.box.answer;
  }

  /** Show the answer of this box from now on. */
  show(box) {
    this.box?.text?.light(null);
    this.box = box;
    this.token = this.cell = null;
    this.check = -1;
    this.refresh();
  }

  /** Show nothing. */
  clear() {
    this.show(nothing());
  }

  /** Select this token of this box; null: none. */
  read(box, token) {
    if (box !== this.box) return;
    this.token = token;
    this.refresh();
  }

  /** Select the token at the slider's position; at its right end, the newest token is selected. */
  #scrub(place) {
    const last = this.answer.tokens.at(-1)?.index ?? 0;
    this.token = place < last ? place : null;
    this.box.text?.point(this.token);
    this.refresh();
  }

  /** Highlight the words of a dot in the plot when the pointer or the arrow keys select the dot. */
  #windows(plot) {
    const light = (check) => {
      if (check === this.check) return;
      this.check = check;
      this.refresh();
    };
    plot.addEventListener("pointerover", (event) => light(Number(event.target.closest("[data-check]")?.dataset.check ?? -1)));
    plot.addEventListener("pointerleave", () => light(-1));
    plot.addEventListener("blur", () => light(-1));
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move || !this.answer.checks.length) return;
      event.preventDefault();
      light(Math.min(this.answer.checks.length - 1, Math.max(0, this.check + move)));
    });
  }

  #pin(cell) {
    this.cell = cell;
    this.refresh();
  }

  /** Draw what changed, or everything with `anew`, as after a change of size or colours. */
  refresh(anew = false) {
    this.anew ||= anew;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      draw(this);
      this.waiting = this.anew = false;
    });
  }
}

function draw(view) {
  const { answer, token } = view;
  byId("view-of").textContent = heading(answer);
  counters(answer);
  if (view.anew || newInPlot(answer)) drawDrift(byId("drift-plot"), answer);
  byId("drift-note").textContent = driftNote(answer);
  const text = summary(answer, token);
  view.neurons.label(text);
  byId("neurons-note").textContent = sentence(text);
  if (view.neurons.show(answer, token, showsChanges(answer), view.anew)) {
    drawRamp();
    fillLayers(byId("layers"), maskAt(answer, token), answer.start?.layers ?? 0);
  }
  scrubber(view);
  links(view);
  remasks(answer);
  strip(answer);
}

let plotted = [];

/** Whether the answer has something new for the drift plot; most tokens do not. */
function newInPlot(answer) {
  const observed = answer.tokens.findLastIndex((token) => token.phase === "observe");
  const now = [answer, answer.checks.length, answer.remasks.length, observed, Math.ceil(answer.tokens.length / 32)];
  const same = now.every((value, i) => value === plotted[i]);
  plotted = now;
  return !same;
}

function showsChanges(answer) {
  byId("changes").disabled = answer.masks.length < 2;
  byId("changed").hidden = answer.masks.length < 2;
  return byId("changes").checked;
}

/** Update the slider of the map's token. */
function scrubber({ answer, token }) {
  const last = answer.tokens.at(-1)?.index ?? 0;
  const slider = byId("scrub");
  const mask = maskAt(answer, token);
  slider.disabled = !last;
  slider.max = Math.max(1, last);
  slider.value = token ?? slider.max;
  const text = mask ? `token ${token ?? last}, mask ${mask.number} of ${answer.masks.length}` : last ? `token ${token ?? last}` : "";
  byId("scrub-value").textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

/**
 * Highlight in the plot the selected window or the selected token's window, and in the text the words
 * of the selected window or cell.
 */
function links({ answer, box, token, check, cell }) {
  const lit = check >= 0 ? check : token === null ? -1 : checkOf(answer, token);
  for (const dot of byId("drift-plot").querySelectorAll("[data-check]")) dot.classList.toggle("lit", Number(dot.dataset.check) === lit);
  const current = answer.checks[lit];
  byId("drift-window").textContent = current ? sentence(windowInWords(answer, current)) : "";
  box.text?.light(current && check >= 0 ? inside(answer, current) : cell ? needs(answer, cell) : null);
}

function inside(answer, check) {
  const [from, to] = spanOf(answer, check);
  return (token) => (from <= token.index && token.index <= to ? 3 : 0);
}

/** A function of a token: how much of a group of neurons it ran with, from 0 (none) to 3 (all). */
function needs(answer, { layer, bin }) {
  return (token) => (token.phase === "pruned" ? Math.floor(3 * shareIn(maskAt(answer, token.index), layer, bin)) : 3);
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
  const state = finished(answer) ? "" : " (in progress)";
  return `${answer.label || answer.start.method}${state}: ${counted(answer.tokens.length, "token")}`;
}

function counters(answer) {
  byId("count-sparsity").textContent = percent(achieved(answer));
  byId("of-sparsity").textContent = answer.start?.sparsity == null
    ? "mean over tokens" : `of ${exactly(answer.start.sparsity)} requested`;
  byId("count-dense").textContent = percent(denseShare(answer), 0);
  byId("of-dense").textContent = isDense(answer) ? "nothing is pruned" : "of decoded tokens";
  byId("count-remasks").textContent = answer.start ? String(rebuilt(answer).length) : plain(null);
  byId("count-speed").textContent = plain(speed(answer), 1);
}

function driftNote(answer) {
  const last = answer.checks.at(-1);
  const rule = answer.start?.config?.drift?.rule;
  if (!answer.start) return "similarity of each window of tokens to the tokens from which the neurons were selected.";
  if (isDense(answer)) return "A dense answer has no detector.";
  if (!last) return rule ? `Rule ${rule}: no window is complete yet.` : "No window is complete yet.";
  if (last.threshold == null) return `Rule ${rule}: still reading the beginning.`;
  if (last.state === "suppressed") return `Rule ${rule}: low similarity, but a new mask would cost too many dense tokens.`;
  const low = last.similarity < last.threshold;
  return `Rule ${rule}: ${low ? `differs from the beginning, ${counted(last.counter, "low window")} in a row` : "similar to the beginning"}.`;
}

function remasks(answer) {
  const items = answer.remasks.map((mask) => {
    const same = mask.overlap == null ? "" : `; ${percent(mask.overlap, 0)} of its neurons were in the previous mask`;
    return el("li", {}, `Token ${mask.step}: ${causeInWords(mask.cause)}; selected from ${plain(mask.evidence_tokens)} tokens${same}.`);
  });
  byId("remask-list").replaceChildren(...(items.length ? items : [el("li", {}, "None yet.")]));
}
