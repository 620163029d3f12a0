// What the page asks of its own server, and nothing else.

import { byId, el } from "./dom.js";
import { documents } from "./sse.js";

const KEY = "dart-llm key";

/** JSON of a GET; throws an Error whose message can be shown. */
export async function get(path) {
  return (await answered(path, {})).json();
}

/** The name of a run inside an address. */
export const inAddress = (name) => name.split("/").map(encodeURIComponent).join("/");

/** Give the reader a file of the server under this name. */
export async function download(path, name) {
  const url = URL.createObjectURL(await (await answered(path, {})).blob());
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const WORK = 8; // milliseconds of taking records in before the page gets its turn

/** Ask for an answer; `onRecord` gets every record as it comes.  `signal` stops it. */
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
    await pause(); // clicks and drawing come before the records that wait already
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

const GONE = "The server does not answer: it has ended, or the connection broke. Start it again, then try again here.";

/** What a broken connection is called by browsers differs; a stopped request stays what it is. */
function lost(error) {
  throw error.name === "AbortError" ? error : new Error(GONE);
}

/** What the server said, as an Error; `param`: the field that is wrong, where it is one. */
async function refusal(response) {
  const wait = response.headers.get("Retry-After");
  const body = await response.json().catch(() => ({}));
  const said = body.error?.message ?? body.message ?? body.detail;
  const text = typeof said === "string" ? said : `the server answered ${response.status}`;
  const whole = wait && !text.includes("try again") ? `${text} (try again in ${wait} s)` : text;
  return Object.assign(new Error(whole), { param: body.error?.param });
}

/** Whether requests carry a key: an address alone, as of a link, is then refused. */
export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

let asking = null; // one question for all the requests that wait for a key

/** Ask the reader for the key of the server; false when there is none. */
function keyGiven() {
  asking ??= askForKey().finally(() => (asking = null));
  return asking;
}

/** The dialog stays until a key is accepted or the reader gives up. */
function askForKey() {
  const dialog = byId("ask-key");
  const said = (text) => (byId("key-said").textContent = text);
  dialog.returnValue = "";
  said(hasKey() ? NOT_ACCEPTED : "");
  dialog.querySelector("form").onsubmit = async (event) => {
    if (event.submitter?.value === "cancel") return;
    event.preventDefault();
    const key = byId("key").value;
    const wrong = await refused(key);
    said(wrong);
    if (wrong) return byId("key").select();
    sessionStorage.setItem(KEY, key);
    return dialog.close("ok");
  };
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
}

const NOT_ACCEPTED = "That key is not accepted.";

/** Why this key cannot be used; "" where it can. */
async function refused(key) {
  try {
    const response = await sent("/v1/models", {}, key);
    return response.status === 401 ? NOT_ACCEPTED : "";
  } catch (error) {
    return error.message;
  }
}
