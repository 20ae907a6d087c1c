"use strict";

// --- profile: which number of candidates is shown ---------------------------------------------------------------

const chooser = document.getElementById("candidates");
if (chooser) {
  chooser.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-candidates]")) {
      part.hidden = part.dataset.candidates !== chooser.value;
    }
  });
}

// --- inspect: pictures of graphs --------------------------------------------------------------------------------

const WIDTH = 150, HEIGHT = 40, ACROSS = 22, DOWN = 28;
const LEGIBLE = 10.5; // pixels of a label on the screen, at least
const READABLE = 0.5; // smallest scale that a page opens with
const FILL = 0.4, FILL_CLOSED = 0.55; // opacity of nodes, and of closed layers
const MANY = 80; // above so many nodes layers start closed
const ABREAST = 8; // of one rank; more of them stand in several rows
const LEVELS = ["constant", "request", "mixed", "candidate"];

function human(value) {
  for (const unit of ["", "k", "M", "G"]) {
    if (Math.abs(value) < 999.5) return (unit ? value.toPrecision(3) : String(Math.round(value))) + unit;
    value /= 1000;
  }
  return value.toPrecision(3) + "T";
}

class Graph {
  constructor(canvas, data, shared) {
    this.canvas = canvas;
    this.data = data;
    this.shared = shared;
    this.view = { x: 0, y: 0, scale: 1 };
    this.closed = new Set();
    this.scopes = new Map(); // and how many nodes they hold
    this.marked = null;
    this.waiting = false;
    for (const node of data.nodes) {
      const path = node.scope ? node.scope.split("/") : [];
      node.path = path.map((_, k) => path.slice(0, k + 1).join("/"));
      for (const scope of node.path) this.scopes.set(scope, (this.scopes.get(scope) || 0) + 1);
    }
    if (data.nodes.length > MANY) this.closed = new Set(this.outermost());
    this.listen();
  }

  outermost() {
    return [...this.scopes.keys()].filter((scope) => !scope.includes("/") && this.scopes.get(scope) > 1);
  }

  // What is shown: nodes, and closed layers in place of all that is in them.
  arrange() {
    const items = [], byKey = new Map(), place = new Array(this.data.nodes.length).fill(-1);
    this.data.nodes.forEach((node, k) => {
      if (node.level === "constant" && !this.shared.constants && node.op !== "input") return;
      const scope = node.path.find((s) => this.closed.has(s));
      if (scope === undefined) {
        place[k] = items.length;
        items.push({ node, members: [k], level: node.level, macs: node.macs || 0, share: node.share || 0 });
        return;
      }
      if (!byKey.has(scope)) {
        byKey.set(scope, items.length);
        items.push({ scope, members: [], level: "constant", macs: 0, share: 0 });
      }
      const at = byKey.get(scope), group = items[at];
      place[k] = at;
      group.members.push(k);
      group.macs += node.macs || 0;
      group.share += node.share || 0;
      if (LEVELS.indexOf(node.level) > LEVELS.indexOf(group.level)) group.level = node.level;
    });
    const seen = new Set();
    for (const item of items) { item.up = []; item.down = []; }
    this.edges = [];
    for (const [a, b] of this.data.edges) {
      const from = place[a], to = place[b];
      if (from < 0 || to < 0 || from === to || seen.has(from * items.length + to)) continue;
      seen.add(from * items.length + to);
      this.edges.push([from, to]);
      items[from].down.push(to);
      items[to].up.push(from);
    }
    this.items = items;
    this.place = place;
    this.layOut();
  }

