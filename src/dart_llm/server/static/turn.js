// A turn of the conversation: the question, a headline, and one or two answers.

import { finished, isDense, newAnswer, parting, rebuilt, achieved, speed } from "./answer.js";
import { el } from "./dom.js";
import { counted, percent, plain } from "./format.js";
import { TextView } from "./text.js";

const quiet = (text) => el("button", { type: "button", className: "quiet", hidden: true }, text);

/**
 * An answer on the page: its state, its text and its small print.  `on.token(box, index)` is called
 * when a token is selected, `on.retry()` when the user presses Retry.
 */
export class AnswerBox {
  constructor(label, on = {}) {
    this.answer = newAnswer(label);
    this.state = el("span", {}, "");
    this.look = el("a", { hidden: true, href: "" }, "Show neurons");
    this.keep = quiet("Save records");
    this.keep.addEventListener("click", () => saveRecords(this));
    this.again = quiet("Retry");
    this.again.addEventListener("click", () => on.retry());
    this.canRetry = Boolean(on.retry);
    this.box = el("p", { className: "text", role: "group", "aria-label": `${label}: the answer; arrow keys show a token's numbers` });
    this.text = new TextView(this.box, (index) => on.token?.(this, index));
    this.drawn = 0;
    this.print = el("span", {}, "");
    this.foot = el("footer", {}, this.print, " ", this.keep, " ", this.again);
    this.element = el("article", { className: "answer", "aria-label": label },
      el("header", {}, el("strong", {}, label), this.state, this.look), this.box, this.foot);
    this.wait("queued");
  }

  /** The answer's number on the page, from 1; its URL ends with `#answer/NUMBER`. */
  set place(place) {
    this.number = place;
    this.look.href = `#answer/${place}`;
  }

  wait(word) {
    this.state.textContent = word;
  }

  /** Add the tokens that arrived since the last update. */
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

  /** Redraw everything, as after a jump in a replay or a reload. */
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
    this.again.hidden = !this.canRetry;
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

/** Save the records as JSON lines, the input of `dart-llm replay`. */
function saveRecords({ answer, number }) {
  const lines = answer.records.map((record) => `${JSON.stringify(record)}\n`);
  const url = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  el("a", { href: url, download: `answer-${number}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const ENDS = { stop: "finished", length: "cut at the limit", cancelled: "stopped" };

function ending(answer) {
  if (answer.error) return "failed";
  const reason = (answer.done?.finish_reasons ?? answer.done?.finish ?? [])[0];
  return ENDS[reason] ?? "finished";
}

/** Why no neurons were removed, in brackets; "" if there were masks. */
function unmasked(answer) {
  const { config } = answer.start ?? {};
  if (answer.masks.length || !config) return "";
  if (config.masking_step >= answer.tokens.length) return ` (its first ${config.masking_step} tokens are decoded dense)`;
  return config.min_evidence ? ` (it observes ${config.min_evidence} tokens first, including those of the prompt)` : "";
}

function smallPrint(answer) {
  const parts = [`${counted(answer.tokens.length, "token")}, ${ending(answer)}`];
  if (!isDense(answer)) {
    parts.push(`${percent(achieved(answer))} removed${unmasked(answer)}`, counted(rebuilt(answer).length, "re-mask"));
  }
  if (speed(answer) != null) parts.push(`${plain(speed(answer), 1)} tokens/s`);
  return parts.join(" \u00b7 ");
}

/** A question with its answers, and a headline that states the effect of pruning. */
export class Turn {
  constructor(question, labels, on = {}) {
    this.question = question;
    this.boxes = labels.map((label) => new AnswerBox(label, { ...on, retry: on.retry && (() => on.retry(this)) }));
    this.headline = el("p", { className: "headline", hidden: true });
    this.asked = el("p", { className: "question", "data-who": "You" }, question);
    const edit = el("button", { type: "button", className: "quiet edit" }, "Edit");
    edit.addEventListener("click", () => on.edit(this));
    const side = el("div", { className: labels.length > 1 ? "answers two" : "answers" }, ...this.boxes.map((box) => box.element));
    this.element = el("li", {}, el("div", { className: "asked" }, this.asked, ...(on.edit ? [edit] : [])), this.headline, side);
  }

  /** Update the headline, and mark the first word in which the answers differ. */
  compare() {
    const [first, second] = this.boxes;
    const text = isDense(first.answer) ? "" : headline(first.answer, second?.answer);
    this.headline.hidden = !text;
    if (this.headline.textContent !== text) this.headline.textContent = text;
    const at = second ? parting(first.answer, second.answer) : null;
    for (const box of this.boxes) box.text.part(at);
  }
}

/** The measured effect of pruning on a finished answer, compared with the dense answer if there is one. */
function headline(answer, dense) {
  if (!answer.done || achieved(answer) === null) return "";
  const parts = [`${percent(achieved(answer))} of the neurons skipped`];
  if (dense?.done) {
    const at = parting(answer, dense);
    parts.push(at === null ? "identical to the dense answer" : at ? `identical to dense for ${counted(at, "token")}` : "different from the first token on");
  }
  return parts.join(", ");
}
