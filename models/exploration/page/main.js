// What is shown, and what changes it: pointer, keys, the address of the page.

const VIEWS = ["query", "heads", "map", "play"];
const shown = { own: true, soft: true };
const state = { layer: 0, head: 0, query: 0, view: "query", pinned: false };
const models = about.models.map((_, number) => new Heads(number));
const limit = (x, most) => Math.max(0, Math.min(most, x));
const isDark = matchMedia("(prefers-color-scheme: dark)");
let theme = null; // "light" or "dark" where one was chosen

// --- showing ---

/** The query that is shown, with its keys; null until its head is unpacked. */
function rowNow() {
  const { layer, head: h, query } = state, [{ model }] = models;
  const head = models[0].get(layer, h);
  if (!head) return null;
  const row = { layer, h, query, head, model, power: model.power, besides: null };
  row.keys = keysOf(head, model.power, query);
  if (models[1]) addSecond(row);
  return row;
}

/** The second model's weights in place of softmax of the same scores. */
function addSecond(row) {
  const { model } = models[1];
  const layer = Math.min(row.layer, model.layers - 1), h = Math.min(row.h, model.heads - 1);
  const head = models[1].get(layer, h);
  if (!head) return;
  const byKey = new Map(keysOf(head, model.power, row.query).map((x) => [x.key, x.share]));
  row.besides = { head, layer, h };
  for (const one of row.keys) {
    one.soft = byKey.get(one.key) ?? 0;
    byKey.delete(one.key);
  }
  for (const [key, soft] of byKey) {
    if (soft) row.keys.push({ key, soft, share: 0, score: null, fires: false });
  }
}

function show() {
  const row = rowNow();
  $("layer").textContent = state.layer;
  $("head").textContent = state.head;
  $("query").textContent = state.query;
  $("pinned").hidden = !state.pinned;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.ariaSelected = String(tab.dataset.view === state.view);
  }
  for (const view of VIEWS) $(`view-${view}`).classList.toggle("shown", view === state.view);
  if (state.view === "heads") drawHeads(state.layer, state.head);
  if (!row) return;
  colour(row.query, row.keys);
  drawRuler(row.query, row.keys);
  if (state.view === "query") drawQuery(row);
  if (state.view === "map") drawMap(row);
  if (state.view === "play") drawPlay(row);
}

/** Shows something else; unpacks its head first where nobody asked for it before. */
async function go(change, { follow = true } = {}) {
  Object.assign(state, change);
  state.query = limit(state.query, about.tokens.length - 1);
  const second = models[1]?.model;
  const wanted = [models[0].load(state.layer, state.head)];
  if (second) {
    const at = [Math.min(state.layer, second.layers - 1), Math.min(state.head, second.heads - 1)];
    if (models[1].has(...at)) wanted.push(models[1].load(...at));
  }
  if (!models[0].get(state.layer, state.head) || second) await Promise.all(wanted);
  show();
  if (follow) showToken(state.query);
  remember();
}

/** The next layer or head that has lists, round and round. */
function stepHead(what, by) {
  const { model } = models[0];
  if (what === "head") return go({ head: (state.head + by + model.heads) % model.heads });
  const at = model.detailed.indexOf(state.layer) + by;
  return go({ layer: model.detailed[(at + model.detailed.length) % model.detailed.length] });
}

function step(what, by) {
  return what === "query" ? go({ query: state.query + by, pinned: true }) : stepHead(what, by);
}

function nextQuery(isWanted) {
  const { count } = models[0].get(state.layer, state.head);
  for (let i = 1; i <= count.length; i++) {
    const query = (state.query + i) % count.length;
    if (isWanted(count[query])) return go({ query, pinned: true });
  }
}

// --- the address ---

let remembering = null;

/** Writes what is shown into the address, at most a few times a second. */
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => history.replaceState(null, "", hashNow()), 150);
}

function hashNow() {
  const { layer, head, query, view } = state;
  return "#" + new URLSearchParams({ layer, head, query, view });
}

