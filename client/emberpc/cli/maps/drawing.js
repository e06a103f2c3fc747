
"use strict";
// What is shown, and the drawing of it.

const data = JSON.parse(document.getElementById("data").textContent);
const { x: xs, y: ys, group: groupOf, id: ids, label: labels, text: texts, metadata } = data.points;
const groups = data.groups;
const count = ids.length;
const find = (id) => document.getElementById(id);
const canvas = find("canvas"), stage = find("stage"), tip = find("tip"), details = find("details");
const context = canvas.getContext("2d");
const darkness = matchMedia("(prefers-color-scheme: dark)");
const number = (n) => n.toLocaleString("en");

// What is shown. A point is -1 where there is none.
const on = groups.map(() => true);
let matches = null; // of the search: a byte for each point; null if nothing is looked for
let focus = -1; // the group under the pointer in the legend
let hovered = -1, pinned = -1;
let view = { scale: 1, x: 0, y: 0 }; // screen = point * scale + offset
let wholeScale = 1;
let size = { width: 1, height: 1 };

/** An element with a class and text: texts come from anybody, and are never markup. */
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Colours.

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function colour(group, use) {
  const dark = darkness.matches;
  const { hue, tone } = groups[group];
  if (use === "name") return hue === null ? ink("--quiet") : `oklch(${dark ? 0.88 : 0.38} 0.1 ${hue})`;
  if (hue === null) return dark ? "oklch(0.55 0 0)" : "oklch(0.72 0 0)";
  return tone ? `oklch(${dark ? 0.62 : 0.76} 0.11 ${hue})` : `oklch(${dark ? 0.76 : 0.62} 0.17 ${hue})`;
}

// The view.

const toScreen = (i) => [xs[i] * view.scale + view.x, ys[i] * view.scale + view.y];
const inside = (x, y, edge) => x > -edge && y > -edge && x < size.width + edge && y < size.height + edge;

function showWhole() {
  let left = Infinity, right = -Infinity, top = Infinity, bottom = -Infinity;
  for (let i = 0; i < count; i++) {
    left = Math.min(left, xs[i]); right = Math.max(right, xs[i]);
    top = Math.min(top, ys[i]); bottom = Math.max(bottom, ys[i]);
  }
  const area = { width: Math.max(40, size.width - 90), height: Math.max(40, size.height - 110) };
  // Few or equal points are not blown up past what a map of many would be.
  const least = data.scale / 4;
  wholeScale = Math.min(area.width / Math.max(right - left, least), area.height / Math.max(bottom - top, least));
  view = {
    scale: wholeScale,
    x: size.width / 2 - ((left + right) / 2) * wholeScale,
    y: size.height / 2 - 8 - ((top + bottom) / 2) * wholeScale,
  };
  redraw();
}

function zoom(factor, x = size.width / 2, y = size.height / 2) {
  const scale = Math.min(wholeScale * 300, Math.max(wholeScale / 3, view.scale * factor));
  const by = scale / view.scale;
  change({ scale, x: x - (x - view.x) * by, y: y - (y - view.y) * by });
}

function move(right, down) {
  change({ ...view, x: view.x + right, y: view.y + down });
}

function centre(i) {
  const [x, y] = toScreen(i);
  if (!inside(x, y, -40)) move(size.width / 2 - x, size.height / 2 - y);
}

// Drawing.

const sheet = document.createElement("canvas"), brush = sheet.getContext("2d");
let painted = { state: "", view, cost: 0 };
let moving = null; // the timer that runs until the view rests; null if it does
let choice = 0; // counts the changes of what is shown

function change(newView) {
  view = newView;
  clearTimeout(moving);
  moving = setTimeout(() => { moving = null; redraw(); }, 120);
  redraw();
}

let wanted = false;
function redraw() {
  if (wanted) return;
  wanted = true;
  requestAnimationFrame(() => { wanted = false; draw(); });
}

function radius() {
  const base = Math.min(6, Math.max(1.8, Math.sqrt((size.width * size.height) / count) / 3.9));
  const grown = base * Math.min(2.2, Math.max(0.8, Math.sqrt(view.scale / wholeScale)));
  return Math.round(grown * 4) / 4;
}

let stamps = { key: "" };

/** A row of dots, one for each group, drawn once and then copied, which is many times as fast as drawing each. */
function dots(r, ratio) {
  const rim = r > 2.2 ? 0.5 : 0;
  const side = Math.ceil((r + rim) * ratio) * 2 + 2;
  const key = [r, ratio, darkness.matches].join();
  if (stamps.key === key) return stamps;
  const row = document.createElement("canvas");
  row.width = side * groups.length;
  row.height = side;
  const pen = row.getContext("2d");
  pen.strokeStyle = ink("--paper");
  pen.lineWidth = rim * ratio;
  groups.forEach((_, group) => {
    pen.beginPath();
    pen.arc(side * (group + 0.5), side / 2, r * ratio, 0, 2 * Math.PI);
    pen.fillStyle = colour(group);
    pen.fill();
    if (rim) pen.stroke();
  });
  stamps = { key, row, side };
  return stamps;
}

