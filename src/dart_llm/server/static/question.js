// Finds the user's question in a prompt that a chat template produced.

const SPECIAL = /^<\|?[a-z_0-9]+\|?>$/i;

/** The newest user message in these prompt tokens, or their whole text without a template. */
export function question(tokens) {
  const parts = [""];
  for (const { text } of tokens) {
    if (SPECIAL.test(text.trim())) parts.push("");
    else parts[parts.length - 1] += text;
  }
  const texts = parts.map((part) => part.trim());
  const at = texts.findLastIndex((part) => /^user\b/.test(part));
  if (at < 0) return texts.filter(Boolean).join("\n");
  return texts[at].replace(/^user\s*/, "") || texts.slice(at + 1).find(Boolean) || "";
}