/** Shows what an address says. Not always what is in the bar: `remember` may just have written over it. */
function fromHash(address = location.href) {
  const given = new URLSearchParams(new URL(address).hash.slice(1));
  const whole = (name, most, otherwise) => {
    const value = Number.parseInt(given.get(name), 10);
    return Number.isInteger(value) ? limit(value, most) : otherwise;
  };
  const { model } = models[0];
  const change = {
    layer: whole("layer", model.layers - 1, model.start[0]),
    head: whole("head", model.heads - 1, model.start[1]),
    query: whole("query", about.tokens.length - 1, about.tokens.length - 1),
    view: VIEWS.includes(given.get("view")) ? given.get("view") : "query",
    pinned: given.has("query"),
  };
  if (!models[0].has(change.layer, change.head)) {
    missing(change.layer);
    change.layer = model.detailed[0];
  }
  return go(change);
}

function missing(layer) {
  note(`Layer ${layer} has no lists of keys in this page, to keep it small: make the page again with --layers ${layer}.`);
}

function note(words) {
  const all = words ? [...about.notes, words] : about.notes;
  $("notes").firstElementChild.replaceChildren(...all.map((x) => element("p", { textContent: x })));
  $("notes").hidden = !all.length;
}

// --- the theme ---

const matchesDark = () => (theme ?? (isDark.matches ? "dark" : "light")) === "dark";

function applyTheme() {
  document.documentElement.dataset.theme = matchesDark() ? "dark" : "light";
  readPalette();
  paintGrid();
  show();
}

function toggleTheme() {
  theme = matchesDark() ? "light" : "dark";
  applyTheme();
}

// --- playback ---

let playing = null;

function togglePlay() {
  if (playing !== null) {
    playing = cancelAnimationFrame(playing) ?? null;
  } else {
    if (state.query >= about.tokens.length - 1) state.query = about.drawn ?? 0;
    if (state.view !== "play" && state.view !== "query") state.view = "play";
    let last = performance.now(), due = 0;
    const tick = (now) => {
      due += ((now - last) / 1000) * Number($("speed").value);
      last = now;
      const steps = Math.floor(due);
      due -= steps;
      if (state.query + steps >= about.tokens.length - 1) togglePlay();
      else playing = requestAnimationFrame(tick);
      if (steps) go({ query: state.query + steps, pinned: true });
    };
    playing = requestAnimationFrame(tick);
  }
  $("play").textContent = playing === null ? "▶ play" : "❚❚ stop";
}

// --- pointer ---

const tokenOf = (event) => event.target.closest?.("[data-at]")?.dataset.at;

$("text").addEventListener("mouseover", (event) => {
  const at = tokenOf(event);
  if (at !== undefined && !state.pinned && playing === null) go({ query: Number(at) }, { follow: false });
});
$("text").addEventListener("click", (event) => {
  const at = tokenOf(event);
  if (at !== undefined) go({ query: Number(at), pinned: true }, { follow: false });
});
$("keys").addEventListener("mouseover", (event) => pointAt(tokenOf(event)));
$("keys").addEventListener("mouseleave", () => pointAt());
$("keys").addEventListener("click", (event) => {
  const at = tokenOf(event);
  if (at !== undefined) showToken(Number(at));
});
let pointed = null;

