// What the page holds, unpacked: see packing.py for the format.

const about = JSON.parse(document.getElementById("about").textContent);

/** Bytes of an element that holds base64 of deflated bytes. */
async function inflate(id) {
  const text = document.getElementById(id).textContent;
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Numbers by query, and the listed keys of all queries one after the other. */
function readHead(bytes, columns, queries) {
  let at = 0;
  const planes = (count) => {
    const whole = new Uint16Array(count);
    for (let i = 0; i < count; i++) whole[i] = bytes[at + i] | (bytes[at + count + i] << 8);
    at += 2 * count;
    return whole;
  };
  const head = {};
  for (const [name, low, step, smooth] of columns) {
    const whole = planes(queries);
    if (smooth) for (let i = 1; i < queries; i++) whole[i] += whole[i - 1];
    head[name] = Float64Array.from(whole, (x) => low + step * x);
  }
  for (let i = 0; i < queries; i++) {
    head.possible[i] = (head.count[i] + head.possible[i]) & 0xffff;
    head.looked[i] = (head.possible[i] + head.looked[i]) & 0xffff;
  }
  head.first = new Uint32Array(queries + 1);
  for (let i = 0; i < queries; i++) head.first[i + 1] = head.first[i] + bytes[at + i];
  at += queries;
  const listed = head.first[queries];
  head.apart = planes(listed);
  head.steps = bytes.subarray(at, at + listed);
  return head;
}

/** The listed keys of a query, the best first: {key, score, fires, share, soft}. */
function keysOf(head, power, query) {
  const { top, floor, threshold, count, listed, mass } = head;
  const found = [];
  let key = 0;
  for (let i = head.first[query]; i < head.first[query + 1]; i++) {
    key += head.apart[i];
    const score = floor[query] + ((top[query] - floor[query]) * head.steps[i]) / 255;
    found.push({ key, score, step: head.steps[i], soft: Math.exp(score - mass[query]) });
  }
  found.sort((a, b) => b.step - a.step || a.key - b.key);
  let sum = 0;
  found.forEach((one, rank) => {
    one.fires = rank < count[query];
    const above = Math.max(one.score - threshold[query], 1e-5);
    one.share = !one.fires ? 0 : power === null ? Math.exp(one.score - top[query]) : above ** power;
    sum += one.share;
  });
  for (const one of found) one.share *= sum > 0 ? listed[query] / sum : 0;
  return found;
}

/** How many keys a query sees. */
function visibleAt(model, layer, query) {
  return Math.min(query + 1, model.windows[layer] ?? query + 1);
}

/** Heads of a model, unpacked when they are first asked for. */
class Heads {
  constructor(number) {
    this.number = number;
    this.model = about.models[number];
    this.ready = new Map();
  }

  has(layer, head) {
    return `${layer}-${head}` in this.model.columns;
  }

  get(layer, head) {
    return this.ready.get(`${layer}-${head}`);
  }

  async load(layer, head) {
    const name = `${layer}-${head}`;
    if (!this.ready.has(name)) {
      const bytes = await inflate(`head-${this.number}-${name}`);
      this.ready.set(name, readHead(bytes, this.model.columns[name], about.tokens.length));
    }
    return this.ready.get(name);
  }

  async loadAll() {
    for (const name of Object.keys(this.model.columns)) {
      await this.load(...name.split("-").map(Number));
      await new Promise((go) => setTimeout(go)); // hands in between are served first
    }
  }
}
