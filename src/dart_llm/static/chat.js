// The conversation: sends requests one after the other and hands their records to the page.

import { ask } from "./api.js";
import { fold, finished, newAnswer, rebuilt, textOf } from "./answer.js";
import { asDense, chosen, inLabels, nameOf } from "./controls.js";
import { announce, byId, calm } from "./dom.js";
import { counted } from "./format.js";
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
    this.anew();
  }

  get busy() {
    return this.stopper !== null;
  }

  /** Forget the conversation. */
  anew() {
    this.stopper?.abort();
    this.view.show(newAnswer("Nothing has been answered yet"));
    this.turns = [];
    this.conversation = nameNow();
    byId("turns").replaceChildren();
    byId("detail").textContent = HINT;
    byId("welcome").hidden = false;
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
    const boxes = jobs.map((job) => new AnswerBox(nameOf(job), (box) => this.show(box)));
    const turn = { question, boxes };
    this.turns.push(turn);
    byId("welcome").hidden = true;
    byId("turns").append(turnElement(question, boxes));
    this.show(boxes[0]);
    byId("turns").lastElementChild.scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
    document.dispatchEvent(new Event("asked"));
    this.#working(new AbortController());
    try {
      for (const [side, job] of jobs.entries()) await this.#answer(turn, side, job, maxTokens);
      if (boxes.length > 1 && boxes.every((box) => box.answer.done)) sayParting(boxes[0], boxes[1]);
    } finally {
      this.#working(null);
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
      if (!finished(box.answer)) box.fail("the connection ended before the answer did");
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
    box.answer.done ??= { finish_reasons: ["cancelled"] };
    box.update();
    this.view.refresh();
    announce("Stopped.");
  }

  /** Say why; a question that got no answer at all goes back to where it was typed. */
  #failed(box, error) {
    const said = inLabels(error.message, error.param);
    box.fail(said);
    announce(said, true);
    const message = byId("message");
    if (!box.answer.start && !message.value) message.value = this.turns.at(-1).question;
  }

  /** The messages so far; where a side has no answer of its own, the other side's stands in. */
  #messages(side) {
    const messages = [];
    for (const turn of this.turns) {
      const box = turn.boxes[side] ?? turn.boxes[0];
      const now = turn === this.turns.at(-1);
      if (!now && !box.answer.start) continue; // refused: the model never saw it
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
