// The conversation: sends requests one after the other and passes their records to the page.

import { ask } from "./api.js";
import { fold, finished, rebuilt, textOf } from "./answer.js";
import { asDense, chosen, inLabels, nameOf } from "./controls.js";
import { announce, byId, calm } from "./dom.js";
import { counted } from "./format.js";
import { forget, keep, kept } from "./kept.js";
import { Turn } from "./turn.js";

const HINT = byId("detail").textContent; // how to show a token's numbers
const nameNow = () => `window-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;

const HINTS = { new: byId("hint").textContent, edit: "Sending replaces this question and removes all later turns; Escape cancels" };

export class Chat {
  /** `on.asked()` is called when a question is sent, `on.empty()` when the conversation was cleared. */
  constructor(view, model, on) {
    this.view = view;
    this.model = model;
    this.on = on;
    this.stopper = null;
    this.undrawn = null; // the turn and box whose new records wait for the next frame
    this.editing = null; // the turn whose question is being edited
    this.turns = [];
    this.conversation = nameNow();
    const before = kept();
    if (before) this.#restore(before);
  }

  get busy() {
    return this.stopper !== null;
  }

  get boxes() {
    return this.turns.flatMap((turn) => turn.boxes);
  }

  /** Start a new conversation. */
  anew() {
    this.stopper?.abort();
    forget();
    this.turns = [];
    this.conversation = nameNow();
    this.#edit(null);
    this.view.clear();
    byId("turns").replaceChildren();
    byId("detail").textContent = HINT;
    byId("welcome").hidden = false;
    this.on.empty();
  }

  /** Continue the conversation stored in this tab. */
  #restore({ conversation, turns }) {
    this.conversation = conversation;
    for (const { question, answers } of turns) {
      const turn = this.#turn(question, answers.map((answer) => answer.label));
      for (const [i, box] of turn.boxes.entries()) {
        box.answer = answers[i];
        box.redraw();
        box.end();
      }
      turn.compare();
    }
    if (!this.turns.length) return;
    this.show(this.turns.at(-1).boxes[0]);
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
  }

  /** Add a turn at the end of the page, with an empty box per label. */
  #turn(question, labels) {
    if (!this.turns.length) byId("turns").replaceChildren();
    const turn = new Turn(question, labels, {
      token: (box, index) => this.view.read(box, index),
      retry: (again) => this.#retry(again),
      edit: (edited) => this.busy || this.#edit(edited),
    });
    this.turns.push(turn);
    for (const [i, box] of this.boxes.entries()) box.place = i + 1;
    byId("welcome").hidden = true;
    byId("turns").append(turn.element);
    return turn;
  }

  /** Ask a turn's question again with the current settings; later turns are removed. */
  #retry(turn) {
    if (this.busy) return;
    if (byId("message").value === turn.question) byId("message").value = "";
    this.#drop(turn);
    this.send(turn.question);
  }

  /** Remove this turn and all later turns; the next question does not include them. */
  #drop(turn) {
    const at = this.turns.indexOf(turn);
    for (const removed of this.turns.splice(at)) removed.element.remove();
    this.conversation = nameNow();
  }

  /** Put a turn's question into the input field; null: end editing. */
  #edit(turn) {
    this.editing = turn;
    byId("hint").textContent = turn ? HINTS.edit : HINTS.new;
    if (!turn) return;
    byId("message").value = turn.question;
    byId("message").focus();
  }

  leaveEditing() {
    if (!this.editing) return;
    byId("message").value = "";
    this.#edit(null);
  }

  show(box) {
    for (const other of this.boxes) other.shown(other === box);
    this.view.show(box);
  }

  /** Show the answer with this number, from 1, as in its URL. */
  look(place) {
    const box = this.boxes[place - 1];
    if (!box) return;
    this.show(box);
    box.element.scrollIntoView({ block: "nearest" });
  }

  stop() {
    this.stopper?.abort();
  }

  /** Send a question; with `compare`, request the dense answer after the pruned answer. */
  async send(question) {
    const { dart, maxTokens, compare } = chosen();
    const jobs = [dart];
    if (compare && nameOf(dart) !== "Dense") jobs.push(asDense());
    if (this.editing) this.#drop(this.editing);
    this.#edit(null);
    jobs[0].conversation = this.conversation;
    if (jobs[1]) jobs[1].conversation = `${this.conversation}-dense`;
    this.on.asked();
    const turn = this.#turn(question, jobs.map(nameOf));
    const { boxes } = turn;
    keep(this.conversation, this.turns);
    this.show(boxes[0]);
    turn.element.scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
    this.#working(new AbortController());
    try {
      for (const [side, job] of jobs.entries()) await this.#answer(turn, side, job, maxTokens);
    } finally {
      this.#working(null);
      if (this.turns.includes(turn)) keep(this.conversation, this.turns);
    }
  }

  async #answer(turn, side, dart, maxTokens) {
    const box = turn.boxes[side];
    if (this.stopper.signal.aborted) return box.fail("stopped before the answer began");
    this.#follow(() => box.wait("waiting for the model"));
    try {
      const body = { model: this.model(), messages: this.#messages(side), max_tokens: maxTokens, temperature: 0,
        stream: true, logprobs: true, top_logprobs: 4, dart };
      await ask(body, (record) => this.#take(turn, box, record), this.stopper.signal);
      if (!finished(box.answer)) throw new Error("the connection closed before the answer was complete");
      if (box.answer.error) throw new Error(box.answer.error);
    } catch (error) {
      if (this.stopper.signal.aborted) this.#stopped(box);
      else this.#failed(turn, box, error);
    }
    this.#draw(); // because browsers request no frames while the tab is in the background
    turn.compare();
    return undefined;
  }

  #take(turn, box, record) {
    fold(box.answer, record);
    if (record.kind === "remask" && record.cause === rebuilt(box.answer).at(-1)?.cause) {
      announce(`Masks rebuilt at token ${record.step}.`);
    }
    if (record.kind === "done") announce(`${box.answer.label}: finished, ${counted(box.answer.tokens.length, "token")}.`);
    if (!this.undrawn) requestAnimationFrame(() => this.#draw());
    this.undrawn = { turn, box };
  }

  /** Draw all records that arrived since the last frame. */
  #draw() {
    if (!this.undrawn) return;
    const { turn, box } = this.undrawn;
    this.undrawn = null;
    this.#follow(() => {
      box.update();
      turn.compare();
    });
    if (box.answer === this.view.answer) this.view.refresh();
  }

  #stopped(box) {
    if (!box.answer.done) fold(box.answer, { kind: "done", finish_reasons: ["cancelled"] });
    box.update();
    this.view.refresh();
    announce("Stopped.");
  }

  /** Show the reason, and put the question back into the input field. */
  #failed(turn, box, error) {
    const reason = inLabels(error.message, error.param);
    box.fail(reason);
    announce(reason, true);
    const message = byId("message");
    if (!message.value) message.value = turn.question;
  }

  /** The messages so far; side 0 is pruned, side 1 dense.  A turn without a dense answer gives the first. */
  #messages(side) {
    const messages = [];
    for (const turn of this.turns) {
      const box = turn.boxes[side] ?? turn.boxes[0];
      const now = turn === this.turns.at(-1);
      if (!now && (!box.answer.start || box.answer.error)) continue; // without a complete answer
      messages.push({ role: "user", content: turn.question });
      if (!now) messages.push({ role: "assistant", content: textOf(box.answer) });
    }
    return messages;
  }

  /** Keep the newest text in view while `change` adds to it, unless the user scrolled up. */
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
