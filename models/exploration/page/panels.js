// The panels beside the text: one query, all heads, one head's map, playback.

const percent = (x) => {
  const value = 100 * x;
  if (value === 0 || value === 100) return `${value} %`;
  if (value < 0.01) return "< 0.01 %";
  if (value < 0.1) return `${value.toFixed(2)} %`;
  return `${value < 10 ? value.toPrecision(2) : Math.min(99.9, value).toFixed(value < 99 ? 0 : 1)} %`;
};
const whole = (x) => Math.round(x).toLocaleString("en");
const number = (x) => (Math.abs(x) < 1e-3 && x !== 0 ? x.toExponential(1) : x.toPrecision(3));
const keysWord = (n) => (n === 1 ? "key" : "keys");

// --- one query ---

function drawQuery(row) {
  const { query, head, model, keys, besides } = row;
  const visible = visibleAt(model, row.layer, query), count = head.count[query];
  $("sentence").textContent = count
    ? `${whole(count)} of ${whole(visible)} visible ${keysWord(visible)} fire${count === 1 ? "s" : ""} for “${nameOf(query)}”`
    : `Empty row: none of ${whole(visible)} ${keysWord(visible)} fires for “${nameOf(query)}”`;
  drawLadder(row, visible);
  drawLine(row);
  const said = [`Threshold ${number(head.threshold[query])}; the 8-bit sketch knows each score to ± ${number(head.slack[query])}.`];
  if (head.missed[query] > 0) {
    said.push(`Left out: at most ${percent(head.missed[query])} of the softmax mass; the output is off by at most ${number(head.error[query])}.`);
  }
  $("certificate").textContent = said.join(" ");
  $("own-head").textContent = about.models[0].label;
  $("soft-head").textContent = besides ? about.models[1].label : "softmax";
  const most = Math.max(1e-9, ...keys.map((x) => Math.max(x.share, x.soft)));
  const body = $("keys").tBodies[0];
  body.replaceChildren(...keys.map((one, i) => keyRow(one, query, most, i && !one.fires && keys[i - 1].fires)));
  $("listed").textContent = listedSentence(head, keys, query);
}

function keyRow(one, query, most, isGap) {
  const bar = (share, name) => {
    if (!share) return element("td", { textContent: "–" });
    const bar = element("span", { className: "share" });
    bar.style.cssText = `width:${Math.round((60 * share) / most)}px;background:rgb(var(--${name}))`;
    return element("td", {}, bar, percent(share));
  };
  const row = element(
    "tr",
    { className: (one.fires ? "" : "silent") + (isGap ? " gap" : "") },
    element("td", { textContent: nameOf(one.key), title: `token ${one.key}` }),
    element("td", { className: "right", textContent: one.key === query ? "itself" : `−${whole(query - one.key)}` }),
    element("td", { className: "right", textContent: one.score === null ? "" : one.score.toFixed(3) }),
    bar(one.share, "own"),
    bar(one.soft, "soft"),
  );
  row.dataset.at = one.key;
  return row;
}

function listedSentence(head, keys, query) {
  const count = head.count[query], fires = keys.filter((x) => x.fires).length;
  if (count > fires) return `The strongest ${whole(fires)} of ${whole(count)} are listed: ${percent(head.listed[query])} of the weight.`;
  if (!count) return "These came nearest.";
  return keys.length > fires ? "Below the dashed line: what came nearest." : "";
}

