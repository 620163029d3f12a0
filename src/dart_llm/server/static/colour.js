// Colours of the neuron map.  More kept neurons are inkier: the ramps run from the page's background
// to its text colour and change only in lightness, so that they are readable in grey and with every
// kind of colour vision.

const RAMPS = {
  light: [[243, 240, 233], [214, 219, 218], [160, 181, 188], [92, 131, 150], [29, 78, 108], [9, 29, 51]],
  dark: [[20, 27, 34], [33, 53, 68], [56, 88, 108], [98, 140, 160], [161, 197, 212], [235, 243, 246]],
};
/** Colours of neurons that a re-mask added and dropped. */
const CHANGES = {
  light: { grown: [214, 104, 22], dropped: [74, 134, 214] },
  dark: { grown: [214, 92, 12], dropped: [47, 110, 196] },
};

const theme = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
const mixed = (base, other, part) => base.map((value, i) => Math.round(value + (other[i] - value) * part));

/** [red, green, blue] for a kept share from 0 to 1. */
function ramp(stops, share) {
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return mixed(stops[low], stops[low + 1], place - low);
}

/**
 * CSS colour of a group of neurons of which `share` is kept.  `change`: the share that the last
 * re-mask added, or dropped if negative.
 */
export function cellColour(share, change = 0) {
  const now = theme();
  const ink = ramp(RAMPS[now], share);
  if (!change) return `rgb(${ink.join(" ")})`;
  const part = Math.min(0.95, 0.3 + 2.5 * Math.abs(change));
  return `rgb(${mixed(ink, CHANGES[now][change > 0 ? "grown" : "dropped"], part).join(" ")})`;
}

/** Labels of the phases of a token, by CSS class. */
export const PHASES = {
  prefill: "from the prompt",
  observe: "dense, observed",
  pruned: "pruned",
  released: "dense again",
  dense: "dense",
};

/** Lack of confidence in five steps; 0 means sure. */
export function doubt(probability) {
  if (probability == null || probability >= 0.8) return 0;
  return [0.5, 0.25, 0.1].filter((bound) => probability < bound).length + 1;
}

export const DOUBTS = ["sure", "under 80 %", "50 %", "25 %", "10 %"];
