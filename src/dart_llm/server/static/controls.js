// The settings of the next answer, as the `dart` key of a request.

import { byId, el } from "./dom.js";
import { exactly } from "./format.js";

const DENSE = "dense";
const NUMBERED = { interval: "interval 64", windows: "windows 10 1 3" }; // example numbers for rules that need numbers

/** Fill the selects from /api/methods and show the server's defaults. */
export function fillControls(listing) {
  const defaults = listing.defaults ?? {};
  const methods = listing.methods.filter((method) => !method.name.startsWith(DENSE));
  byId("method").replaceChildren(...methods.map((method) => option(method.name, methodName(method), {
    disabled: method.ready === false, selected: method.name === defaults.method,
    title: method.ready === false ? `${method.summary} Not prepared; ${howReady(method.name)}` : method.summary })));
  const selected = () => listing.methods.find((method) => method.name === byId("method").value) ?? {};
  const rules = listing.drift_rules.map((rule) => {
    const value = NUMBERED[rule.name] ?? rule.name;
    return option(value, value, { title: rule.summary });
  });
  const unready = methods.filter((method) => method.ready === false).map((method) => method.name);
  byId("method-hint").textContent = unready.length ? `For methods that calibrate first, ${howReady(unready.join(","))}` : "";
  byId("drift").replaceChildren(option("", "", {}), ...rules);
  const showDefaults = () => {
    byId("drift").options[0].textContent = `default: ${selected().drift ?? "?"}`;
    byId("masking-step").placeholder = `default: ${selected().masking_step ?? 0}`;
  };
  byId("method").addEventListener("change", showDefaults);
  showDefaults();
  for (const name of ["method", "drift", "max-tokens", "masking-step"]) byId(name).addEventListener("change", inOneLine);
  if (listing.limits?.max_tokens) atMost(byId("max-tokens"), listing.limits.max_tokens);
  slideTo(defaults.sparsity ?? 0);
  byId("sparsity").addEventListener("input", showSparsity);
  inOneLine();
}

/** Show the other settings in the text of their button; values that are the method's defaults are omitted. */
function inOneLine() {
  const { dart, maxTokens } = chosen();
  const drift = dart.drift && `drift ${dart.drift}`;
  const step = dart.masking_step == null ? "" : `${dart.masking_step} dense tokens first`;
  const text = [dart.method, drift, step, `at most ${maxTokens} tokens`].filter(Boolean).join(" \u00b7 ");
  byId("more").textContent = text;
  byId("more").setAttribute("aria-label", `Method, drift rule, limits: ${text}`);
}

function atMost(field, limit) {
  field.max = limit;
  field.value = Math.min(field.value, limit);
}

let exact = { place: "", sparsity: 0 }; // the slider's position that slideTo last set, and its exact sparsity

/** Show a sparsity; it is sent exactly, even if it lies between two steps of the slider. */
function slideTo(sparsity) {
  const slider = byId("sparsity");
  slider.max = Math.max(slider.max, Math.ceil(100 * sparsity));
  slider.value = 100 * sparsity;
  exact = { place: slider.value, sparsity };
  showSparsity();
}

function sparsityNow() {
  const place = byId("sparsity").value;
  return place === exact.place ? exact.sparsity : Number(place) / 100;
}

/** Select the settings with which an example prompt was measured, as far as this server offers them. */
export function choose({ method, drift, sparsity }) {
  for (const [name, value] of Object.entries({ method, drift })) {
    if ([...byId(name).options].some((item) => item.value === value && !item.disabled)) byId(name).value = value;
  }
  byId("method").dispatchEvent(new Event("change"));
  slideTo(sparsity);
  inOneLine();
}

const option = (value, text, settings) => el("option", { value, ...settings }, text);
const howReady = (names) => `start the server with --methods ${names}`;
const methodName = (method) => (method.ready === false ? `${method.name} (not prepared)` : method.name);

function showSparsity() {
  const shown = exactly(sparsityNow());
  byId("sparsity-value").textContent = shown;
  byId("sparsity").setAttribute("aria-valuetext", `${shown} of the neurons removed`);
}

/** The current settings without empty fields, so that the server's or method's defaults apply to those. */
export function chosen() {
  const step = byId("masking-step").value;
  const drift = byId("drift").value;
  return {
    dart: {
      method: byId("method").value,
      sparsity: sparsityNow(),
      ...(step === "" ? {} : { masking_step: Number(step) }),
      ...(drift === "" ? {} : { drift }),
    },
    maxTokens: Number(byId("max-tokens").value) || 192,
    compare: byId("compare").checked,
  };
}

const FIELDS = { max_tokens: "max-tokens", masking_step: "masking-step", sparsity: "sparsity", drift: "drift", method: "method" };

/** An error message of the server, with the field's name replaced by its label on this page. */
export function inLabels(message, param) {
  const name = (param ?? "").split(".").at(-1);
  if (!(name in FIELDS)) return message;
  const label = document.querySelector(`label[for="${FIELDS[name]}"]`).textContent;
  return message.replace(new RegExp(`(?:dart\\.)?\\b${name}\\b`), `\u201c${label}\u201d`);
}

/** The `dart` key that requests the dense answer. */
export const asDense = () => ({ method: DENSE, sparsity: 0 });

/** A short name for an answer. */
export function nameOf(dart) {
  return dart.method === DENSE || dart.sparsity === 0 ? "Dense" : `${dart.method}, ${exactly(dart.sparsity)} sparsity`;
}