/** Draw the points on a sheet of their own. */
function paint(state, ratio) {
  const start = performance.now();
  const r = radius();
  const { row, side } = dots(r, ratio);
  sheet.width = canvas.width; // which wipes it
  sheet.height = canvas.height;
  const picked = (i) => (matches === null || matches[i] === 1) && (focus < 0 || groupOf[i] === focus);
  const everything = matches === null && focus < 0;
  const layers = everything ? [[0.9, () => true]] : [[0.13, (i) => !picked(i)], [1, picked]];
  for (const [opacity, chosen] of layers) {
    brush.globalAlpha = opacity;
    for (let i = 0; i < count; i++) {
      if (!on[groupOf[i]] || !chosen(i)) continue;
      const x = xs[i] * view.scale + view.x, y = ys[i] * view.scale + view.y;
      if (!inside(x, y, r)) continue;
      brush.drawImage(row, groupOf[i] * side, 0, side, side, x * ratio - side / 2, y * ratio - side / 2, side, side);
    }
  }
  painted = { state, view, cost: performance.now() - start };
}

/** Draw all; while the view moves, points that take long are moved as a whole, and drawn again when it rests. */
function draw() {
  const ratio = window.devicePixelRatio || 1;
  const state = [canvas.width, canvas.height, ratio, focus, darkness.matches, choice].join();
  const slow = moving !== null && painted.cost > 12;
  if (painted.state !== state || (painted.view !== view && !slow)) paint(state, ratio);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, size.width, size.height);
  const by = view.scale / painted.view.scale;
  const left = view.x - painted.view.x * by, top = view.y - painted.view.y * by;
  context.drawImage(sheet, left, top, size.width * by, size.height * by);
  for (const i of new Set([hovered, pinned])) if (i >= 0 && on[groupOf[i]]) ring(i, radius());
  drawNames();
}

function ring(i, r) {
  const [x, y] = toScreen(i);
  context.beginPath();
  context.arc(x, y, r + 3, 0, 2 * Math.PI);
  context.lineWidth = i === pinned ? 3 : 2;
  context.strokeStyle = ink("--ink");
  context.stroke();
}

/** How many points of each group stand out. */
function shownSizes() {
  const sizes = groups.map((group, i) => (matches === null && on[i] && (focus < 0 || focus === i) ? group.count : 0));
  for (let i = 0; matches !== null && i < count; i++) {
    const group = groupOf[i];
    if (matches[i] && on[group] && (focus < 0 || focus === group)) sizes[group]++;
  }
  return sizes;
}

/** The groups' names, the largest group's first; one that would cover another waits until there is space. */
function drawNames() {
  const height = 16, margin = 3;
  context.font = "600 12px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineJoin = "round";
  context.strokeStyle = ink("--paper");
  context.lineWidth = 3.5;
  const taken = ["zoom", "help"].map(find).map((e) => [
    e.offsetLeft, e.offsetTop, e.offsetLeft + e.offsetWidth, e.offsetTop + e.offsetHeight,
  ]);
  const sizes = shownSizes();
  const named = groups.map((_, i) => i).filter((i) => sizes[i] && groups[i].x !== null);
  for (const i of named.sort((a, b) => sizes[b] - sizes[a])) {
    const x = groups[i].x * data.scale * view.scale + view.x, y = groups[i].y * data.scale * view.scale + view.y;
    if (!inside(x, y, 0)) continue;
    const name = groups[i].name.length > 28 ? `${groups[i].name.slice(0, 27)}…` : groups[i].name;
    const half = context.measureText(name).width / 2 + margin;
    const middle = Math.min(Math.max(x, half), size.width - half);
    // Beside a few points rather than on them.
    const above = sizes[i] < 4 ? radius() + height / 2 + 2 : 0;
    for (const up of [-above, above, -height * 0.6, height * 0.6, -height * 1.2, height * 1.2]) {
      const box = [middle - half, y + up - height / 2 - margin, middle + half, y + up + height / 2 + margin];
      const free = taken.every((o) => box[2] < o[0] || box[0] > o[2] || box[3] < o[1] || box[1] > o[3]);
      if (!free || box[1] < 0 || box[3] > size.height) continue;
      taken.push(box);
      context.globalAlpha = 0.9;
      context.strokeText(name, middle, y + up);
      context.globalAlpha = 1;
      context.fillStyle = colour(i, "name");
      context.fillText(name, middle, y + up);
      break;
    }
  }
}

// Points under the pointer, and beside each other.

function nearest(x, y, reach) {
  let found = -1, least = reach * reach;
  for (let i = 0; i < count; i++) {
    if (!on[groupOf[i]] || (matches !== null && !matches[i])) continue;
    const right = xs[i] * view.scale + view.x - x, down = ys[i] * view.scale + view.y - y;
    const far = right * right + down * down;
    if (far < least) { least = far; found = i; }
  }
  return found;
}

function beside(point, wantedCount) {
  const far = (i) => (xs[i] - xs[point]) ** 2 + (ys[i] - ys[point]) ** 2;
  return Array.from({ length: count }, (_, i) => i)
    .filter((i) => i !== point)
    .sort((a, b) => far(a) - far(b))
    .slice(0, wantedCount);
}
