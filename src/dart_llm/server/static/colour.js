// One sequential ramp, dark blue over green to pale rose: lightness rises all the way, so that it
// reads the same for every kind of colour vision and in grey.

const STOPS = [
  [9, 24, 56], [14, 46, 86], [24, 72, 98], [52, 96, 93], [93, 113, 77],
  [144, 129, 62], [199, 145, 74], [238, 163, 115], [251, 186, 160], [253, 217, 208],
];

/** [red, green, blue] of a share from 0 to 1. */
function ramp(share) {
  const place = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((value, i) => Math.round(value + (STOPS[low + 1][i] - value) * (place - low)));
}

const TABLE = Array.from({ length: 256 }, (_, value) => `rgb(${ramp(value / 255).join(" ")})`);

/** CSS colour of a value from 0 to 255. */
export const rampColour = (value) => TABLE[Math.min(255, Math.max(0, Math.round(value)))];

const DIVERGING = { more: [214, 120, 60], less: [38, 92, 150] };

/** CSS colour of a change of share from -1 to 1: blue went dark, orange came alive. */
export function changeColour(change, paper) {
  const [red, green, blue] = change > 0 ? DIVERGING.more : DIVERGING.less;
  const alpha = Math.min(1, 4 * Math.abs(change));
  return change ? `rgb(${red} ${green} ${blue} / ${alpha})` : paper;
}

/** Phases of a token: its class, its word and what it means. */
export const PHASES = {
  prefill: "from the prompt",
  observe: "dense, observed",
  pruned: "pruned",
  released: "dense again",
  dense: "dense",
};

/** Loss of confidence in five steps: 0 is sure. */
export function doubt(probability) {
  if (probability == null || probability >= 0.8) return 0;
  return [0.5, 0.25, 0.1].filter((bound) => probability < bound).length + 1;
}

export const DOUBTS = ["sure", "under 80 %", "50 %", "25 %", "10 %"];
