// The text: a span for every token, weights as colours, and a ruler beside it.

const $ = (id) => document.getElementById(id);

const spans = about.tokens.map((token, at) => {
  const span = document.createElement("span");
  span.dataset.at = at;
  const lines = token.split("\n");
  lines.forEach((line, i) => {
    if (i) span.append(Object.assign(document.createElement("i"), { textContent: "⏎" }), "\n");
    span.append(line);
  });
  if (about.drawn !== null && at >= about.drawn) span.className = "drawn";
  return span;
});
$("text").append(...spans);

/** What a token is called in a sentence. */
function nameOf(at) {
  return about.tokens[at].replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

let places = null; // [top, left] of every token, until the window changes
addEventListener("resize", () => (places = null));

function placesNow() {
  return (places ??= spans.map((span) => [span.offsetTop, span.offsetLeft]));
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

let coloured = [], queried = null;

/** Colours the keys of a query: [{key, share, soft}]. */
function colour(query, keys) {
  for (const span of coloured) span.style.background = span.style.boxShadow = "";
  coloured = [];
  if (queried !== null) spans[queried].classList.remove("query");
  const most = Math.max(1e-9, ...keys.map((x) => x.share));
  const mostSoft = Math.max(1e-9, ...keys.map((x) => x.soft));
  for (const { key, share, soft } of keys) {
    const { style } = spans[key];
    if (share && shown.own) {
      style.background = `rgba(var(--own), ${(0.14 + 0.66 * Math.sqrt(share / most)).toFixed(3)})`;
    }
    if (soft && shown.soft) {
      const strength = (0.15 + 0.85 * Math.sqrt(soft / mostSoft)).toFixed(3);
      style.boxShadow = `inset 0 -3px rgba(var(--soft), ${strength})`;
    }
    coloured.push(spans[key]);
  }
  spans[query].classList.add("query");
  queried = query;
  dimLater(query);
}

/** Tokens after the query are not there yet. */
function dimLater(query) {
  if (!("highlights" in CSS)) return;
  const range = document.createRange();
  range.setStartAfter(spans[query]);
  range.setEndAfter(spans[spans.length - 1]);
  CSS.highlights.set("later", new Highlight(range));
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
