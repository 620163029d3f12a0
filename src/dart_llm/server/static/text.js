// The text of an answer: one span per token, coloured by phase or by confidence.

import { PHASES, DOUBTS, doubt } from "./colour.js";
import { byId, el } from "./dom.js";
import { percent, plain, visible } from "./format.js";

const probability = (token) => (token.logprob == null ? null : Math.exp(token.logprob));

/**
 * Shows tokens inside `box`, and the numbers of the token that the pointer or the arrow keys select; a
 * click pins the selection.  The box is a single Tab stop, and plain text for screen readers.
 * `onToken` gets the index of the selected token, or null.
 */
export class TextView {
  constructor(box, onToken = () => {}) {
    this.box = box;
    this.onToken = onToken;
    this.show([]);
    box.tabIndex = 0;
    box.addEventListener("pointerover", (event) => this.#choose(under(event) ?? this.pinned));
    box.addEventListener("pointerleave", () => this.#choose(this.pinned));
    box.addEventListener("click", (event) => this.#pin(under(event)));
    box.addEventListener("keydown", (event) => this.#move(event));
    box.addEventListener("blur", () => this.#pin(null));
  }

  /** Show these tokens; `marks`: indexes of tokens at which masks were rebuilt. */
  show(tokens, marks = new Set()) {
    this.box.replaceChildren();
    this.tokens = [];
    this.spans = [];
    this.at = this.pinned = null;
    for (const token of tokens) this.add(token, marks.has(token.index));
  }

  add(token, marked = false) {
    if (marked) this.box.append(el("i", { className: "mark", title: "masks rebuilt here" }, "re-mask"));
    if (!token.text) return; // the end token, or part of a character, which a later token completes
    const span = el("span", { className: classes(token), "data-token": this.spans.length }, token.text);
    this.tokens.push(token);
    this.spans.push(span);
    this.box.append(span);
  }

  /** Highlight each token with the strength `wanted(token)`, from 0 to 3; null highlights none. */
  light(wanted) {
    for (const [i, span] of this.spans.entries()) {
      const strength = wanted?.(this.tokens[i]) ?? 0;
      if (strength) span.dataset.lit = strength;
      else delete span.dataset.lit;
    }
  }

  /** Mark the word at the token `index`, where the answer first differs from the other; null: none. */
  part(index) {
    const at = index === null ? -1 : this.tokens.findIndex((token) => token.index >= index);
    if (this.spans[at]?.classList.contains("parts")) return;
    for (const span of this.spans.filter((item) => item.matches(".parts"))) span.classList.remove("parts");
    if (at < 0) return;
    this.spans[at].classList.add("parts");
    this.spans[at].title = "the first word that differs";
  }

  /** Select the token `index` as if the pointer were on it; null: none. */
  point(index) {
    this.#mark(index === null ? null : this.tokens.findLastIndex((token) => token.index <= index));
  }

  #move(event) {
    const last = this.spans.length - 1;
    const now = this.at ?? -1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.#pin(Math.min(last, Math.max(0, to)));
    this.spans[this.at].scrollIntoView({ block: "nearest" });
  }

  #pin(at) {
    this.pinned = at;
    this.#choose(at);
  }

  #choose(at) {
    if (at === this.at) return;
    this.#mark(at);
    this.onToken(this.at === null ? null : this.tokens[this.at].index);
  }

  #mark(at) {
    this.spans[this.at]?.classList.remove("current");
    this.at = at === -1 ? null : at;
    if (this.at === null) return;
    this.spans[this.at].classList.add("current");
    detail(this.tokens[this.at]);
  }
}

function under(event) {
  const span = event.target.closest("[data-token]");
  return span ? Number(span.dataset.token) : null;
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

/** Show a token's numbers in the line below the text. */
function detail(token) {
  const parts = [` token ${token.index}`, words(token)];
  if (token.seconds != null) parts.push(`${plain(1000 * token.seconds, 1)} ms`);
  const others = (token.top ?? []).filter((other) => other.id !== token.id).slice(0, 2);
  if (others.length) {
    const listed = others.map((o) => `${visible(o.text)} ${percent(Math.exp(o.logprob), 0)}`);
    parts.push(`next likeliest ${listed.join(", ")}`);
  }
  byId("detail").replaceChildren(el("b", {}, visible(token.piece ?? token.text)), parts.join("; "));
}

/** Show the legend of the current colours. */
export function legend(paint) {
  const keys = {
    phase: [["prefill", "prompt"], ["observe", "dense, observed"], ["pruned", "pruned"]],
    confidence: DOUBTS.map((text, step) => [step ? `doubt-${step}` : "", text]),
  }[paint] ?? [];
  byId("legend").replaceChildren(...keys.map(([name, text]) => el("span", { className: name }, text)));
  byId("legend").dataset.paint = paint;
}
