// Past runs: the list of results folders, filtered while you type.

import { get } from "./api.js";
import { byId, el } from "./dom.js";
import { percent } from "./format.js";
import { showRun } from "./run.js";

export class Runs {
  constructor() {
    this.runs = [];
    byId("runs-filter").addEventListener("input", () => this.#fill());
  }

  /** Ask the server for its runs and show them. */
  async open() {
    byId("runs-title").focus();
    try {
      const found = await get("/api/runs");
      this.runs = found.runs ?? found;
      this.#fill();
    } catch (error) {
      byId("runs-note").textContent = `The runs cannot be listed: ${error.message}`;
    }
  }

  #fill() {
    const wanted = byId("runs-filter").value.trim().toLowerCase();
    const found = this.runs.filter((run) => JSON.stringify(Object.values(run)).toLowerCase().includes(wanted));
    byId("runs-list").replaceChildren(...found.map((run) => this.#item(run)));
    if (!this.runs.length) byId("runs-note").textContent = "No results folder yet: dart-llm run makes one.";
    else byId("runs-note").textContent = `${found.length} of ${this.runs.length} results folders, newest first.`;
  }

  #item(run) {
    const asked = run.sparsities.map((sparsity) => percent(sparsity, 0)).join(", ");
    const button = el("button", { type: "button" },
      el("strong", {}, `${run.experiment} \u00b7 ${run.kind}`),
      el("span", {}, [run.methods.join(", "), asked].filter(Boolean).join(" at ")),
      el("small", {}, [run.models.join(", "), when(run), run.status].filter(Boolean).join(" \u00b7 ")));
    button.addEventListener("click", () => this.#open(run, button));
    return el("li", {}, button);
  }

  async #open(run, button) {
    for (const other of byId("runs-list").querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    const box = byId("run");
    box.replaceChildren(el("p", { className: "soft" }, "Reading the folder."));
    try {
      const name = run.name.split("/").map(encodeURIComponent).join("/");
      showRun(box, await get(`/api/runs/${name}`));
    } catch (error) {
      box.replaceChildren(el("p", { className: "failure" }, `The run cannot be opened: ${error.message}`));
    }
  }
}

function when(run) {
  const time = run.started ? new Date(run.started) : null;
  return time ? time.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) : run.time;
}
