// Stores the conversation in the browser tab, so that a reload or the Back button does not lose it.

import { fold, newAnswer } from "./answer.js";

const NAME = "dart-llm conversation";

/** Store the newest turns of the conversation, as many as the browser has space for. */
export function keep(conversation, turns) {
  const newest = turns.map(({ question, boxes }) => ({
    question,
    answers: boxes.map(({ answer }) => ({ label: answer.label, records: answer.records, error: answer.error })),
  }));
  while (newest.length) {
    if (stored(JSON.stringify({ conversation, turns: newest }))) return;
    newest.shift();
  }
  forget();
}

/** The stored conversation: its name, and its turns with rebuilt answers; null if there is none. */
export function kept() {
  try {
    const { conversation, turns } = JSON.parse(sessionStorage.getItem(NAME));
    return { conversation, turns: turns.map(({ question, answers }) => ({ question, answers: answers.map(folded) })) };
  } catch {
    return null; // nothing is stored, or another version of this page stored it
  }
}

function folded({ label, records, error }) {
  const answer = records.reduce(fold, newAnswer(label));
  answer.error ??= error ?? (answer.done ? null : "the page was closed before the answer was complete");
  return answer;
}

export const forget = () => sessionStorage.removeItem(NAME);

function stored(text) {
  try {
    sessionStorage.setItem(NAME, text);
    return true;
  } catch {
    return false; // no space
  }
}
