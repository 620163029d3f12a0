// The conversation: sends requests one after the other and hands their records to the page.

import { ask } from "./api.js";
import { fold, finished, newAnswer, rebuilt, textOf } from "./answer.js";
import { asDense, chosen, inLabels, nameOf } from "./controls.js";
import { announce, byId, calm } from "./dom.js";
import { counted } from "./format.js";
import { forget, keep, kept } from "./kept.js";
import { AnswerBox, sayParting, turnElement } from "./turn.js";

const HINT = byId("detail").textContent; // how to get one token's numbers
const nameNow = () => `window-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;

export class Chat {
  constructor(view, model) {
    this.view = view;
    this.model = model;
    this.boxes = [];
    this.stopper = null;
    this.undrawn = null; // the box whose new records wait for the next frame
    this.#clear();
    const before = kept();
    if (before) this.#restore(before);
  }

  get busy() {
    return this.stopper !== null;
  }

  /** Forget the conversation. */
  anew() {
    this.stopper?.abort();
    forget();
    this.#clear();
  }

  #clear() {
    this.view.show(newAnswer("Nothing has been answered yet"));
    this.turns = [];
    this.conversation = nameNow();
    byId("turns").replaceChildren();
    byId("detail").textContent = HINT;
    byId("welcome").hidden = false;
  }

  /** Go on with a conversation that this tab kept. */
  #restore({ conversation, turns }) {
    this.conversation = conversation;
    for (const { question, answers } of turns) {
      const turn = this.#turn(question, answers.map((answer) => answer.label));
      for (const [i, box] of turn.boxes.entries()) {
        box.answer = answers[i];
        box.redraw();
        box.end();
      }
      if (answers.length > 1 && !answers.some((answer) => answer.error)) sayParting(...turn.boxes);
    }
    if (!this.turns.length) return;
    this.show(this.turns.at(-1).boxes[0]);
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
  }

  /** A new turn at the end of the page, with an empty box per label. */
  #turn(question, labels) {
    const turn = { question };
    turn.boxes = labels.map((label) => new AnswerBox(label, (box) => this.show(box), () => this.#retry(turn)));
    turn.element = turnElement(question, turn.boxes);
    this.turns.push(turn);
    byId("welcome").hidden = true;
    byId("turns").append(turn.element);
    return turn;
  }

  /** Ask a failed turn's question once more, in its place. */
  #retry(turn) {
    if (this.busy) return;
    this.turns = this.turns.filter((other) => other !== turn);
    turn.element.remove();
    if (byId("message").value === turn.question) byId("message").value = "";
    this.send(turn.question);
  }

  show(box) {
    for (const turn of this.turns) for (const other of turn.boxes) other.shown(other === box);
    this.view.show(box.answer);
  }

  stop() {
    this.stopper?.abort();
  }

  /** Ask; with `compare` the dense answer is asked for after the pruned one. */
  async send(question) {
    const { dart, maxTokens, compare } = chosen();
    const jobs = [{ ...dart, conversation: this.conversation }];
    if (compare && nameOf(dart) !== "Dense") jobs.push(asDense({ conversation: `${this.conversation}-dense` }));
    const turn = this.#turn(question, jobs.map(nameOf));
    const { boxes } = turn;
    keep(this.conversation, this.turns);
    this.show(boxes[0]);
    turn.element.scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
    document.dispatchEvent(new Event("asked"));
    this.#working(new AbortController());
    try {
      for (const [side, job] of jobs.entries()) await this.#answer(turn, side, job, maxTokens);
      if (boxes.length > 1 && boxes.every((box) => box.answer.done)) sayParting(boxes[0], boxes[1]);
    } finally {
      this.#working(null);
      if (this.turns.includes(turn)) keep(this.conversation, this.turns);
    }
  }

  async #answer(turn, side, dart, maxTokens) {
    const box = turn.boxes[side];
    if (this.stopper.signal.aborted) return box.fail("stopped before it began");
    this.#follow(() => box.wait("waiting for the model"));
    try {
      const body = { model: this.model(), messages: this.#messages(side), max_tokens: maxTokens, temperature: 0,
        stream: true, logprobs: true, top_logprobs: 4, dart };
      await ask(body, (record) => this.#take(box, record), this.stopper.signal);
      if (!finished(box.answer)) throw new Error("the connection ended before the answer did");
      if (box.answer.error) throw new Error(box.answer.error);
    } catch (error) {
      if (this.stopper.signal.aborted) this.#stopped(box);
      else this.#failed(box, error);
    }
    this.#draw(); // no frame comes while the tab is in the background
    return undefined;
  }

  #take(box, record) {
    fold(box.answer, record);
    if (record.kind === "remask" && record.cause === rebuilt(box.answer).at(-1)?.cause) {
      announce(`Masks rebuilt at token ${record.step}.`);
    }
    if (record.kind === "done") announce(`${box.answer.label}: finished, ${counted(box.answer.tokens.length, "token")}.`);
    if (!this.undrawn) requestAnimationFrame(() => this.#draw());
    this.undrawn = box;
  }

  /** Show everything that arrived since the last frame, at once. */
  #draw() {
    const box = this.undrawn;
    if (!box) return;
    this.undrawn = null;
    this.#follow(() => box.update());
    if (box.answer === this.view.answer) this.view.refresh();
  }

  #stopped(box) {
    if (!box.answer.done) fold(box.answer, { kind: "done", finish_reasons: ["cancelled"] });
    box.update();
    this.view.refresh();
    announce("Stopped.");
  }

  /** Say why; the question goes back to where it was typed. */
  #failed(box, error) {
    const said = inLabels(error.message, error.param);
    box.fail(said);
    announce(said, true);
    const message = byId("message");
    if (!message.value) message.value = this.turns.at(-1).question;
  }

  /** The messages so far; where a side has no answer of its own, the other side's stands in. */
  #messages(side) {
    const messages = [];
    for (const turn of this.turns) {
      const box = turn.boxes[side] ?? turn.boxes[0];
      const now = turn === this.turns.at(-1);
      if (!now && (!box.answer.start || box.answer.error)) continue; // it got no whole answer
      messages.push({ role: "user", content: turn.question });
      if (!now) messages.push({ role: "assistant", content: textOf(box.answer) });
    }
    return messages;
  }

  /** Keep the newest text in sight while `change` adds to it, unless the reader scrolled up. */
  #follow(change) {
    const box = byId("scroller");
    const near = box.scrollHeight - box.scrollTop - box.clientHeight < 160;
    change();
    if (near) box.scrollTop = box.scrollHeight;
  }

  #working(stopper) {
    this.stopper = stopper;
    byId("send").hidden = Boolean(stopper);
    const wasThere = document.activeElement === byId("stop");
    byId("stop").hidden = !stopper;
    if (stopper && document.activeElement === document.body) byId("stop").focus({ preventScroll: true });
    if (!stopper && wasThere) byId("message").focus({ preventScroll: true });
    if (stopper) announce("Sent. The answer is being written.");
  }
}