  // Layers by longest path, then a few sweeps that bring neighbours below each other (Sugiyama, Tagawa, Toda 1981).
  layOut() {
    const items = this.items, rows = [];
    items.forEach((item, k) => {
      item.rank = 0;
      // Nodes are in topological order; an edge that goes back, into a closed layer, does not count.
      for (const from of item.up) if (from < k) item.rank = Math.max(item.rank, items[from].rank + 1);
    });
    // What has no operands moves down to its first reader.
    for (let k = items.length - 1; k >= 0; k--) {
      const below = items[k].down.filter((to) => to > k).map((to) => items[to].rank);
      if (!items[k].up.length && below.length) items[k].rank = Math.max(0, below.reduce((a, b) => Math.min(a, b)) - 1);
    }
    items.forEach((item, k) => (rows[item.rank] = rows[item.rank] || []).push(k));
    for (let r = 0; r < rows.length; r++) rows[r] = rows[r] || [];
    const step = WIDTH + ACROSS;
    rows.forEach((row) => row.forEach((k, at) => (items[k].x = (at - (row.length - 1) / 2) * step)));
    const mean = (around) => {
      let sum = 0;
      for (const k of around) sum += items[k].x;
      return around.length ? sum / around.length : null;
    };
    const lines = (row) => Math.ceil(row.length / ABREAST), abreast = (row) => Math.ceil(row.length / lines(row));
    const stack = (row) => {
      row.forEach((k, at) => (items[k].x = ((at % abreast(row)) - (abreast(row) - 1) / 2) * step));
    };
    for (let sweep = 0; sweep < 6; sweep++) {
      const order = sweep % 2 ? [...rows].reverse() : rows;
      for (const row of order) {
        for (const k of row) {
          const middle = mean(sweep % 2 ? items[k].down : items[k].up);
          items[k].wish = middle === null ? items[k].x : middle;
        }
        row.sort((a, b) => items[a].wish - items[b].wish || a - b);
        if (row.length > ABREAST) {
          stack(row);
          continue;
        }
        let drift = 0;
        row.forEach((k, at) => {
          const least = at ? items[row[at - 1]].x + step : -Infinity;
          items[k].x = Math.max(items[k].wish, least);
          drift += items[k].x - items[k].wish;
        });
        if (row.length) row.forEach((k) => (items[k].x -= drift / row.length));
      }
    }
    let y = 0;
    for (const row of rows) {
      row.forEach((k, at) => (items[k].y = y + Math.floor(at / abreast(row)) * (HEIGHT + 8)));
      y += lines(row) * (HEIGHT + 8) - 8 + DOWN;
    }
    this.box = items.reduce(
      (b, i) => [Math.min(b[0], i.x), Math.min(b[1], i.y), Math.max(b[2], i.x + WIDTH), Math.max(b[3], i.y + HEIGHT)],
      items.length ? [Infinity, Infinity, -Infinity, -Infinity] : [0, 0, 1, 1]);
  }

  // Shows the whole graph, or, where it would be smaller than `least`, its beginning.
  fit(least = 0.02) {
    const { clientWidth: w, clientHeight: h } = this.canvas, [l, t, r, b] = this.box;
    const whole = Math.min(w / (r - l + 40), h / (b - t + 40));
    const scale = Math.min(1, Math.max(whole, least));
    const tall = (b - t + 40) * scale > h;
    this.view = { scale, x: w / 2 - ((l + r) / 2) * scale, y: tall ? 20 - t * scale : h / 2 - ((t + b) / 2) * scale };
    this.draw();
  }

  centre(item) {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    const scale = Math.max(this.view.scale, 0.8);
    this.view = { scale, x: w / 2 - (item.x + WIDTH / 2) * scale, y: h / 2 - (item.y + HEIGHT / 2) * scale };
    this.draw();
  }

  rebuild() {
    this.arrange();
    this.fit();
  }

  find(text) {
    const wanted = text.toLowerCase();
    return this.data.nodes.map((node, k) => [node, k]).filter(([node]) =>
      node.name.toLowerCase().includes(wanted) || node.op.toLowerCase() === wanted ||
      (node.tensor || "").toLowerCase().includes(wanted));
  }

