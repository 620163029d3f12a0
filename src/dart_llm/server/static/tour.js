// A tour in three steps: ask, watch, remove more.

import { byId } from "./dom.js";

const STEPS = [
  ["1", "Ask something with two parts",
    "The first example prompt asks for an explanation and then for code. Press Next to send it, with the settings with which it was measured. Colours show how each token ran: pruned, or dense and observed."],
  ["2", "Watch the neurons",
    "Each row is a layer. When code begins, the similarity of a window of ten tokens to the beginning of the answer falls below the threshold. All neurons run for 32 tokens, then new neurons are selected: a re-mask. Other models and settings may behave differently."],
  ["3", "Remove more",
    "Raise the sparsity and ask again: the headline shows what changed. Point at a word, a dot or a cell to highlight the others that belong to it. Colour by confidence to see where the model was unsure."],
];

export class Tour {
  constructor() {
    this.step = -1;
    byId("tour-next").addEventListener("click", () => this.#next());
    byId("tour-close").addEventListener("click", () => this.close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !byId("tour").hidden && !byId("ask-key").open) this.close();
    });
    byId("show-tour").addEventListener("click", () => {
      byId("show-chat").click();
      this.go(0);
    });
  }

  /** Go to the second step when a question is asked. */
  asked() {
    if (!byId("tour").hidden && !this.step) this.go(1, byId("tour").contains(document.activeElement));
  }

  /** In the first step, Next sends the highlighted prompt. */
  #next() {
    const prompt = this.step ? null : document.querySelector('[data-tour="1"]');
    if (prompt?.checkVisibility()) prompt.click();
    else this.go(this.step + 1);
  }

  go(step, focus = true) {
    this.#unpoint();
    if (step >= STEPS.length) return this.close();
    const [target, title, text] = STEPS[(this.step = step)];
    byId("tour-count").textContent = `Step ${step + 1} of ${STEPS.length}`;
    byId("tour-title").textContent = title;
    byId("tour-text").textContent = text;
    byId("tour-next").textContent = step + 1 < STEPS.length ? "Next" : "Done";
    byId("tour").hidden = false;
    const pointed = document.querySelector(`[data-tour="${target}"]`);
    pointed?.classList.add("pointed");
    if (!focus) return undefined;
    byId("tour-title").focus({ preventScroll: true });
    pointed?.scrollIntoView({ block: "nearest" });
    return undefined;
  }

  close() {
    this.#unpoint();
    const typing = document.activeElement !== document.body && !byId("tour").contains(document.activeElement);
    byId("tour").hidden = true;
    if (!typing) byId("show-tour").focus();
  }

  #unpoint() {
    document.querySelector(".pointed")?.classList.remove("pointed");
  }
}
