// One answer, folded from its records; everything that the page shows is derived from here.

/** An answer of which nothing has arrived. */
export function newAnswer(label = "") {
  return {
    label, start: null, tokens: [], checks: [], remasks: [], masks: [], done: null, error: null,
    others: [], records: [], offset: 0,
  };
}

/**
 * Take in one record; returns the answer.  Steps of a conversation go on counting from answer to
 * answer: the first mask tells how many came before, and `step` becomes this answer's own.
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

/** The masks that were built while the text was being written. */
export const rebuilt = (answer) => answer.remasks.filter((mask) => !OPENING.includes(mask.cause));

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Share of all neurons that a mask removes; layers may differ in width. */
function removedBy(mask, widths) {
  const total = widths.reduce((sum, width) => sum + width, 0);
  return 1 - mask.kept_share.reduce((sum, share, layer) => sum + share * widths[layer], 0) / total;
}

/**
 * The mask of the token `index`, of the newest token where that is null: the newest one that was in
 * force by then.  While a text is observed for the next mask every neuron runs, and this is the last one.
 */
export function maskAt(answer, index = null) {
  if (index === null) return answer.masks.at(-1) ?? null;
  return answer.masks.findLast((mask) => mask.token <= index) ?? null;
}

/** The mask that another one took the place of, or null. */
export const maskBefore = (answer, mask) => answer.masks[answer.masks.indexOf(mask) - 1] ?? null;

/** The first and the last token of a detector's window: windows follow each other from the mask on. */
export function spanOf(answer, check) {
  const mask = maskAt(answer, check.step);
  const tokens = Math.max(1, Math.round((check.step - (mask ? mask.token - 1 : 0)) / check.window));
  return [check.step - tokens + 1, check.step];
}

/** Fraction removed, mean over decoded tokens; dense ones count 0.  null before the first. */
export function achieved(answer) {
  const report = answer.done?.report;
  if (report) return report.decoded_tokens ? report.achieved_sparsity : null;
  const decoded = answer.tokens.slice(1);
  if (!decoded.length) return null;
  const widths = answer.start.neurons;
  const known = new Map(answer.masks.map((mask) => [mask, removedBy(mask, widths)]));
  return mean(
    decoded.map((token) => (token.phase === "pruned" ? (known.get(maskAt(answer, token.index)) ?? 0) : 0)),
  );
}

/** Share of the decoded tokens that ran dense. */
export function denseShare(answer) {
  const report = answer.done?.report;
  if (report) return report.decoded_tokens ? report.dense_token_share : null;
  const decoded = answer.tokens.slice(1);
  return decoded.length ? mean(decoded.map((token) => (token.phase === "pruned" ? 0 : 1))) : null;
}

/** Decoded tokens per second; the first token is the prompt's. */
export function speed(answer) {
  if (answer.done?.timings?.predicted_per_second) return answer.done.timings.predicted_per_second;
  const seconds = answer.tokens.slice(1).map((token) => token.seconds);
  const total = seconds.reduce((sum, value) => sum + value, 0);
  return total > 0 ? seconds.length / total : null;
}

/** Index of the first token in which two answers differ, or null while they are the same. */
export function parting(one, other) {
  const length = Math.min(one.tokens.length, other.tokens.length);
  for (let i = 0; i < length; i++) if (one.tokens[i].id !== other.tokens[i].id) return i;
  const ended = (answer, rest) => finished(answer) && rest.tokens.length > length;
  return ended(one, other) || ended(other, one) ? length : null;
}
