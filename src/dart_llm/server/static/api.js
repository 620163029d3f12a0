// The page's requests, all to its own server.

import { byId, el } from "./dom.js";
import { documents } from "./sse.js";

const KEY = "dart-llm key";

/** JSON of a GET; throws an Error whose message can be shown. */
export async function get(path) {
  return (await answered(path, {})).json();
}

/** The name of a run, encoded for a URL. */
export const inAddress = (name) => name.split("/").map(encodeURIComponent).join("/");

/** Save a file of the server under this name. */
export async function download(path, name) {
  const url = URL.createObjectURL(await (await answered(path, {})).blob());
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const WORK = 8; // milliseconds for which records are processed before the page may draw

/** Request an answer; `onRecord` gets every record on arrival.  `signal` stops the request. */
export async function ask(body, onRecord, signal) {
  const response = await answered("/api/events", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let since = performance.now();
  for await (const record of documents(response, lost)) {
    signal.throwIfAborted();
    onRecord(record);
    if (performance.now() - since < WORK) continue;
    await pause(); // so that clicks are handled and the page is drawn before the next records
    since = performance.now();
  }
}

const pause = () => new Promise((done) => setTimeout(done));

async function answered(path, options) {
  let response = await sent(path, options);
  while (response.status === 401 && (await keyGiven())) response = await sent(path, options);
  if (response.ok) return response;
  throw await refusal(response);
}

function sent(path, options, key = sessionStorage.getItem(KEY)) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers }).catch(lost);
}

const GONE = "The server does not answer: it was stopped, or the connection broke. Restart the server, then retry here.";

/** Throw the same message for every browser's connection error; rethrow the error of a stopped request. */
function lost(error) {
  throw error.name === "AbortError" ? error : new Error(GONE);
}

/** The server's error message as an Error; `param`: the invalid field, if any. */
async function refusal(response) {
  const wait = response.headers.get("Retry-After");
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? body.message ?? body.detail;
  const text = typeof message === "string" ? message : `the server answered ${response.status}`;
  const full = wait && !text.includes("try again") ? `${text} (try again in ${wait} s)` : text;
  return Object.assign(new Error(full), { param: body.error?.param });
}

/** Whether requests send a key; the server then refuses plain links. */
export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

let asking = null; // one dialog for all requests that wait for a key

/** Ask the user for the server's key; false if the user cancels. */
function keyGiven() {
  asking ??= askForKey().finally(() => (asking = null));
  return asking;
}

/** The dialog stays open until a key is accepted or the user cancels. */
function askForKey() {
  const dialog = byId("ask-key");
  const show = (text) => (byId("key-said").textContent = text);
  dialog.returnValue = "";
  show(hasKey() ? NOT_ACCEPTED : "");
  dialog.querySelector("form").onsubmit = async (event) => {
    if (event.submitter?.value === "cancel") return;
    event.preventDefault();
    const key = byId("key").value;
    const problem = await refused(key);
    show(problem);
    if (problem) return byId("key").select();
    sessionStorage.setItem(KEY, key);
    return dialog.close("ok");
  };
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
}

const NOT_ACCEPTED = "The server does not accept this key.";

/** Why this key cannot be used, or "" if it can. */
async function refused(key) {
  try {
    const response = await sent("/v1/models", {}, key);
    return response.status === 401 ? NOT_ACCEPTED : "";
  } catch (error) {
    return error.message;
  }
}
