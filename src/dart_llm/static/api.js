// What the page asks of its own server, and nothing else.

import { byId } from "./dom.js";
import { documents } from "./sse.js";

const KEY = "dart-llm key";

/** JSON of a GET; throws an Error whose message can be shown. */
export async function get(path) {
  return (await answered(path, {})).json();
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
  if (response.status === 401 && (await keyGiven())) response = await sent(path, options);
  if (response.ok) return response;
  throw await refusal(response);
}

function sent(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers }).catch(lost);
}

const GONE = "The server does not answer: it has ended, or the connection broke. Start it again, then reload this page.";

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
  const whole = wait && !text.includes("second") ? `${text} (try again in ${wait} s)` : text;
  return Object.assign(new Error(whole), { param: body.error?.param });
}

/** Ask the reader for the key of the server; false when there is none. */
function keyGiven() {
  const dialog = byId("ask-key");
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const key = byId("key").value;
        if (dialog.returnValue === "ok" && key) sessionStorage.setItem(KEY, key);
        resolve(dialog.returnValue === "ok" && Boolean(key));
      },
      { once: true },
    );
    if (!dialog.open) dialog.showModal();
  });
}
