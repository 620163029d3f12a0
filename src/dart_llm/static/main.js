// Joins the parts of the page.

import { get } from "./api.js";
import { Chat } from "./chat.js";
import { fillControls } from "./controls.js";
import { announce, byId, el } from "./dom.js";
import { Player, recorded } from "./player.js";
import { Runs } from "./runs.js";
import { legend } from "./text.js";
import { Tour } from "./tour.js";
import { View } from "./view.js";

function paintBy() {
  const choices = document.querySelectorAll('input[name="paint"]');
  const show = () => {
    const paint = [...choices].find((choice) => choice.checked).value;
    document.body.dataset.paint = paint;
    legend(paint);
  };
  for (const choice of choices) choice.addEventListener("change", show);
  show();
}

/** The further settings are open where there is room, and folded on a narrow screen. */
function unfold() {
  const wide = matchMedia("(min-width: 900px)");
  const show = () => (byId("more").open = wide.matches);
  wide.addEventListener("change", show);
  show();
}

function pages(runs) {
  const open = (name) => {
    byId("page-chat").hidden = name !== "chat";
    byId("page-runs").hidden = name !== "runs";
    for (const page of ["chat", "runs"]) byId(`show-${page}`).removeAttribute("aria-current");
    byId(`show-${name}`).setAttribute("aria-current", "page");
    if (name === "runs") runs.open();
  };
  byId("show-chat").addEventListener("click", () => open("chat"));
  byId("show-runs").addEventListener("click", () => open("runs"));
}

function composer(chat) {
  const message = byId("message");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = message.value.trim();
    if (chat.busy || !question) return;
    message.value = "";
    chat.send(question);
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("settings").addEventListener("submit", (event) => event.preventDefault());
  byId("stop").addEventListener("click", () => chat.stop());
  byId("anew").addEventListener("click", () => {
    chat.anew();
    message.focus();
  });
}

function readyPrompts(prompts, chat) {
  const items = prompts.map((prompt, i) => {
    const button = el("button", { type: "button" },
      el("strong", {}, prompt.title), el("q", {}, prompt.text), el("small", {}, prompt.note ?? ""));
    if (!i) button.dataset.tour = "1";
    button.addEventListener("click", () => chat.busy || chat.send(prompt.text));
    return el("li", {}, button);
  });
  byId("prompts").replaceChildren(...items);
}

async function live() {
  let model = "";
  const chat = new Chat(new View(), () => model);
  pages(new Runs());
  composer(chat);
  unfold();
  try {
    const [models, listing, ready] = await Promise.all(["/v1/models", "/api/methods", "/api/prompts"].map(get));
    model = models.data[0].id;
    byId("model").textContent = model;
    fillControls(listing);
    readyPrompts(ready.prompts, chat);
    new Tour().offer();
  } catch (error) {
    byId("model").textContent = `no connection: ${error.message}`;
    announce(error.message, true);
  }
}

paintBy();
const records = recorded();
if (records) new Player(records, new View());
else live();
