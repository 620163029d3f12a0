// The state of an answer, built from the server's records (events such as a token or a new mask).
// The page derives everything that it shows from this state.

/** An answer without records. */
export function newAnswer(label = "") {
  return {
    label, start: null, tokens: [], checks: [], remasks: [], masks: [], done: null, error: null,
    others: [], records: [], offset: 0,
  };
}

/**
 * Add a record to an answer and return the answer.  The server counts steps across all answers of a
 * conversation; `step` is converted to count within this answer, with an offset that the first mask
 * gives.
 */
export function fold(answer, record) {
  answer.records.push(record);
  if (record.kind === "start") answer.start = record;
  else if (record.kind === "token") (record.choice ? answer.others : answer.tokens).push(record);
  else if (record.kind === "check") answer.checks.push({ ...record, step: record.step - answer.offset });
  else if (record.kind === "remask") answer.remasks.push({ ...record, step: record.step - answer.offset });
  else if (record.kind === "mask") newMask(answer, record);
  else if (record.kind === "done") answer.done = record;
  else if (record.kind === "error") answer.error = record.message;
  return answer;
}

function newMask(answer, mask) {
  const made = answer.remasks.at(-1);
  if (!answer.masks.length && made) {
    answer.offset = made.step + 1 - mask.token;
    made.step -= answer.offset;
  }
  answer.masks.push(mask);
}

export const isDense = (answer) => answer.start?.method === "dense" || answer.start?.sparsity === 0;
export const finished = (answer) => Boolean(answer.done || answer.error);
export const textOf = (answer) => answer.done?.texts?.[0] ?? answer.tokens.map((t) => t.text).join("");

const OPENING = ["first", "fixed", "prompt"];

/** The masks that were built during generation. */
export const rebuilt = (answer) => answer.remasks.filter((mask) => !OPENING.includes(mask.cause));

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Share of all neurons that a mask removes; layers may differ in width. */
function removedBy(mask, widths) {
  const total = widths.reduce((sum, width) => sum + width, 0);
  return 1 - mask.kept_share.reduce((sum, share, layer) => sum + share * widths[layer], 0) / total;
}

/**
 * The newest mask at the token `index` (null: the newest token).  While all neurons run, because the
 * text is observed for the next mask, this is still the previous mask.
 */
export function maskAt(answer, index = null) {
  if (index === null) return answer.masks.at(-1) ?? null;
  return answer.masks.findLast((mask) => mask.token <= index) ?? null;
}

/** The mask before `mask`, or null. */
export const maskBefore = (answer, mask) => answer.masks[answer.masks.indexOf(mask) - 1] ?? null;

/** The first and the last token of a detector's window; windows follow each other after a mask. */
export function spanOf(answer, check) {
  const mask = maskAt(answer, check.step);
  const tokens = Math.max(1, Math.round((check.step - (mask ? mask.token - 1 : 0)) / check.window));
  return [check.step - tokens + 1, check.step];
}

/** Fraction of neurons removed, mean over decoded tokens; dense tokens count 0.  null without tokens. */
export function achieved(answer) {
  const report = answer.done?.report;
  if (report) return report.decoded_tokens ? report.achieved_sparsity : null;
  const decoded = answer.tokens.slice(1);
  if (!decoded.length) return null;
  const widths = answer.start.neurons;
  const removed = new Map(answer.masks.map((mask) => [mask, removedBy(mask, widths)]));
  return mean(
    decoded.map((token) => (token.phase === "pruned" ? (removed.get(maskAt(answer, token.index)) ?? 0) : 0)),
  );
}

/** Share of the decoded tokens that ran dense. */
export function denseShare(answer) {
  const report = answer.done?.report;
  if (report) return report.decoded_tokens ? report.dense_token_share : null;
  const decoded = answer.tokens.slice(1);
  return decoded.length ? mean(decoded.map((token) => (token.phase === "pruned" ? 0 : 1))) : null;
}

/** Decoded tokens per second; the first token comes from the prompt and does not count. */
export function speed(answer) {
  if (answer.done?.timings?.predicted_per_second) return answer.done.timings.predicted_per_second;
  const seconds = answer.tokens.slice(1).map((token) => token.seconds);
  const total = seconds.reduce((sum, value) => sum + value, 0);
  return total > 0 ? seconds.length / total : null;
}

/** Index of the first token in which two answers differ, or null as long as they are identical. */
export function parting(answer, other) {
  const length = Math.min(answer.tokens.length, other.tokens.length);
  for (let i = 0; i < length; i++) if (answer.tokens[i].id !== other.tokens[i].id) return i;
  const isPrefix = (shorter, longer) => finished(shorter) && longer.tokens.length > length;
  return isPrefix(answer, other) || isPrefix(other, answer) ? length : null;
}
