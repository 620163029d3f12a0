// Server-sent events of a fetch response, one JSON document per event.

/** Yields the documents of `data:` lines, without `[DONE]` and comments.  `lost` handles read errors. */
export async function* documents(response, lost) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    rest = (rest + (value ?? "")).replaceAll("\r\n", "\n");
    const events = rest.split("\n\n");
    rest = done ? "" : events.pop();
    for (const event of events) {
      const data = dataOf(event);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
    if (done) return;
  }
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}
