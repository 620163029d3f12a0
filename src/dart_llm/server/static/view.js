// The right half: counters, drift and neurons of one answer, drawn once per frame at most.

import { achieved, denseShare, finished, isDense, maskAt, newAnswer, rebuilt, spanOf, speed } from "./answer.js";
import { byId, el } from "./dom.js";
import { checkOf, drawDrift, windowInWords } from "./drift.js";
import { causeInWords, counted, exactly, percent, plain } from "./format.js";
import { NeuronView, drawRamp, fillLayers, shareIn, summary } from "./neurons.js";

/** What is shown where nothing has been answered: no text, and an answer without records. */
const nothing = () => ({ answer: newAnswer("Nothing has been answered yet"), text: null });

/**
 * Shows the answer of a box, and ties its words to the plot and the map: `token` is the one that is
 * read (null: the newest), `check` the detector's window, `cell` the group of neurons that is held.
 */
export class View {
  constructor() {
    this.neurons = new NeuronView(byId("neurons"), byId("neurons-cell"), (cell) => this.#hold(cell));
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

  /** The reader reads this token of this box; null: none. */
  read(box, token) {
    if (box !== this.box) return;
    this.token = token;
    this.refresh();
  }

  /** The slider of tokens: its right end follows the newest one. */
  #scrub(place) {
    const last = this.answer.tokens.at(-1)?.index ?? 0;
    this.token = place < last ? place : null;
    this.box.text?.point(this.token);
    this.refresh();
  }

  /** Dots of the plot light their words: by the pointer, and by the arrow keys. */
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

  #hold(cell) {
    this.cell = cell;
    this.refresh();
  }

  /** Draw what is new; `anew`: all of it, as after a change of size or of colours. */
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
  byId("changed").hidden = answer.masks.length < 2;
  return byId("changes").checked;
}

/** Where the map stands among the tokens. */
function scrubber({ answer, token }) {
  const last = answer.tokens.at(-1)?.index ?? 0;
  const slider = byId("scrub");
  const mask = maskAt(answer, token);
  slider.disabled = !last;
  slider.max = Math.max(1, last);
  slider.value = token ?? slider.max;
  const said = mask ? `token ${token ?? last}, mask ${mask.number} of ${answer.masks.length}` : last ? `token ${token ?? last}` : "";
  byId("scrub-value").textContent = said;
  slider.setAttribute("aria-valuetext", said);
}

/** The window that is read, or that of the token that is, in the plot; its words, or the cell's, in the text. */
function links({ answer, box, token, check, cell }) {
  const lit = check >= 0 ? check : token === null ? -1 : checkOf(answer, token);
  for (const dot of byId("drift-plot").querySelectorAll("[data-check]")) dot.classList.toggle("lit", Number(dot.dataset.check) === lit);
  const found = answer.checks[lit];
  byId("drift-window").textContent = found ? sentence(windowInWords(answer, found)) : "";
  box.text?.light(found && check >= 0 ? inside(answer, found) : cell ? needs(answer, cell) : null);
}

function inside(answer, check) {
  const [from, to] = spanOf(answer, check);
  return (token) => (from <= token.index && token.index <= to ? 3 : 0);
}

/** How much of a group of neurons each token ran with: 3 where all of it was kept, 0 where nothing was. */
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
  const state = finished(answer) ? "" : ", being written";
  return `${answer.label || answer.start.method}${state}: ${counted(answer.tokens.length, "token")}`;
}

function counters(answer) {
  byId("count-sparsity").textContent = percent(achieved(answer));
  byId("of-sparsity").textContent = answer.start?.sparsity == null
    ? "mean over tokens" : `of ${exactly(answer.start.sparsity)} requested`;
  byId("count-dense").textContent = percent(denseShare(answer), 0);
  byId("of-dense").textContent = isDense(answer) ? "nothing is pruned" : "of its tokens";
  byId("count-remasks").textContent = answer.start ? String(rebuilt(answer).length) : plain(null);
  byId("count-speed").textContent = plain(speed(answer), 1);
}

function driftNote(answer) {
  const last = answer.checks.at(-1);
  const rule = answer.start?.config?.drift?.rule;
  if (!answer.start) return "Similarity of each window of tokens to those that the neurons were selected from, inside the model.";
  if (isDense(answer)) return "A dense answer has no detector.";
  if (!last) return rule ? `Rule ${rule}: no window is complete yet.` : "No window is complete yet.";
  if (last.threshold == null) return `Rule ${rule}: learning what the beginning is like.`;
  if (last.state === "suppressed") return `Rule ${rule}: low, but a new mask would cost too many dense tokens.`;
  const low = last.similarity < last.threshold;
  return `Rule ${rule}: ${low ? `unlike the beginning, ${counted(last.counter, "low window")} in a row` : "like the beginning"}.`;
}

function remasks(answer) {
  const items = answer.remasks.map((mask) => {
    const same = mask.overlap == null ? "" : `; ${percent(mask.overlap, 0)} of its neurons were active before`;
    return el("li", {}, `Token ${mask.step}: ${causeInWords(mask.cause)}, from ${plain(mask.evidence_tokens)} tokens of evidence${same}.`);
  });
  byId("remask-list").replaceChildren(...(items.length ? items : [el("li", {}, "None yet.")]));
}
