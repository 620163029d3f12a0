// A recorded run, played on the same page without a model.

import { fold, newAnswer } from "./answer.js";
import { nameOf } from "./controls.js";
import { byId, el } from "./dom.js";
import { AnswerBox, turnElement } from "./turn.js";
import { question } from "./question.js";

const LONGEST_WAIT = 1; // seconds, so that a slow prompt does not stop the show

/** The records in the page, or null on a live page. */
export function recorded() {
  const held = byId("records");
  return held && JSON.parse(held.textContent);
}

export class Player {
  constructor(records, view) {
    this.view = view;
    this.records = records;
    this.next = 0;
    this.timer = null;
    byId("model").textContent = records.find((r) => r.kind === "start")?.model ?? "a recorded run";
    byId("position").max = records.length;
    byId("player").addEventListener("submit", (event) => event.preventDefault());
    byId("play").addEventListener("click", () => (this.timer ? this.pause() : this.play()));
    byId("position").addEventListener("input", () => this.jump(Number(byId("position").value)));
    byId("speed").addEventListener("change", () => this.timer && this.play());
    this.#lay();
    this.jump(records.length); // something to see before it plays
    this.#show(this.boxes.values().next().value);
  }

  /** Boxes for every answer; those to one question stand side by side. */
  #lay() {
    this.boxes = new Map();
    const turns = [];
    for (const record of this.records.filter((r) => r.kind === "start")) {
      const asked = record.prompt.map((token) => token.text).join("");
      const box = new AnswerBox(nameOf(record), (shown) => this.#show(shown));
      this.boxes.set(record, box);
      const last = turns.at(-1);
      if (last?.asked === asked && last.boxes.length < 2) last.boxes.push(box);
      else turns.push({ asked, question: question(record.prompt), boxes: [box] });
    }
    byId("turns").replaceChildren(...turns.map(({ asked, question: said, boxes }) => {
      const item = turnElement(said, boxes);
      const whole = el("details", { className: "prompt-tokens" }, el("summary", {}, "The prompt as the model reads it"),
        el("p", { tabIndex: 0, role: "region", "aria-label": "The prompt as the model reads it" }, asked));
      item.firstChild.after(whole);
      return item;
    }));
  }

  #show(box) {
    for (const other of this.boxes.values()) other.shown(other === box);
    this.view.show(box.answer);
  }

  play() {
    if (this.next >= this.records.length) this.jump(0);
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

  /** Take records up to and with the next token. */
  #tick() {
    let record;
    do record = this.#take();
    while (record && record.kind !== "token");
    this.#position();
    if (this.next >= this.records.length) this.pause();
    else this.#later();
  }

  #take() {
    const record = this.records[this.next];
    if (!record) return undefined;
    this.next += 1;
    if (record.kind === "start") this.#show((this.box = this.boxes.get(record)));
    fold(this.box.answer, record);
    this.box.update();
    this.view.refresh();
    return record;
  }

  /** The state after the first `count` records. */
  jump(count) {
    for (const box of this.boxes.values()) box.answer = newAnswer(box.answer.label);
    this.box = this.boxes.values().next().value;
    this.next = count;
    for (const record of this.records.slice(0, count)) {
      if (record.kind === "start") this.box = this.boxes.get(record);
      fold(this.box.answer, record);
    }
    for (const box of this.boxes.values()) box.redraw();
    this.#show(this.box);
    this.#position();
  }

  #position() {
    const tokens = this.records.slice(0, this.next).filter((r) => r.kind === "token").length;
    byId("position").value = this.next;
    byId("position-value").textContent = `${tokens} tokens`;
    byId("position").setAttribute("aria-valuetext", `${tokens} tokens`);
  }
}