  // Opens the layers around a node, shows constants if it is one, and brings it to the middle.
  show(k) {
    const node = this.data.nodes[k];
    const opened = node.path.filter((scope) => this.closed.delete(scope)).length;
    if (this.place[k] < 0) { this.shared.constants = true; document.getElementById("constants").checked = true; }
    if (opened || this.place[k] < 0) this.arrange();
    this.marked = k;
    this.centre(this.items[this.place[k]]);
  }

  mark(name) {
    const k = this.data.nodes.findIndex((node) => node.name === name);
    this.marked = k < 0 ? null : k;
    if (k >= 0 && this.place[k] >= 0) this.centre(this.items[this.place[k]]);
    else this.draw();
  }

  toggle(item) {
    const scope = item.scope || item.node.path.filter((s) => this.scopes.get(s) > 1).pop();
    if (!scope) return;
    if (!this.closed.delete(scope)) this.closed.add(scope);
    const before = { ...this.view };
    this.arrange();
    const k = this.items.findIndex((i) => i.scope === scope || (i.node && i.node.path.includes(scope)));
    this.view = before;
    if (k >= 0) this.centre(this.items[k]);
    this.shared.changed();
  }

  at(x, y) {
    const { view } = this, px = (x - view.x) / view.scale, py = (y - view.y) / view.scale;
    return this.items.find((i) => px >= i.x && px <= i.x + WIDTH && py >= i.y && py <= i.y + HEIGHT) || null;
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.paint(); });
  }

  paint() {
    const { canvas, view, items } = this, ratio = window.devicePixelRatio || 1;
    const w = canvas.clientWidth, h = canvas.clientHeight;
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
      canvas.width = Math.round(w * ratio);
      canvas.height = Math.round(h * ratio);
    }
    const c = canvas.getContext("2d"), colour = this.shared.colours;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, w, h);
    c.translate(view.x, view.y);
    c.scale(view.scale, view.scale);
    const left = -view.x / view.scale, top = -view.y / view.scale;
    const right = left + w / view.scale, bottom = top + h / view.scale;
    const chosen = this.marked === null ? -1 : this.place[this.marked];
    c.lineWidth = 1.2;
    for (const pass of [0, 1]) {
      c.strokeStyle = pass ? colour.found : colour.faint;
      c.globalAlpha = pass ? 1 : 0.45;
      c.beginPath();
      for (const [a, b] of this.edges) {
        if ((a === chosen || b === chosen) !== Boolean(pass)) continue;
        const from = items[a], to = items[b];
        if (Math.max(from.y, to.y) + HEIGHT < top || Math.min(from.y, to.y) > bottom) continue;
        if (Math.max(from.x, to.x) + WIDTH < left || Math.min(from.x, to.x) > right) continue;
        const x0 = from.x + WIDTH / 2, y0 = from.y + HEIGHT, x1 = to.x + WIDTH / 2, y1 = to.y, mid = (y0 + y1) / 2;
        c.moveTo(x0, y0);
        c.bezierCurveTo(x0, mid, x1, mid, x1, y1);
      }
      c.stroke();
    }
    c.globalAlpha = 1;
    // Labels keep a size that can be read as long as a box has room for a line of it.
    const size = Math.max(12, LEGIBLE / view.scale), lines = HEIGHT - 6 > 2.15 * size ? 2 : HEIGHT - 8 > size ? 1 : 0;
    const write = (text, x, y, end) => {
      const room = WIDTH - 10, wide = c.measureText(text).width;
      const most = wide <= room ? text.length : Math.floor((text.length * room) / wide) - 1;
      if (most === text.length) c.fillText(text, x, y);
      else if (most > 1) c.fillText(end ? "…" + text.slice(-most) : text.slice(0, most) + "…", x, y);
    };
    items.forEach((item, k) => {
      if (item.x > right || item.x + WIDTH < left || item.y > bottom || item.y + HEIGHT < top) return;
      c.fillStyle = colour.panel; // hides the edges behind it
      c.fillRect(item.x, item.y, WIDTH, HEIGHT);
      c.fillStyle = colour[item.level] || colour.constant;
      c.globalAlpha = item.scope ? FILL_CLOSED : FILL;
      c.fillRect(item.x, item.y, WIDTH, HEIGHT);
      c.globalAlpha = 1;
      const blocks = item.node && item.node.blocks;
      if (blocks) {
        const total = blocks.reduce((sum, b) => sum + b[1], 0);
        let x = item.x;
        for (const [level, count] of blocks) {
          c.fillStyle = colour[level] || colour.constant;
          c.fillRect(x, item.y, (WIDTH * count) / total, 6);
          x += (WIDTH * count) / total;
        }
      } else c.fillRect(item.x, item.y, WIDTH, 6);
      if (item.share > 0.002) {
        c.fillStyle = colour.ink;
        c.fillRect(item.x, item.y + HEIGHT - 4, WIDTH * Math.min(1, item.share), 4);
      }
      if (k === chosen) {
        c.strokeStyle = colour.found;
        c.lineWidth = 3;
        c.strokeRect(item.x - 2, item.y - 2, WIDTH + 4, HEIGHT + 4);
        c.lineWidth = 1.2;
      }
      if (!lines) return;
      const named = item.scope || item.node.op === "input"; // by its own name first
      const [first, second] = item.scope
        ? [`▸ ${item.scope}`, `${item.members.length} nodes`]
        : named ? [item.node.name, "input"] : [item.node.op, item.node.name];
      c.fillStyle = colour.ink;
      c.font = `600 ${size}px system-ui, sans-serif`;
      write(first, item.x + 5, item.y + 7 + size, named);
      if (lines < 2) return;
      c.font = `${0.9 * size}px system-ui, sans-serif`;
      write(second, item.x + 5, item.y + 8 + 1.95 * size, true);
    });
  }

  listen() {
    const { canvas } = this;
    let from = null, moved = false;
    canvas.addEventListener("pointerdown", (e) => {
      from = { x: e.clientX - this.view.x, y: e.clientY - this.view.y };
      moved = false;
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener("pointermove", (e) => {
      if (from) {
        const x = e.clientX - from.x, y = e.clientY - from.y;
        moved = moved || Math.abs(x - this.view.x) + Math.abs(y - this.view.y) > 3;
        this.view.x = x;
        this.view.y = y;
        this.draw();
      }
      this.shared.tip(from ? null : this.at(e.offsetX, e.offsetY), e, this);
    });
    canvas.addEventListener("pointerup", (e) => {
      from = null;
      if (moved) return;
      const item = this.at(e.offsetX, e.offsetY);
      this.marked = item && item.node ? item.members[0] : null;
      this.draw();
      if (item && item.node) this.shared.marked(this, item.node.name);
    });
    canvas.addEventListener("pointerleave", () => this.shared.tip(null));
    canvas.addEventListener("dblclick", (e) => {
      const item = this.at(e.offsetX, e.offsetY);
      if (item) this.toggle(item);
    });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      this.zoom(Math.exp(-e.deltaY * 0.0015), e.offsetX, e.offsetY);
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      const move = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key];
      if (move) { this.view.x += move[0]; this.view.y += move[1]; this.draw(); }
      else if (e.key === "+" || e.key === "-") this.zoom(e.key === "+" ? 1.25 : 0.8);
      else return;
      e.preventDefault();
    });
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = Math.min(4, Math.max(0.01, this.view.scale * factor)), by = scale / this.view.scale;
    this.view = { scale, x: x - (x - this.view.x) * by, y: y - (y - this.view.y) * by };
    this.draw();
  }
}

