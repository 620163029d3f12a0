// One turn of the conversation: the question and one or two answers.

import { finished, isDense, newAnswer, parting, rebuilt, achieved, speed } from "./answer.js";
import { el } from "./dom.js";
import { counted, percent, plain } from "./format.js";
import { TextView } from "./text.js";

let made = 0; // answers on this page so far: saved recordings are named after it

/** An answer on the page: its state, its text and its small print. */
export class AnswerBox {
  constructor(label, onShow, onRetry = null) {
    this.answer = newAnswer(label);
    this.place = ++made;
    this.state = el("span", {}, "");
    this.look = el("button", { type: "button", className: "quiet", hidden: true }, "Show its neurons");
    this.look.addEventListener("click", () => onShow(this));
    this.keep = el("button", { type: "button", className: "quiet", hidden: true }, "Save its records");
    this.keep.addEventListener("click", () => download(this.answer, this.place));
    this.again = el("button", { type: "button", className: "quiet", hidden: true }, "Retry");
    this.again.addEventListener("click", () => onRetry());
    this.canRetry = Boolean(onRetry);
    this.box = el("p", { className: "text", role: "group", "aria-label": `${label}: the answer; arrow keys give one token's numbers` });
    this.text = new TextView(this.box);
    this.drawn = 0;
    this.print = el("span", {}, "");
    this.foot = el("footer", {}, this.print, " ", this.keep, " ", this.again);
    this.element = el("article", { className: "answer", "aria-label": label },
      el("header", {}, el("strong", {}, label), this.state, this.look), this.box, this.foot);
    this.wait("queued");
  }

  wait(word) {
    this.state.textContent = word;
  }

  /** Show what is new in the answer since it was last drawn. */
  update() {
    const { start, tokens } = this.answer;
    const marks = this.marks();
    for (; this.drawn < tokens.length; this.drawn++) {
      this.text.add(tokens[this.drawn], marks.has(tokens[this.drawn].index));
    }
    if (finished(this.answer)) return this.end();
    this.box.setAttribute("aria-busy", String(Boolean(start)));
    if (start) this.wait(tokens.length ? "writing" : "reading the prompt");
    return undefined;
  }

  marks() {
    const steps = new Set(rebuilt(this.answer).map((mask) => mask.step));
    return new Set(this.answer.masks.filter((mask, i) => i && steps.has(mask.token - 1)).map((mask) => mask.token));
  }

  /** Draw everything anew, as after a jump in a replay or a reload. */
  redraw() {
    this.text.show(this.answer.tokens, this.marks());
    this.drawn = this.answer.tokens.length;
    this.box.setAttribute("aria-busy", String(Boolean(this.answer.start) && !finished(this.answer)));
    this.wait(finished(this.answer) ? "" : this.answer.start ? "writing" : "queued");
    this.foot.className = "";
    this.print.textContent = finished(this.answer) ? smallPrint(this.answer) : "";
    if (this.answer.error) this.fail(this.answer.error);
  }

  end() {
    this.box.setAttribute("aria-busy", "false");
    this.look.hidden = this.element.dataset.shown === "true";
    this.keep.hidden = document.documentElement.dataset.mode !== "live" || !this.answer.records.length;
    this.wait("");
    this.print.textContent = smallPrint(this.answer);
    if (this.answer.error) this.fail(this.answer.error);
  }

  fail(message) {
    this.answer.error = message;
    this.box.setAttribute("aria-busy", "false");
    this.wait("failed");
    this.print.textContent = message;
    this.foot.className = "failure";
    this.again.hidden = !this.canRetry;
  }

  shown(here) {
    this.element.dataset.shown = String(here);
    this.look.hidden = here || !finished(this.answer);
  }
}

/** Save the records as JSON lines: what `dart-llm replay` makes a page of. */
function download(answer, place) {
  const lines = answer.records.map((record) => `${JSON.stringify(record)}\n`);
  const url = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  el("a", { href: url, download: `answer-${place}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const ENDS = { stop: "finished", length: "cut at the limit", cancelled: "stopped" };

function ending(answer) {
  if (answer.error) return "failed";
  const reason = (answer.done?.finish_reasons ?? answer.done?.finish ?? [])[0];
  return ENDS[reason] ?? "finished";
}

/** Why nothing was removed at all. */
function unmasked(answer) {
  const { config } = answer.start ?? {};
  if (answer.masks.length || !config) return "";
  if (config.masking_step >= answer.tokens.length) return ` (its first ${config.masking_step} tokens are decoded dense)`;
  return config.min_evidence ? ` (it observes ${config.min_evidence} tokens first, those of the prompt among them)` : "";
}

function smallPrint(answer) {
  const parts = [`${counted(answer.tokens.length, "token")}, ${ending(answer)}`];
  if (!isDense(answer)) {
    parts.push(`${percent(achieved(answer))} removed${unmasked(answer)}`, counted(rebuilt(answer).length, "re-mask"));
  }
  if (speed(answer) != null) parts.push(`${plain(speed(answer), 1)} tokens/s`);
  return parts.join(" \u00b7 ");
}

/** The question with its answers side by side. */
export function turnElement(question, boxes) {
  const asked = el("p", { className: "question", "data-who": "You" }, question);
  const side = el("div", { className: boxes.length > 1 ? "answers two" : "answers" }, ...boxes.map((b) => b.element));
  return el("li", {}, asked, side);
}

/** Say in the second answer where it parts from the first. */
export function sayParting(first, second) {
  const at = parting(first.answer, second.answer);
  const same = at ?? Math.min(first.answer.tokens.length, second.answer.tokens.length);
  second.print.textContent += ` \u00b7 the same as the other for ${counted(same, "token")}`;
}
