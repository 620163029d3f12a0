// Past runs: the list of results folders, filtered during typing.

import { get, inAddress } from "./api.js";
import { byId, el } from "./dom.js";
import { exactly } from "./format.js";
import { showRun } from "./run.js";

export class Runs {
  constructor() {
    this.runs = [];
    this.total = 0;
    this.shown = ""; // name of the run that is open
    byId("runs-filter").addEventListener("input", () => this.#fill());
  }

  /** Show the list, and the run of this name; without a name, the first run. */
  async open(name) {
    if (!name || !this.runs.length) await this.#list();
    const first = name || this.runs[0]?.name;
    if (first) await this.#show(first);
    else byId("run").replaceChildren();
  }

  async #list() {
    byId("runs-title").focus();
    try {
      const listing = await get("/api/runs");
      this.runs = listing.runs;
      this.total = listing.total ?? listing.runs.length;
      this.#fill();
    } catch (error) {
      byId("runs-note").textContent = `The runs cannot be listed: ${error.message}`;
    }
  }

  #fill() {
    const query = byId("runs-filter").value.trim();
    const matches = this.runs.filter((run) => JSON.stringify(Object.values(run)).toLowerCase().includes(query.toLowerCase()));
    byId("runs-list").replaceChildren(...matches.map((run) => this.#item(run)));
    byId("runs-note").textContent = note(matches.length, this.runs.length, this.total, query);
    this.#mark();
  }

  #item(run) {
    const requested = run.sparsities.map(exactly).join(", ");
    const button = el("button", { type: "button" },
      el("strong", {}, `${run.experiment} \u00b7 ${run.kind}`),
      el("span", {}, [run.methods.join(", "), requested].filter(Boolean).join(" at ")),
      el("small", {}, [run.models.join(", "), when(run), run.status].filter(Boolean).join(" \u00b7 ")),
      el("small", {}, run.name)); // distinguishes runs of the same experiment and minute
    button.dataset.name = run.name;
    button.addEventListener("click", () => (location.hash = `runs/${inAddress(run.name)}`));
    return el("li", {}, button);
  }

  #mark() {
    for (const button of byId("runs-list").querySelectorAll("button")) {
      if (button.dataset.name === this.shown) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }

  async #show(name) {
    this.shown = name;
    this.#mark();
    const box = byId("run");
    box.replaceChildren(el("p", { className: "soft" }, "Reading the results folder."));
    try {
      const run = await get(`/api/runs/${inAddress(name)}`);
      if (this.shown === name) showRun(box, run);
    } catch (error) {
      box.replaceChildren(el("p", { className: "failure" }, `The run cannot be opened: ${error.message}`));
    }
  }
}

function note(matching, listed, total, query) {
  if (!total) return "No results folders yet: commands such as dart-llm run, compare and drift write them.";
  if (!matching) return `No results folder has \u201c${query}\u201d in its name, kind, method, model or task: clear the field to see all.`;
  const rest = listed < total ? ` (${total} in total)` : "";
  return `${matching} of ${listed === total ? total : `the ${listed} newest`} results folders, newest first${rest}.`;
}

function when(run) {
  const time = run.started ? new Date(run.started) : null;
  return time ? time.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" }) : run.time;
}
