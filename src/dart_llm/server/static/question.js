// The reader's question inside a prompt that went through a chat template.

const SPECIAL = /^<\|?[a-z_0-9]+\|?>$/i;

/** The newest user message of these prompt tokens, or all their text where there is no template. */
export function question(tokens) {
  const parts = [""];
  for (const { text } of tokens) {
    if (SPECIAL.test(text.trim())) parts.push("");
    else parts[parts.length - 1] += text;
  }
  const said = parts.map((part) => part.trim());
  const at = said.findLastIndex((part) => /^user\b/.test(part));
  if (at < 0) return said.filter(Boolean).join("\n");
  return said[at].replace(/^user\s*/, "") || said.slice(at + 1).find(Boolean) || "";
}
