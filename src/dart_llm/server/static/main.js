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

/** Every view has an address: #runs, #runs/NAME, and all others are the conversation. */
function pages(runs) {
  const open = () => {
    const [page, ...name] = location.hash.slice(1).split("/");
    const shown = page === "runs" ? "runs" : "chat";
    for (const one of ["chat", "runs"]) {
      byId(`page-${one}`).hidden = one !== shown;
      byId(`show-${one}`).removeAttribute("aria-current");
    }
    byId(`show-${shown}`).setAttribute("aria-current", "page");
    if (shown === "runs") runs.open(name.map(decoded).join("/"));
  };
  const go = (name) => (location.hash === `#${name}` ? open() : (location.hash = name));
  addEventListener("hashchange", open);
  byId("show-chat").addEventListener("click", () => go("chat"));
  byId("show-runs").addEventListener("click", () => go("runs"));
  open();
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // typed by hand
  }
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
    if (prompt.dart) button.dataset.dart = JSON.stringify(prompt.dart);
    button.addEventListener("click", () => chat.busy || chat.send(prompt.text));
    return el("li", {}, button);
  });
  byId("prompts").replaceChildren(...items);
}

function live() {
  let model = "";
  const chat = new Chat(new View(), () => model);
  const tour = new Tour();
  pages(new Runs());
  composer(chat);
  unfold();
  byId("reconnect").addEventListener("click", () => connect(chat, tour, (name) => (model = name)));
  byId("reconnect").click();
}

/** Learn what the server has; where it does not answer, a button asks again. */
async function connect(chat, tour, named) {
  byId("reconnect").hidden = true;
  byId("model").textContent = "connecting";
  try {
    const [models, listing, ready] = await Promise.all(["/v1/models", "/api/methods", "/api/prompts"].map(get));
    named((byId("model").textContent = models.data[0].id));
    fillControls(listing);
    readyPrompts(ready.prompts, chat);
    tour.offer();
  } catch (error) {
    byId("model").textContent = `no connection: ${error.message}`;
    byId("reconnect").hidden = false;
    announce(error.message, true);
  }
}

paintBy();
const records = recorded();
if (records) new Player(records, new View());
else live();
