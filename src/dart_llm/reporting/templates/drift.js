(() => {
  "use strict";
  const phone = window.matchMedia("(max-width: 600px)");
  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
  const LARGE = 3; // nats over dense at which a token's shade is full

  function layoutOf(figure) {
    const layout = structuredClone(figure.layout);
    if (!phone.matches) return layout;
    for (const [path, value] of Object.entries(figure.narrow)) {
      const keys = path.split("."), last = keys.pop();
      let place = layout;
      for (const key of keys) place = place[key] = place[key] || {};
      place[last] = value;
    }
    return layout;
  }

  function show(box) {
    const select = box.querySelector("select");
    const blocks = box.querySelectorAll("script");
    const block = blocks[select ? select.selectedIndex : 0];
    const figure = JSON.parse(block.textContent);
    const canvas = box.querySelector(".canvas");
    box.querySelector("h3").textContent = block.dataset.title;
    box.querySelector("small").textContent = block.dataset.small;
    canvas.setAttribute("aria-label", block.dataset.alt);
    Plotly.react(canvas, figure.data, layoutOf(figure), CONFIG);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      show(entry.target);
    }
  }, { rootMargin: "600px" });
  const boxes = document.querySelectorAll(".figures");
  for (const box of boxes) {
    seen.observe(box);
    const select = box.querySelector("select");
    if (select) select.addEventListener("change", () => show(box));
  }
  const again = () => boxes.forEach((box) => box.querySelector(".js-plotly-plot") && show(box));
  phone.addEventListener("change", again);
  window.addEventListener("beforeprint", () => boxes.forEach(show));

  // A passage's tokens, shaded by the loss of one method over dense.
  function nats(value) {
    return value === null ? "not scored" : value.toFixed(2);
  }

  function fill(box) {
    const data = JSON.parse(box.querySelector("script").textContent);
    const text = box.querySelector(".text"), readout = box.querySelector(".readout");
    const select = box.querySelector("select");
    const topicOf = (place) => data.topics.filter((topic) => topic.start <= place).pop();
    text.textContent = "";
    const spans = data.pieces.map((piece, place) => {
      const start = data.topics.findIndex((topic, n) => n > 0 && topic.start === place);
      if (start > 0) {
        const mark = document.createElement("b");
        mark.className = "change";
        mark.textContent = "change of topic: " + data.topics[start].name;
        text.append(mark);
      }
      const span = document.createElement("span");
      span.textContent = piece;
      span.dataset.place = place;
      text.append(span);
      return span;
    });
    function shade() {
      const own = data.losses[select.value], dense = data.losses.dense;
      spans.forEach((span, place) => {
        const known = own && own[place] !== null && dense && dense[place] !== null;
        const over = known ? own[place] - dense[place] : 0;
        const part = Math.max(0, Math.min(1, over / LARGE));
        span.style.background = part > 0.05 ? `rgba(200, 110, 30, ${(0.75 * part).toFixed(2)})` : "";
        span.className = over >= 1 ? "costly" : "";
      });
    }
    let current = -1;
    function tell(place) {
      if (!(place >= 0 && place < spans.length)) return;
      if (current >= 0) spans[current].removeAttribute("aria-current");
      current = place;
      spans[place].setAttribute("aria-current", "true");
      const topic = topicOf(place);
      const since = topic && topic !== data.topics[0] ? `, ${place - topic.start} after the change` : "";
      const told = Object.entries(data.losses).map(([name, own]) => `${name} ${nats(own[place])}`);
      readout.textContent = `token ${place}${since}, ${JSON.stringify(data.pieces[place])}: ` +
        `loss in nats: ${told.join(", ")}`;
    }
    for (const event of ["pointerover", "click"]) {
      text.addEventListener(event, (e) => tell(Number(e.target.dataset.place ?? -1)));
    }
    text.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (!step) return;
      e.preventDefault();
      tell(Math.max(0, Math.min(spans.length - 1, current + step)));
    });
    select.addEventListener("change", shade);
    shade();
  }

  for (const box of document.querySelectorAll("details.tokens")) {
    const open = () => {
      if (box.open && !box.dataset.filled) {
        box.dataset.filled = "yes";
        fill(box);
      }
    };
    box.addEventListener("toggle", open);
    open();
  }
})();