function drawLadder({ query, head, model, besides }, visible) {
  const group = model.group > 1 ? ` (${model.group} heads that share keys)` : "";
  const steps = [
    ["all", visible, "var(--dim)", "keys that the query may see"],
    ["possible", head.possible[query], "rgba(var(--own), .45)", "keys whose bound reaches the threshold"],
    ["looked at", head.looked[query], "rgb(var(--looked))", `keys scored exactly${group}`],
    ["fire", head.count[query], "rgb(var(--own))", "keys with a weight"],
    null,
    [besides ? "90 %" : "softmax", (besides ?? { head }).head.soft[query], "rgb(var(--soft))", besides ? `keys that hold 90 % of the softmax of ${about.models[1].label}` : "keys that hold 90 % of its mass"],
  ];
  $("ladder").replaceChildren(
    ...steps.flatMap((step) => {
      if (step === null) return [element("div", { className: "rule" })];
      const [name, count, colour, title] = step;
      const bar = element("div", { className: "bar", title });
      bar.style.setProperty("--c", colour);
      bar.style.width = `${(100 * Math.log1p(count)) / Math.log1p(visible)}%`;
      if (!count) bar.style.visibility = "hidden";
      return [element("span", { textContent: name, title }), bar, element("span", { className: "number", textContent: whole(count), title })];
    }),
  );
}

/** The listed scores on a line, with the threshold and what its bounds cannot decide. */
function drawLine({ query, head, keys }) {
  const own = keys.filter((x) => x.score !== null);
  const threshold = head.threshold[query], doubt = 2 * head.slack[query];
  const low = Math.min(threshold - 1.5 * doubt, ...own.map((x) => x.score));
  const high = Math.max(threshold + doubt, ...own.map((x) => x.score));
  const x = (score) => (4 + (92 * (score - low)) / (high - low || 1)).toFixed(2);
  const dots = own.map(
    (one) => `<circle cx="${x(one.score)}%" cy="26" r="4" fill="${one.fires ? "rgb(var(--own))" : "none"}"
      stroke="${one.fires ? "var(--paper)" : "var(--faint)"}"/>`,
  );
  const anchor = x(threshold) > 60 ? "end" : x(threshold) < 30 ? "start" : "middle";
  $("line").innerHTML = `<svg role="img" aria-label="scores, threshold and bounds">
    <rect x="${x(threshold - doubt)}%" width="${(x(threshold) - x(threshold - doubt)).toFixed(2)}%" y="12" height="28"
      fill="var(--edge)" opacity=".16"><title>A key in here may reach the threshold by its bound: it is looked at, and does not fire.</title></rect>
    <line x1="2%" x2="98%" y1="26" y2="26" stroke="var(--line)"/>${dots.join("")}
    <line x1="${x(threshold)}%" x2="${x(threshold)}%" y1="12" y2="44" stroke="var(--edge)" stroke-width="2"/>
    <text x="${x(threshold)}%" y="58" text-anchor="${anchor}">threshold ${number(threshold)}</text>
    <text x="2%" y="9">score ${number(low)}</text><text x="98%" y="9" text-anchor="end">${number(high)}</text></svg>`;
}

// --- all heads ---

const METRICS = {
  fired: "keys that fire, of those visible",
  empty: "queries for which no key fires",
  looked: "keys that decoding looks at, of those visible",
};
let pictures = null, metric = "fired";

async function drawHeads(layer, head) {
  pictures ??= await inflate("pictures-0");
  if (!$("grid").childElementCount) buildGrid(about.models[0]);
  const model = about.models[0];
  const all = model.fired.flat(), dead = model.empty.flat().filter((x) => x === 1).length;
  const median = [...all].sort((a, b) => a - b)[all.length >> 1];
  const idle = model.empty.flat().filter((x) => x > 0.9 && x < 1).length;
  $("heads-sentence").textContent =
    `${all.length} heads: half of them fire at most ${percent(median)} of their keys; ` +
    `${dead || "none"} ${dead === 1 ? "is" : "are"} dead` +
    (idle ? `, ${idle} more ${idle === 1 ? "is" : "are"} empty in nine rows of ten` : "");
  $("grid-note").textContent =
    `${$("grid").classList.contains("small") ? "Colour" : "Number"}: ${METRICS[metric]}. Picture: where the weights are (down: queries, across: keys). Rows: layers. Columns: heads.` +
    (model.detailed.length < model.layers ? " The keys of the layers in bold are listed." : "");
  for (const button of $("grid").querySelectorAll("button")) {
    const [l, h] = button.dataset.head.split("-").map(Number);
    const value = model[metric][l][h];
    button.querySelector("b").textContent = value === null ? "" : percent(value).replace(" ", "\u2009");
    button.classList.toggle("chosen", l === layer && h === head);
    if ($("grid").classList.contains("small")) button.style.background = heat(value);
  }
  preview(layer, head);
  for (const button of $("metrics").children) button.ariaPressed = String(button.dataset.metric === metric);
}

