// The conversation: sends requests one after the other and hands their records to the page.

import { ask } from "./api.js";
import { fold, finished, newAnswer, rebuilt, textOf } from "./answer.js";
import { asDense, chosen, nameOf } from "./controls.js";
import { announce, byId, calm } from "./dom.js";
import { counted } from "./format.js";
import { AnswerBox, sayParting, turnElement } from "./turn.js";

const nameNow = () => `window-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;

export class Chat {
  constructor(view, model) {
    this.view = view;
    this.model = model;
    this.boxes = [];
    this.stopper = null;
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
    document.dispatchEvent(new Event("asked"));
    byId("turns").append(turnElement(question, boxes));
    this.show(boxes[0]);
    byId("turns").lastElementChild.scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
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
    box.wait("waiting for the model");
    this.#follow();
    try {
      const body = { model: this.model(), messages: this.#messages(side), max_tokens: maxTokens, temperature: 0,
        stream: true, logprobs: true, top_logprobs: 4, dart };
      await ask(body, (record) => this.#take(box, record), this.stopper.signal);
      if (!finished(box.answer)) box.fail("the connection ended before the answer did");
    } catch (error) {
      if (this.stopper.signal.aborted) this.#stopped(box);
      else this.#failed(box, error);
    }
    return undefined;
  }

  #take(box, record) {
    fold(box.answer, record);
    box.update(record);
    if (record.kind === "remask" && record.cause === rebuilt(box.answer).at(-1)?.cause) {
      announce(`Masks rebuilt at token ${record.step}.`);
    }
    if (record.kind === "done") announce(`${box.answer.label}: finished, ${counted(box.answer.tokens.length, "token")}.`);
    if (box.answer === this.view.answer) this.view.refresh();
    this.#follow();
  }

  #stopped(box) {
    box.answer.done ??= { finish_reasons: ["cancelled"] };
    box.end();
    this.view.refresh();
    announce("Stopped.");
  }

  #failed(box, error) {
    box.fail(error.message);
    announce(error.message, true);
  }

  /** The messages so far; where a side has no answer of its own, the other side's stands in. */
  #messages(side) {
    const messages = [];
    for (const turn of this.turns) {
      messages.push({ role: "user", content: turn.question });
      const box = turn.boxes[side] ?? turn.boxes[0];
      if (turn !== this.turns.at(-1)) messages.push({ role: "assistant", content: textOf(box.answer) });
    }
    return messages;
  }

  /** Keep the newest text in sight, unless the reader scrolled up. */
  #follow() {
    const box = byId("scroller");
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
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
