// A past run: its facts, texts, drift windows, kept shares and tables.

import { newAnswer } from "./answer.js";
import { download, hasKey, inAddress } from "./api.js";
import { el } from "./dom.js";
import { drawDrift } from "./drift.js";
import { counted, exactly, percent, plain } from "./format.js";
import { NeuronView, summary } from "./neurons.js";
import { TextView } from "./text.js";

/** Show an opened run inside `box`. */
export function showRun(box, run) {
  const parts = [runHeading(run), report(run), facts(run), ...texts(run), ...tables(run), files(run)];
  box.replaceChildren(...parts.filter(Boolean));
  const answer = asAnswer(run);
  if (answer.checks.length) {
    const plot = el("div", { className: "plot" });
    place(box, "Does the text still resemble its beginning?", plot);
    drawDrift(plot, answer);
  }
  if (answer.masks.length) {
    const canvas = el("canvas", { role: "img" });
    place(box, "Kept share per layer, last mask (dark: kept)", el("div", { className: "plot" }, canvas));
    const neurons = new NeuronView(canvas, el("p"));
    neurons.show({ ...answer, tokens: [] }); // without tokens it shows the last mask
    neurons.label(summary(answer));
  }
  box.scrollTop = 0;
}

/** Insert a figure before the list of files. */
function place(box, title, content) {
  box.lastChild.before(el("figure", {}, el("figcaption", {}, el("h3", {}, title)), content));
}

function runHeading(run) {
  return el("h2", {}, `${run.experiment}, ${run.time}`);
}

const REPORT = "report.html";

/** A link that opens the run's report, or saves it if there is an API key, which a link cannot send. */
function report(run) {
  if (!run.files?.includes(REPORT)) return null;
  const path = `/api/runs/${inAddress(run.name)}/${REPORT}`;
  const link = el("a", { href: path, target: "_blank", rel: "noopener" }, hasKey() ? "Save the report" : "Open the report");
  link.addEventListener("click", (event) => {
    if (!hasKey()) return;
    event.preventDefault();
    download(path, `${run.name.replaceAll("/", "-")}.html`).catch((error) => link.after(` ${error.message}`));
  });
  return el("p", {}, link, " (all tables, texts and plots of the run on one page)");
}

function facts(run) {
  const report = pruned(run)?.accounting;
  const values = {
    "kind": run.kind, "status": run.status, "model": run.models.join(", "),
    "method": run.methods.join(", "),
    "sparsity requested": run.sparsities.map(exactly).join(", "),
    "removed": report && percent(report.achieved_sparsity),
    "tokens decoded dense": report && percent(report.dense_token_share),
    "re-masks": report && String(report.remasks),
    "took": run.seconds == null ? "" : `${plain(run.seconds, 1)} s`,
    "version": run.config?.versions?.["dart-llm"] ?? run.config?.versions?.dart_llm,
  };
  const entries = Object.entries(values).filter(([, value]) => value);
  return el("dl", { className: "facts" }, ...entries.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

const rows = (run) => run.generation ?? [];
const pruned = (run) => rows(run).find((row) => row.variant !== "dense" && row.accounting);

function texts(run) {
  const shown = rows(run).slice(0, 4);
  if (!shown.length) return [];
  const prompt = shown[0].prompt && el("p", { className: "question", "data-who": "Prompt" }, shown[0].prompt);
  const side = el("div", { className: shown.length > 1 ? "answers two" : "answers" }, ...shown.map(oneText));
  return [prompt, side];
}

function oneText(row) {
  const settings = row.method === "dense" ? "dense" : `${row.method} at ${exactly(row.sparsity)}`;
  const label = [row.variant, settings].filter((part, i, all) => part && part !== all[i - 1]).join(": ");
  const box = el("p", { className: "text", role: "group", "aria-label": label });
  new TextView(box).show(tokensOf(row));
  return el("article", { className: "answer" }, el("header", {}, el("strong", {}, label)), box);
}

function tokensOf(row) {
  const tokens = row.tokens ?? [row.text ?? ""];
  return tokens.map((text, index) => ({
    index, id: row.token_ids?.[index], text, phase: row.phases?.[index] ?? "dense", seconds: row.seconds?.[index],
  }));
}

const number = (text) => (text === "" || text == null ? null : Number(text));

/** An answer as on the live page, built from the run's files as far as they have the data. */
function asAnswer(run) {
  const answer = newAnswer();
  const masks = run.masks?.remasks ?? [];
  const layers = run.masks?.layers ?? [];
  answer.tokens = tokensOf(pruned(run) ?? {}).filter((token) => token.text);
  answer.remasks = masks;
  const windows = (run.drift ?? []).filter((row) => row.key == null); // rows with a key belong to studies of many texts
  answer.checks = windows.map((row) => ({
    sequence: number(row.sequence), row: number(row.row), step: number(row.step), layer: number(row.layer),
    window: number(row.window), similarity: number(row.similarity), threshold: number(row.threshold),
    counter: number(row.counter), state: row.state,
  }));
  if (layers.length && masks.length) {
    answer.start = { layers: layers.length, neurons: layers.map((layer) => layer.width) };
    answer.masks = [{ number: masks.length, token: masks.at(-1).step + 1, kept_share: layers.map((layer) => layer.kept_share) }];
  }
  return answer;
}

function tables(run) {
  return [results(run), allTables(run)];
}

/** Every result with the share of neurons removed for it. */
function results(run) {
  const heads = ["Task", "Method", "Metric", "Value", "Removed", "Decoded dense", "Re-masks"];
  const lines = (run.rows ?? []).map((row) => [
    row.task, row.label, row.metric, row.error ? "failed" : plain(row.value, Math.abs(row.value) < 10 ? 3 : 1),
    percent(row.achieved), percent(row.dense_share), plain(row.remasks),
  ]);
  return table("Results", heads, lines, 3);
}

const SCROLLS = { className: "scroll", tabIndex: 0, role: "region" }; // wide; also scrolls by keyboard

function allTables(run) {
  if (!run.tables) return null;
  const nothingElse = !rows(run).length && !run.rows?.length;
  return el("details", { open: nothingElse }, el("summary", {}, "All tables"),
    el("pre", { ...SCROLLS, "aria-label": "All tables" }, run.tables));
}

function table(title, heads, lines, numbersFrom) {
  if (!lines.length) return null;
  const cell = (tag, text, i) => el(tag, { className: i >= numbersFrom ? "number" : "" }, text ?? "");
  return el("div", { ...SCROLLS, "aria-label": title }, el("table", {}, el("caption", {}, title),
    el("thead", {}, el("tr", {}, ...heads.map((head, i) => cell("th", head, i)))),
    el("tbody", {}, ...lines.map((line) => el("tr", {}, ...line.map((text, i) => cell("td", String(text), i)))))));
}

function files(run) {
  return el("details", {}, el("summary", {}, `${counted(run.files?.length ?? 0, "file")} in this folder`),
    el("p", { className: "soft" }, (run.files ?? []).join(", ")));
}