function start(data) {
  const get = (id) => document.getElementById(id);
  const shared = { constants: false, colours: {} };
  const graphs = data.graphs.map((graph, k) => new Graph(document.querySelectorAll("canvas")[k], graph, shared));
  const every = (act) => graphs.forEach((graph) => graph.canvas.clientWidth && act(graph));

  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of [...LEVELS, "panel", "line", "ink", "faint", "found"]) {
      shared.colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
    every((graph) => graph.draw());
  };
  shared.changed = () => {
    get("state").textContent = graphs.map((g) => `${g.items.length} of ${g.data.nodes.length} shown`).join(", ");
  };
  shared.marked = (source, name) => every((graph) => graph !== source && graph.mark(name));
  shared.tip = (item, e, graph) => {
    const tip = get("tip");
    tip.hidden = !item;
    if (!item) return;
    const lines = item.scope
      ? [item.scope, `${item.members.length} nodes`, `${human(item.macs)} multiply-adds (${(100 * item.share).toFixed(1)} %)`]
      : describe(item.node);
    tip.replaceChildren(...lines.map((line, k) => {
      const part = document.createElement(k ? "div" : "b");
      part.textContent = line;
      return part;
    }));
    const { offsetWidth: w, offsetHeight: h } = tip;
    tip.style.left = `${Math.min(e.clientX + 14, window.innerWidth - w - 8)}px`;
    tip.style.top = `${Math.min(e.clientY + 14, window.innerHeight - h - 8)}px`;
  };

  const refresh = () => { every((graph) => graph.rebuild()); shared.changed(); };
  get("fit").addEventListener("click", () => every((graph) => graph.fit()));
  get("collapse").addEventListener("click", () => {
    every((graph) => { graph.closed = new Set(graph.outermost()); });
    refresh();
  });
  get("expand").addEventListener("click", () => { every((graph) => graph.closed.clear()); refresh(); });
  get("constants").addEventListener("change", (e) => { shared.constants = e.target.checked; refresh(); });
  get("after").addEventListener("change", (e) => { get("second").hidden = !e.target.checked; refresh(); });
  get("search").addEventListener("input", (e) => {
    const text = e.target.value.trim(), hits = get("hits");
    hits.replaceChildren();
    if (!text) return;
    graphs.forEach((graph, side) => {
      const found = graph.find(text);
      for (const [node, k] of found.slice(0, 40)) {
        const row = document.createElement("li"), button = document.createElement("button");
        button.textContent = `${node.op} ${node.name}${side ? " (after)" : ""}`;
        button.addEventListener("click", () => { graph.show(k); shared.changed(); });
        row.append(button);
        hits.append(row);
      }
      if (found.length > 40) {
        const row = document.createElement("li");
        row.textContent = `and ${found.length - 40} more${side ? " (after)" : ""}`;
        hits.append(row);
      }
    });
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  window.addEventListener("resize", () => every((graph) => graph.draw()));
  graphs.forEach((graph) => graph.arrange());
  paint();
  every((graph) => graph.fit(READABLE));
  shared.changed();
  window.onnxrank = { graphs };
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }));
}

function describe(node) {
  const lines = [`${node.op} ${node.name}`];
  if (node.tensor) lines.push(`makes ${node.tensor}`);
  lines.push(`${node.shape ? node.shape + ", " : ""}${node.level}${node.op === "input" ? "-level" : ""}`);
  if (node.rows && node.level === "request") lines.push("the same for all candidates, but made for each");
  if (node.blocks) {
    for (const [level, , positions] of node.blocks.slice(0, 8)) lines.push(`axis ${node.axis}, ${positions}: ${level}`);
  }
  if (node.macs) {
    lines.push(`${human(node.macs)} multiply-adds (${(100 * node.share).toFixed(1)} %), ${human(node.once)} the same for all`);
  }
  if (node.bytes) lines.push(`writes ${human(node.bytes)}B`);
  if (node.rule) lines.push(node.saved ? `rule ${node.rule} saves ${human(node.saved)} multiply-adds` : `rule ${node.rule}`);
  if (node.scope) lines.push(`in ${node.scope}`);
  return lines;
}

const held = JSON.parse(document.getElementById("data").textContent);
if (held && held.graphs) start(held);