/** Logarithmic: a ten-thousandth is all but white. */
function heat(value) {
  if (!value) return "";
  return `rgba(var(--own), ${limit(1 + Math.log10(value) / 4, 1).toFixed(3)})`;
}

function preview(l, h) {
  const { side, heads, fired, empty, columns } = about.models[0];
  const canvas = $("preview").querySelector("canvas");
  Object.assign(canvas, { width: side, height: side });
  paintPicture(canvas, l * heads + h);
  $("preview").lastElementChild.textContent =
    `Layer ${l}, head ${h}: ${percent(fired[l][h])} of the keys fire, ${percent(empty[l][h])} of the rows are empty` +
    (`${l}-${h}` in columns ? "" : "; its keys are not listed");
}

function buildGrid(model) {
  const grid = $("grid"), isSmall = model.layers > 12 || model.heads > 10;
  const size = isSmall ? `${Math.max(9, Math.min(20, Math.floor(220 / model.heads)))}px` : "minmax(0, 1fr)";
  grid.classList.toggle("small", isSmall);
  grid.style.gridTemplateColumns = `22px repeat(${model.heads}, ${size})`;
  grid.append(element("span"));
  for (let h = 0; h < model.heads; h++) grid.append(element("span", { className: "name", textContent: h }));
  for (let l = 0; l < model.layers; l++) {
    const isListed = model.detailed.length < model.layers && model.detailed.includes(l);
    grid.append(element("span", { className: `name${isListed ? " listed" : ""}`, textContent: l }));
    for (let h = 0; h < model.heads; h++) grid.append(headButton(model, l, h));
  }
  paintGrid();
}

function headButton(model, l, h) {
  const isDead = model.empty[l][h] === 1;
  const button = element(
    "button",
    { type: "button", title: `layer ${l}, head ${h}: ${percent(model.fired[l][h])} fire, ${percent(model.empty[l][h])} of the rows are empty${isDead ? ": dead" : ""}` },
    element("canvas", { width: model.side, height: model.side }),
    element("b"),
  );
  button.dataset.head = `${l}-${h}`;
  button.classList.toggle("dead", isDead);
  return button;
}

function paintGrid() {
  if (pictures) $("grid").querySelectorAll("canvas").forEach(paintPicture);
}

