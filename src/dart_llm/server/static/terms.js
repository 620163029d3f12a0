// Six technical terms, explained in place: on hover, focus and touch.

import { byId } from "./dom.js";

const TERMS = {
  neuron: "FFN neuron: one of the hidden units of a layer’s feed-forward network. Skipping it saves one row of each of its weight matrices.",
  sparsity: "Sparsity: the fraction of FFN neurons that are removed; at 10 %, nine in ten run.",
  mask: "Mask: the set of neurons that run; the others are removed. It is selected from the tokens read so far and fixed until a re-mask.",
  drift: "Drift: the text no longer resembles the tokens from which the mask was selected. The detector compares each window of tokens with the beginning; its rule says how many low windows in a row count as drift.",
  remask: "Re-mask: after drift, all neurons run for a while, and their activations determine the next mask.",
  dense: "Dense token: a token that ran with all neurons, because a new mask was being prepared.",
};

/** A single box for all terms, below the term or, if there is no room, above it. */
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
