// The text: a span for every token, weights as colours, and a ruler beside it.

const $ = (id) => document.getElementById(id);

// A block for every line: what changes in one is laid out and painted alone.
const lines = [], lineOf = [];

/** The spans of every token, one for each line that it is in. */
const spans = about.tokens.map((token, at) => {
  lineOf.push(Math.max(0, lines.length - 1));
  return token.split("\n").map((words, i, all) => {
    if (i || !lines.length) lines.push(element("div"));
    const span = element("span", { textContent: words });
    if (i < all.length - 1) span.append(element("i", { textContent: "⏎" }));
    span.dataset.at = at;
    if (about.drawn !== null && at >= about.drawn) span.className = "drawn";
    lines[lines.length - 1].append(span);
    return span;
  });
});
$("text").append(...lines);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** What a token is called in a sentence. */
function nameOf(at) {
  return about.tokens[at].replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

let places = null; // [top, left] of every token, until the window changes
addEventListener("resize", () => (places = null));

function placesNow() {
  if (places) return places;
  const box = $("text"), from = box.getBoundingClientRect().top - box.scrollTop;
  places = spans.map(([span]) => {
    const { top, left } = span.getBoundingClientRect();
    return [Math.round(top - from), Math.round(left)];
  });
  return places;
}

/** The token above (-1) or below (1), as near to straight as there is. */
function onNextLine(at, direction) {
  const all = placesNow();
  const [top, left] = all[at];
  let best = at, line = null;
  for (let i = at + direction; i >= 0 && i < all.length; i += direction) {
    if (all[i][0] === top) continue;
    line ??= all[i][0];
    if (all[i][0] !== line) break;
    if (best === at || Math.abs(all[i][1] - left) < Math.abs(all[best][1] - left)) best = i;
  }
  return best;
}

function showToken(at) {
  const box = $("text"), top = placesNow()[at][0];
  if (top < box.scrollTop + 20 || top > box.scrollTop + box.clientHeight - 50) {
    box.scrollTop = top - box.clientHeight / 2;
  }
}

let coloured = [];

/** Colours the keys of a query: [{key, share, soft}]. Only backgrounds and inks: what
    is laid out stays as it is, whatever the length of the text. */
function colour(query, keys) {
  for (const at of coloured) for (const { style } of spans[at]) style.background = "";
  const most = Math.max(1e-9, ...keys.map((x) => Math.max(x.share, x.soft)));
  const strength = (x, least) => (least + (1 - least) * Math.sqrt(x / most)).toFixed(3);
  for (const { key, share, soft } of keys) {
    const own = share && shown.own ? `rgba(var(--own), ${(0.8 * strength(share, 0.17)).toFixed(3)})` : "";
    const under = soft && shown.soft ? `linear-gradient(to top, rgba(var(--soft), ${strength(soft, 0.15)}) 3px, transparent 3px)` : "";
    if (own || under) for (const { style } of spans[key]) style.background = `${under} ${own}`;
  }
  coloured = keys.map((x) => x.key);
  moveQuery(query);
}

let queried = null;

/** Marks the query, and dims what comes later: it is not there yet. */
function moveQuery(query) {
  const later = (at, is) => {
    for (let i = at + 1; i < spans.length && lineOf[i] === lineOf[at]; i++) {
      for (const span of spans[i]) span.classList.toggle("later", is);
    }
  };
  const from = queried === null ? lines.length - 1 : lineOf[queried], to = lineOf[query];
  if (queried !== null) {
    for (const span of spans[queried]) span.classList.remove("query");
    later(queried, false);
  }
  for (let i = Math.min(from, to) + 1; i <= Math.max(from, to); i++) {
    lines[i].classList.toggle("later", i > to);
  }
  for (const span of spans[query]) span.classList.add("query");
  later(query, true);
  queried = query;
}

/** Marks beside the text say where in all of it the keys are. */
function drawRuler(query, keys) {
  const { context, width, height } = sized($("ruler"));
  const all = placesNow(), scale = height / $("text").scrollHeight;
  const mark = (at, colour, tall) => {
    context.fillStyle = colour;
    context.fillRect(0, Math.round(all[at][0] * scale), width, tall);
  };
  const most = Math.max(1e-9, ...keys.map((x) => x.share));
  for (const { key, share } of keys) {
    if (share && shown.own) mark(key, paint("own", 0.3 + 0.7 * Math.sqrt(share / most)), 3);
  }
  mark(query, getComputedStyle(document.body).color, 2);
}

/** A cleared canvas as large as it is shown. */
function sized(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

let palette = {}; // the colours of the theme, read once

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["own", "soft", "looked", "edge", "faint", "line", "ink"]) {
    palette[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

function paint(name, strength = 1) {
  const value = palette[name];
  return value.startsWith("#") ? value : `rgba(${value}, ${strength})`;
}
