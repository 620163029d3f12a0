// Plays a recorded answer without a model: in a replay page, and as the greeting on the live page.

import { fold, newAnswer } from "./answer.js";
import { nameOf } from "./controls.js";
import { byId, calm, el } from "./dom.js";
import { question } from "./question.js";
import { Turn } from "./turn.js";

const LONGEST_WAIT = 1; // seconds, so that a slow prompt does not delay the recording
const AGAIN = 6; // seconds of pause before a looped recording starts again

/** The records in the page, or null on a live page. */
export function recorded() {
  const element = byId("records");
  return element && JSON.parse(element.textContent);
}

export class Player {
  /** `loop`: true if the recording repeats forever. */
  constructor(view, loop = false) {
    this.view = view;
    this.loop = loop;
    this.records = [];
    this.timer = null;
    byId("player").addEventListener("submit", (event) => event.preventDefault());
    byId("play").addEventListener("click", () => (this.timer ? this.pause() : this.play()));
    byId("position").addEventListener("input", () => {
      this.pause();
      this.jump(Number(byId("position").value));
    });
    byId("speed").addEventListener("change", () => this.timer && this.play());
  }

  /** Create the boxes for these records, show the first frame, and play unless reduced motion is preferred. */
  open(records) {
    this.records = records;
    byId("position").max = records.length;
    this.#lay();
    this.jump(this.#firstFrame());
    if (!calm()) this.play();
  }

  /** Stop, before other content replaces the recording. */
  close() {
    this.pause();
    this.records = [];
  }

  /** Show the answer with this number, from 1. */
  look(place) {
    const box = [...this.boxes.values()][place - 1];
    if (box) this.#show(box);
  }

  /** Create a box for every answer; answers to the same question are side by side. */
  #lay() {
    const questions = [];
    for (const start of this.records.filter((record) => record.kind === "start")) {
      const text = start.prompt.map((token) => token.text).join("");
      const last = questions.at(-1);
      if (last?.text === text && last.starts.length < 2) last.starts.push(start);
      else questions.push({ text, starts: [start] });
    }
    this.boxes = new Map();
    this.turns = questions.map(({ text, starts }) => {
      const turn = new Turn(question(starts[0].prompt), starts.map(nameOf), { token: (box, index) => this.view.read(box, index) });
      for (const [i, start] of starts.entries()) {
        this.boxes.set(start, turn.boxes[i]);
        turn.boxes[i].place = this.boxes.size;
      }
      turn.element.firstChild.after(el("details", { className: "prompt-tokens" }, el("summary", {}, "The prompt as the model reads it"),
        el("p", { tabIndex: 0, role: "region", "aria-label": "The prompt as the model reads it" }, text)));
      return turn;
    });
    byId("turns").replaceChildren(...this.turns.map((turn) => turn.element));
  }

  /** The number of records until the first mask is visible. */
  #firstFrame() {
    return this.records.findIndex((record) => record.kind === "token" && record.index > 0) + 1 || this.records.length;
  }

  #show(box) {
    for (const other of this.boxes.values()) other.shown(other === box);
    this.view.show(box);
  }

  play() {
    if (this.next >= this.records.length) this.jump(this.#firstFrame());
    this.#label("Pause");
    this.#later();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.#label("Play");
  }

  #label(word) {
    byId("play").textContent = word;
  }

  #later() {
    clearTimeout(this.timer);
    const token = this.records.slice(this.next, this.next + 16).find((record) => record.kind === "token");
    const seconds = Math.min(LONGEST_WAIT, token?.seconds ?? 0);
    this.timer = setTimeout(() => this.#tick(), (1000 * seconds) / Number(byId("speed").value));
  }

  /** Process records up to and including the next token. */
  #tick() {
    let record;
    do record = this.#take();
    while (record && record.kind !== "token");
    this.#position();
    if (this.next < this.records.length) this.#later();
    else if (this.loop) this.timer = setTimeout(() => this.play(), 1000 * AGAIN);
    else this.pause();
  }

  #take() {
    const record = this.records[this.next];
    if (!record) return undefined;
    this.next += 1;
    if (record.kind === "start") this.box = this.boxes.get(record);
    if (record.kind === "start" && !this.#beside(this.box)) this.#show(this.box);
    fold(this.box.answer, record);
    this.box.update();
    this.#turn(this.box).compare();
    this.view.refresh();
    return record;
  }

  #turn(box) {
    return this.turns.find((turn) => turn.boxes.includes(box));
  }

  /** Whether this is the second, dense answer of its turn; the first, pruned answer then stays in view. */
  #beside(box) {
    return this.#turn(box).boxes.indexOf(box) > 0;
  }

  /** Show the state after the first `count` records. */
  jump(count) {
    for (const box of this.boxes.values()) box.answer = newAnswer(box.answer.label);
    let shown = (this.box = this.boxes.values().next().value);
    this.next = count;
    for (const record of this.records.slice(0, count)) {
      if (record.kind === "start") {
        this.box = this.boxes.get(record);
        if (!this.#beside(this.box)) shown = this.box;
      }
      fold(this.box.answer, record);
    }
    for (const box of this.boxes.values()) box.redraw();
    for (const turn of this.turns) turn.compare();
    this.#show(shown);
    this.#position();
  }

  #position() {
    const tokens = this.records.slice(0, this.next).filter((r) => r.kind === "token").length;
    byId("position").value = this.next;
    byId("position-value").textContent = `${tokens} tokens`;
    byId("position").setAttribute("aria-valuetext", `${tokens} tokens`);
  }
}
