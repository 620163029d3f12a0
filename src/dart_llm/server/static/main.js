// Starts the page: connects its parts with each other and with the server.

import { get } from "./api.js";
import { Chat } from "./chat.js";
import { choose, fillControls, nameOf } from "./controls.js";
import { announce, byId, el } from "./dom.js";
import { Player, recorded } from "./player.js";
import { Runs } from "./runs.js";
import { explainTerms } from "./terms.js";
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

/** Show the view of the URL: #runs, #runs/NAME or #answer/NUMBER; any other shows the conversation. */
function pages(runs, answers) {
  const open = () => {
    const [page, ...name] = location.hash.slice(1).split("/");
    const shown = page === "runs" ? "runs" : "chat";
    for (const page of ["chat", "runs"]) {
      byId(`page-${page}`).hidden = page !== shown;
      byId(`show-${page}`).removeAttribute("aria-current");
    }
    byId(`show-${shown}`).setAttribute("aria-current", "page");
    if (shown === "runs") runs.open(name.map(decoded).join("/"));
    else if (page === "answer") answers.look(Number(name[0]));
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
    return part; // not encoded, because the user typed it
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
    if (event.key === "Escape") chat.leaveEditing();
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

/** Show the example prompts; a measured prompt also selects its settings. */
function readyPrompts(prompts, chat) {
  const items = prompts.map((prompt, i) => {
    const button = el("button", { type: "button", title: prompt.note ?? "" }, el("strong", {}, prompt.title), el("q", {}, prompt.text));
    if (!i) button.dataset.tour = "1";
    button.addEventListener("click", () => {
      if (chat.busy) return;
      if (prompt.dart) choose(prompt.dart);
      chat.send(prompt.text);
    });
    return el("li", {}, button);
  });
  byId("prompts").replaceChildren(...items);
}

/** Plays a recorded answer until the user asks a question. */
class Greeting {
  constructor(view) {
    this.player = new Player(view, true);
    this.records = null;
  }

  async show() {
    try {
      this.records ??= await get("/static/greeting.json");
    } catch {
      return; // the page works without it
    }
    if (byId("welcome").hidden) return;
    const { model } = this.records[0];
    document.body.dataset.greeting = "shown";
    byId("greeting-of").textContent = `A recording, until you ask something: ${model}, ${nameOf(this.records[0])}`;
    this.player.open(this.records);
  }

  hide() {
    delete document.body.dataset.greeting;
    this.player.close();
  }

  look(place) {
    if (document.body.dataset.greeting) this.player.look(place);
  }
}

function live() {
  let model = "";
  const view = new View();
  const tour = new Tour();
  const greeting = new Greeting(view);
  const chat = new Chat(view, () => model, {
    asked: () => {
      greeting.hide();
      tour.asked();
    },
    empty: () => greeting.show(),
  });
  if (!chat.turns.length) greeting.show();
  pages(new Runs(), { look: (place) => (chat.turns.length ? chat : greeting).look(place) });
  composer(chat);
  byId("reconnect").addEventListener("click", () => connect(chat, (name) => (model = name)));
  byId("reconnect").click();
}

/** Read model, methods and prompts from the server; if it does not answer, show a Retry button. */
async function connect(chat, named) {
  byId("reconnect").hidden = true;
  byId("model").textContent = "connecting";
  try {
    const [models, listing, ready] = await Promise.all(["/v1/models", "/api/methods", "/api/prompts"].map(get));
    named((byId("model").textContent = models.data[0].id));
    fillControls(listing);
    readyPrompts(ready.prompts, chat);
  } catch (error) {
    byId("model").textContent = `no connection: ${error.message}`;
    byId("reconnect").hidden = false;
    announce(error.message, true);
  }
}

function replay(records) {
  byId("model").textContent = records[0].model ?? "a recorded answer";
  const player = new Player(new View());
  player.open(records);
  const look = () => player.look(Number(/^#answer\/(\d+)$/.exec(location.hash)?.[1]));
  addEventListener("hashchange", look);
  look();
}

paintBy();
explainTerms();
const records = recorded();
if (records) replay(records);
else live();