function pointAt(at) {
  const mark = (is) => spans[pointed]?.forEach((span) => span.classList.toggle("pointed", is));
  mark(false);
  pointed = at ?? null;
  mark(true);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { step: steps, view, head, metric: chosen } = button.dataset;
  if (steps) step(steps.split(",")[0], Number(steps.split(",")[1]));
  if (view) go({ view }, { follow: false });
  if (chosen) (metric = chosen), show();
  if (head) {
    const [l, h] = head.split("-").map(Number);
    models[0].has(l, h) ? go({ layer: l, head: h }, { follow: false }) : missing(l);
  }
});
const fraction = (event, name, inset = 0) => {
  const { left, top, width, height } = event.currentTarget.getBoundingClientRect();
  const part = name === "x" ? (event.clientX - left - inset) / (width - inset) : (event.clientY - top) / height;
  return limit(Math.floor(part * about.tokens.length), about.tokens.length - 1);
};
$("grid").addEventListener("mouseover", (event) => {
  const head = event.target.closest("button")?.dataset.head;
  if (head && pictures) preview(...head.split("-").map(Number));
});
$("grid").addEventListener("mouseleave", () => pictures && preview(state.layer, state.head));
$("map").addEventListener("click", (event) => go({ query: fraction(event, "y"), pinned: true }));
$("chart").addEventListener("click", (event) => go({ query: fraction(event, "x", 40), pinned: true }));
$("ruler").addEventListener("click", (event) => {
  const { top, height } = $("ruler").getBoundingClientRect(), box = $("text");
  box.scrollTop = ((event.clientY - top) / height) * box.scrollHeight - box.clientHeight / 2;
});
$("seek").max = about.tokens.length - 1;
$("seek").addEventListener("input", () => go({ query: Number($("seek").value), pinned: true }));
$("play").addEventListener("click", togglePlay);
$("theme").addEventListener("click", toggleTheme);
$("help-button").addEventListener("click", () => $("help").showModal());
$("notes").lastElementChild.addEventListener("click", () => ($("notes").hidden = true));
$("pinned").addEventListener("click", () => go({ pinned: false }));
for (const name of ["own", "soft"]) $(name).addEventListener("click", () => toggleShown(name));

function toggleShown(name) {
  shown[name] = !shown[name];
  $(name).ariaPressed = String(shown[name]);
  show();
}

// --- keys ---

const KEYS = {
  ArrowLeft: () => step("query", -1),
  ArrowRight: () => step("query", 1),
  ArrowUp: () => go({ query: onNextLine(state.query, -1), pinned: true }),
  ArrowDown: () => go({ query: onNextLine(state.query, 1), pinned: true }),
  Home: () => go({ query: 0, pinned: true }),
  End: () => go({ query: about.tokens.length - 1, pinned: true }),
  "[": () => stepHead("head", -1),
  "]": () => stepHead("head", 1),
  "{": () => stepHead("layer", -1),
  "}": () => stepHead("layer", 1),
  n: () => nextQuery((count) => count > 0),
  e: () => nextQuery((count) => count === 0),
  1: () => go({ view: "query" }),
  2: () => go({ view: "heads" }),
  3: () => go({ view: "map" }),
  4: () => go({ view: "play" }),
  " ": togglePlay,
  r: () => toggleShown("own"),
  s: () => toggleShown("soft"),
  t: toggleTheme,
  "?": () => $("help").showModal(),
  Escape: () => go({ pinned: false }, { follow: false }),
};

addEventListener("keydown", (event) => {
  const inField = event.target.closest?.("input, select, dialog");
  const isButton = event.key === " " && event.target.closest?.("button");
  if (inField || isButton || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

// --- the beginning ---

async function begin() {
  const [model, second] = about.models;
  $("title").textContent = about.title;
  $("facts").textContent = about.facts;
  $("own").lastChild.textContent = model.label;
  $("soft").lastChild.textContent = second ? second.label : "softmax";
  $("play-note").textContent =
    "Each step is one token of decoding: its keys are bounded by the 8-bit sketch, those that may reach the threshold are scored exactly." +
    (about.drawn === null ? "" : ` From token ${about.drawn} on, in italics, the model went on by itself.`);
  note();
  if (typeof DecompressionStream === "undefined") {
    note("This browser cannot unpack the page (no DecompressionStream): open it with Chrome 80, Firefox 113, Safari 16.4 or newer.");
    return;
  }
  isDark.addEventListener("change", applyTheme);
  addEventListener("hashchange", (event) => fromHash(event.newURL));
  addEventListener("resize", () => requestAnimationFrame(show));
  applyTheme();
  await fromHash();
  document.documentElement.dataset.ready = "true";
  for (const heads of models) await heads.loadAll();
}

begin();
