// Numbers as text.

const DASH = "\u2013";

/** 0.196 as "19.6 %"; an unknown value as a dash. */
export function percent(share, digits = 1) {
  return share == null || !Number.isFinite(share) ? DASH : `${(100 * share).toFixed(digits)} %`;
}

/** A requested share: 0.333 as "33.3 %", 0.1 as "10 %". */
export const exactly = (share) => `${Number((100 * share).toFixed(2))} %`;

/** A number with few digits; an unknown value as a dash. */
export function plain(value, digits = 0) {
  return value == null || !Number.isFinite(value) ? DASH : value.toFixed(digits);
}

/** "1 token", "2 tokens". */
export const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Text of a token with visible white space. */
export const visible = (text) => text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u00b7") || "\u2205";

const CAUSES = {
  first: "the first mask",
  prompt: "a new prompt",
  drift: "the text differs from its beginning",
  interval: "the interval passed",
  fixed: "user-supplied masks",
  forced: "requested",
};

/** The reason for a mask as text. */
export const causeInWords = (cause) => CAUSES[cause] ?? cause;
