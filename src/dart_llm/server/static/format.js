// Numbers as people read them.

const DASH = "\u2013";

/** 0.196 as "19.6 %"; nothing known is a dash. */
export function percent(share, digits = 1) {
  return share == null || !Number.isFinite(share) ? DASH : `${(100 * share).toFixed(digits)} %`;
}

/** A share as it was asked for: 0.333 as "33.3 %", 0.1 as "10 %". */
export const exactly = (share) => `${Number((100 * share).toFixed(2))} %`;

/** A number with few digits; nothing known is a dash. */
export function plain(value, digits = 0) {
  return value == null || !Number.isFinite(value) ? DASH : value.toFixed(digits);
}

/** "1 token", "2 tokens". */
export const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Text of a token with its white space made visible. */
export const visible = (text) => text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u00b7") || "\u2205";

const CAUSES = {
  first: "the first mask",
  prompt: "a new prompt",
  drift: "unlike the beginning",
  interval: "the interval passed",
  fixed: "user-supplied masks",
  forced: "requested",
};

/** Why a mask was built, in words. */
export const causeInWords = (cause) => CAUSES[cause] ?? cause;
