// The settings of the next answer, as the `dart` key of a request.

import { byId, el } from "./dom.js";

const DENSE = "dense";

/** Fill the selects from /api/methods and show the server's defaults. */
export function fillControls(listing) {
  const defaults = listing.defaults ?? {};
  const methods = listing.methods.filter((method) => method.name !== DENSE);
  options(byId("method"), methods, defaults.method);
  const rules = listing.drift_rules.map((rule) => ({ ...rule, value: ruleValue(rule.name) }));
  options(byId("drift"), [{ name: "the method\u2019s own", value: "" }, ...rules], defaults.drift ?? "");
  if (defaults.sparsity != null) byId("sparsity").value = 100 * defaults.sparsity;
  if (defaults.masking_step != null) byId("masking-step").placeholder = String(defaults.masking_step);
  byId("sparsity").addEventListener("input", showSparsity);
  showSparsity();
}

const ruleValue = (name) => (name === "interval" ? "interval 64" : name);

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map((entry) => {
    const value = entry.value ?? entry.name;
    return el("option", { value, title: entry.summary ?? "", selected: value === chosen }, value || entry.name);
  }));
}

export function showSparsity() {
  byId("sparsity-value").textContent = `${byId("sparsity").value} %`;
  byId("sparsity").setAttribute("aria-valuetext", `${byId("sparsity").value} percent of the neurons removed`);
}

/** What the reader chose now; fields left empty are the server's or the method's own. */
export function chosen() {
  const step = byId("masking-step").value;
  const drift = byId("drift").value;
  return {
    dart: {
      method: byId("method").value,
      sparsity: Number(byId("sparsity").value) / 100,
      ...(step === "" ? {} : { masking_step: Number(step) }),
      ...(drift === "" ? {} : { drift }),
    },
    maxTokens: Number(byId("max-tokens").value) || 192,
    compare: byId("compare").checked,
  };
}

/** The same request, dense. */
export const asDense = (dart) => ({ method: DENSE, sparsity: 0, conversation: dart.conversation });

/** A short name for an answer. */
export function nameOf(dart) {
  return dart.method === DENSE || dart.sparsity === 0 ? "Dense" : `${dart.method}, ${Math.round(100 * dart.sparsity)} % sparsity`;
}
