// The reader's question inside a prompt that went through a chat template.

const SPECIAL = /<\|?[a-z_0-9]+\|?>/i;

/** The newest user message, or the whole text where no template is recognised. */
export function question(prompt) {
  const parts = prompt.split(new RegExp(SPECIAL, "gi")).map((part) => part.trim());
  const at = parts.findLastIndex((part) => /^user\b/.test(part));
  if (at < 0) return parts.filter(Boolean).join("\n").trim();
  return parts[at].replace(/^user\s*/, "") || parts.slice(at + 1).find(Boolean) || prompt;
}
