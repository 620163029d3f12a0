// The text of an answer: one span per token, coloured by phase or by confidence.

import { PHASES, DOUBTS, doubt } from "./colour.js";
import { byId, el } from "./dom.js";
import { percent, plain, visible } from "./format.js";

const probability = (token) => (token.logprob == null ? null : Math.exp(token.logprob));

/** Shows tokens inside `box` and gives one token's numbers on hover and on focus. */
export class TextView {
  constructor(box) {
    this.box = box;
    this.tokens = [];
    this.spans = [];
    box.addEventListener("pointerover", (event) => this.#pointed(event));
    box.addEventListener("focusin", (event) => this.#pointed(event));
    box.addEventListener("click", (event) => event.target.closest("[data-token]")?.focus());
    box.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Show these tokens; `marks` holds the token indexes at which masks were rebuilt. */
  show(tokens, marks = new Set()) {
    this.box.replaceChildren();
    this.tokens = [];
    this.spans = [];
    for (const token of tokens) this.add(token, marks.has(token.index));
  }

  add(token, marked = false) {
    if (marked) this.box.append(el("i", { className: "mark", title: "masks rebuilt here" }, "re-mask"));
    const span = el("span", {
      className: classes(token),
      tabIndex: this.spans.length ? -1 : 0,
      role: "button",
      "data-token": this.spans.length,
      "aria-label": `${token.text.trim() || "white space"}: ${words(token)}`,
    }, token.text);
    if (!token.text) return; // half of a character, or the end: what follows carries its text
    this.tokens.push(token);
    this.spans.push(span);
    this.box.append(span);
  }

  #pointed(event) {
    const span = event.target.closest("[data-token]");
    if (span) detail(this.tokens[Number(span.dataset.token)]);
  }

  #move(event) {
    const now = Number(event.target.dataset?.token ?? -1);
    const last = this.spans.length - 1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last }[event.key];
    if (now < 0 || to === undefined) return;
    event.preventDefault();
    const next = this.spans[Math.min(last, Math.max(0, to))];
    this.spans[now].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function classes(token) {
  const unsure = doubt(probability(token));
  return unsure ? `${token.phase} doubt-${unsure}` : token.phase;
}

function words(token) {
  const parts = [PHASES[token.phase] ?? token.phase];
  if (token.logprob != null) parts.push(`probability ${percent(probability(token))}`);
  return parts.join(", ");
}

/** One token's numbers in the line below the text. */
function detail(token) {
  const parts = [` token ${token.index}`, words(token)];
  if (token.seconds != null) parts.push(`${plain(1000 * token.seconds, 1)} ms`);
  const others = (token.top ?? []).filter((other) => other.id !== token.id).slice(0, 3);
  if (others.length) {
    const listed = others.map((o) => `${visible(o.text)} ${percent(Math.exp(o.logprob), 0)}`);
    parts.push(`else ${listed.join(", ")}`);
  }
  byId("detail").replaceChildren(el("b", {}, visible(token.piece ?? token.text)), parts.join("; "));
}

/** The key to the colours that are shown now. */
export function legend(paint) {
  const keys = {
    phase: [["prefill", "prompt"], ["observe", "dense, observed"], ["pruned", "pruned"]],
    confidence: DOUBTS.map((text, step) => [step ? `doubt-${step}` : "", text]),
  }[paint] ?? [];
  byId("legend").replaceChildren(...keys.map(([name, text]) => el("span", { className: name }, text)));
  byId("legend").dataset.paint = paint;
}
