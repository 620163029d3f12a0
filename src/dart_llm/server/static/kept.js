// The conversation, kept in this tab so that a reload or the Back button does not lose it.

import { fold, newAnswer } from "./answer.js";

const NAME = "dart-llm conversation";

/** Keep the conversation: as many of its newest turns as the browser has room for. */
export function keep(conversation, turns) {
  const held = turns.map(({ question, boxes }) => ({
    question,
    answers: boxes.map(({ answer }) => ({ label: answer.label, records: answer.records, error: answer.error })),
  }));
  while (held.length) {
    if (stored(JSON.stringify({ conversation, turns: held }))) return;
    held.shift();
  }
  forget();
}

/** What was kept: its name, and its turns with whole answers; null where there is nothing. */
export function kept() {
  try {
    const { conversation, turns } = JSON.parse(sessionStorage.getItem(NAME));
    return { conversation, turns: turns.map(({ question, answers }) => ({ question, answers: answers.map(folded) })) };
  } catch {
    return null; // nothing is kept, or what another version of this page kept
  }
}

function folded({ label, records, error }) {
  const answer = records.reduce(fold, newAnswer(label));
  answer.error ??= error ?? (answer.done ? null : "the page was left before the answer ended");
  return answer;
}

export const forget = () => sessionStorage.removeItem(NAME);

function stored(text) {
  try {
    sessionStorage.setItem(NAME, text);
    return true;
  } catch {
    return false; // no room
  }
}
