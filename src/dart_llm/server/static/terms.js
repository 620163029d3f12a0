// Six words of the field, explained where they stand: on hover, on focus and on a touch.

import { byId } from "./dom.js";

const TERMS = {
  neuron: "FFN neuron: one of the inner numbers of a layer’s feed-forward network. Skipping it saves one row of each of its weight matrices.",
  sparsity: "Sparsity: the share of FFN neurons that is removed; 10 % means that nine in ten run.",
  mask: "Mask: which neurons run and which are removed, selected by the tokens read so far and fixed until a re-mask.",
  drift: "Drift: the text moves away from what the mask was chosen for. The detector compares each window of tokens with the beginning; several low windows in a row, as its rule says, count as drift.",
  remask: "Re-mask: after drift every neuron runs for a while, and what they do then decides the next mask.",
  dense: "Dense token: a token that ran with all neurons, because a new mask was being prepared.",
};

/** One box for all of them, below the word or above it where there is no room. */
export function explainTerms() {
  const tip = byId("tip");
  const hide = () => {
    tip.hidden = true;
    for (const word of document.querySelectorAll(".term")) word.removeAttribute("aria-describedby");
  };
  const show = (word) => {
    hide();
    tip.textContent = TERMS[word.dataset.term];
    tip.hidden = false;
    word.setAttribute("aria-describedby", "tip");
    const { left, top, bottom } = word.getBoundingClientRect();
    const above = bottom + tip.offsetHeight + 12 > innerHeight;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above ? top - tip.offsetHeight - 6 : bottom + 6}px`;
  };
  for (const word of document.querySelectorAll(".term")) {
    for (const name of ["pointerenter", "focus", "click"]) word.addEventListener(name, () => show(word));
    for (const name of ["pointerleave", "blur"]) word.addEventListener(name, hide);
  }
  addEventListener("scroll", hide, true);
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
}