function paintPicture(canvas, i) {
  const { side } = about.models[0], image = new ImageData(side, side);
  const [r, g, b] = palette.own.split(",").map(Number);
  for (let cell = 0; cell < side * side; cell++) {
    image.data.set([r, g, b, pictures[i * side * side + cell]], 4 * cell);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// --- one head's map ---

let mapped = { head: null, canvas: null };

function drawMap(row) {
  const { query, head, model } = row, queries = about.tokens.length;
  const fired = model.fired[row.layer][row.h];
  $("map-sentence").textContent = `Layer ${row.layer}, head ${row.h}: ${percent(fired)} of the keys fire, ${percent(model.empty[row.layer][row.h])} of the rows are empty`;
  const { context, width, height } = sized($("map"));
  if (mapped.head !== head || mapped.width !== width || mapped.theme !== palette.own) {
    mapped = { head, width, theme: palette.own, canvas: paintMap(row, Math.round(width * devicePixelRatio)) };
  }
  context.drawImage(mapped.canvas, 0, 0, width, height);
  context.fillStyle = paint("edge");
  context.fillRect(0, (query / queries) * height, width, 1);
}

/** The map of a head without its cross, kept from one query to the next. */
function paintMap({ head, power }, size) {
  const queries = about.tokens.length, canvas = element("canvas", { width: size, height: size });
  const strength = new Float32Array(size * size), cell = Math.max(1, Math.ceil(size / queries));
  for (let q = 0; q < queries; q++) {
    const y = Math.floor((q / queries) * size);
    for (const { key, share } of keysOf(head, power, q)) {
      const x = Math.floor((key / queries) * size);
      for (let dy = 0; dy < cell && y + dy < size; dy++) {
        for (let dx = 0; dx < cell && x + dx < size; dx++) {
          const at = (y + dy) * size + x + dx;
          strength[at] = Math.max(strength[at], share);
        }
      }
    }
  }
  const image = new ImageData(size, size);
  const [r, g, b] = palette.own.split(",").map(Number);
  const grey = matchesDark() ? 255 : 0;
  for (let at = 0; at < strength.length; at++) {
    const isVisible = at % size <= Math.floor(at / size) + cell;
    if (strength[at] > 0) image.data.set([r, g, b, 70 + 185 * Math.sqrt(strength[at])], 4 * at);
    else if (!isVisible) image.data.set([grey, grey, grey, 12], 4 * at);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// --- playback ---

function drawPlay(row) {
  const { query, head, model, layer } = row;
  const visible = visibleAt(model, layer, query);
  let seen = 0, looked = 0;
  for (let q = 0; q <= query; q++) {
    seen += visibleAt(model, layer, q);
    looked += head.looked[q];
  }
  $("play-sentence").textContent = `Step ${whole(query)}: ${whole(head.looked[query])} of ${whole(visible)} ${keysWord(visible)} looked at (${percent(head.looked[query] / visible)}), ${whole(head.count[query])} fire`;
  $("so-far").textContent = `So far ${whole(looked)} exact scores; dense attention computes ${whole(seen)} (${percent(looked / seen)}).`;
  $("seek").value = query;
  drawChart(row);
}

function drawChart({ query, head, model, layer }) {
  const { context, width, height } = sized($("chart"));
  const queries = about.tokens.length, foot = height - 18, left = 40;
  const most = Math.log1p(visibleAt(model, layer, queries - 1));
  const x = (q) => left + ((width - left) * (q + 0.5)) / queries;
  const y = (n) => foot - ((foot - 8) * Math.log1p(n)) / most;
  context.font = "11px system-ui, sans-serif";
  for (let n = 1; Math.log1p(n) <= most; n *= 10) {
    context.fillStyle = palette.faint;
    context.textAlign = "right";
    context.fillText(whole(n), left - 6, y(n) + 4);
    context.fillStyle = palette.line;
    context.fillRect(left, y(n), width - left, 1);
  }
  const columns = Math.min(queries, Math.floor(width - left));
  const curve = (value, colour) => {
    context.strokeStyle = colour;
    context.lineWidth = 1.4;
    context.beginPath();
    for (let c = 0; c < columns; c++) {
      const from = Math.floor((c * queries) / columns), to = Math.max(from + 1, Math.floor(((c + 1) * queries) / columns));
      let sum = 0;
      for (let q = from; q < to; q++) sum += value(q);
      const at = [x((from + to - 1) / 2), y(sum / (to - from))];
      c ? context.lineTo(...at) : context.moveTo(...at);
    }
    context.stroke();
  };
  curve((q) => visibleAt(model, layer, q), palette.faint);
  curve((q) => head.looked[q], paint("looked"));
  curve((q) => head.count[q], paint("own"));
  context.fillStyle = paint("edge");
  context.fillRect(x(query) - 0.5, 0, 1.5, foot);
  context.textAlign = "left";
  let at = left;
  for (const [words, colour] of [["visible", palette.faint], ["looked at", paint("looked")], ["fire", paint("own")]]) {
    context.fillStyle = colour;
    context.fillText(`— ${words}`, at, height - 3);
    at += 84;
  }
}
