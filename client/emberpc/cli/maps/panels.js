
"use strict";
// All around the drawing: a record in full, the legend, the search, the pointer and the keys.

function groupLine(point) {
  const line = element("span", "group"), dot = element("span", "dot");
  dot.style.backgroundColor = colour(groupOf[point]);
  line.append(dot, element("span", "", groups[groupOf[point]].name));
  return line;
}

function fields(point, most) {
  const list = element("dl");
  const labelled = labels[point] && labels[point] !== groups[groupOf[point]].name;
  const rows = [["id", ids[point]], ...(labelled ? [["label", labels[point]]] : []), ...metadata[point]];
  for (const [name, value] of rows.slice(0, most)) list.append(element("dt", "", name), element("dd", "", value));
  return list;
}

function hover(point, x, y) {
  if (point !== hovered) {
    hovered = point;
    canvas.classList.toggle("over", point >= 0);
    tip.hidden = point < 0;
    if (point >= 0) tip.replaceChildren(groupLine(point), element("div", "text", texts[point]), fields(point, 7));
    redraw();
  }
  if (point < 0) return;
  const gap = 14, width = tip.offsetWidth, height = tip.offsetHeight;
  const left = x + gap + width < size.width ? x + gap : Math.max(0, x - gap - width);
  const top = Math.max(0, Math.min(y + gap, size.height - height - 4));
  tip.style.transform = `translate(${left}px, ${top}px)`;
}

function pin(point) {
  pinned = point;
  details.hidden = point < 0;
  if (point >= 0) {
    const close = element("button", "", "close");
    close.type = "button";
    close.addEventListener("click", () => { pin(-1); canvas.focus(); });
    const bar = element("div", "bar");
    bar.append(groupLine(point), close);
    details.replaceChildren(bar, element("div", "text", texts[point]), fields(point));
    const others = beside(point, 6);
    if (others.length) details.append(element("h3", "", "Beside it on the map"));
    for (const other of others) details.append(besideButton(other));
    details.scrollTop = 0;
  }
  redraw();
}

function besideButton(point) {
  const button = element("button", "beside"), dot = element("span", "dot");
  button.type = "button";
  dot.style.backgroundColor = colour(groupOf[point]);
  button.append(dot, element("span", "", texts[point] || ids[point]));
  button.addEventListener("click", () => { centre(point); pin(point); });
  return button;
}

// The legend.

function fillLegend() {
  find("groups").replaceChildren(...groups.map((group, i) => {
    const item = element("li"), button = element("button"), dot = element("span", "dot");
    button.type = "button";
    button.setAttribute("aria-pressed", on[i]);
    dot.style.backgroundColor = colour(i);
    button.append(dot, element("span", "name", group.name), element("span", "count", number(group.count)));
    button.addEventListener("click", () => switchGroups((other) => (other === i ? !on[i] : on[other])));
    button.addEventListener("dblclick", () => switchGroups((other) => other === i));
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => setFocus(i));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => setFocus(-1));
    item.append(button);
    return item;
  }));
}

function switchGroups(wish) {
  groups.map((_, i) => wish(i)).forEach((wished, i) => { on[i] = wished; });
  find("groups").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", on[i]));
  setFocus(-1);
  lookFor();
}

function setFocus(group) {
  focus = group >= 0 && on[group] ? group : -1;
  redraw();
}

// The search.

const folded = (text) => text.normalize("NFKC").toLowerCase();
let haystack = null;

/** Mark the records that contain all words; of one without a text its id is what is looked at. */
function lookFor() {
  const words = folded(find("words").value).split(/\s+/).filter(Boolean);
  haystack = haystack || texts.map((text, i) => folded(text || ids[i]));
  matches = words.length ? Uint8Array.from(haystack, (text) => Number(words.every((word) => text.includes(word)))) : null;
  const shown = matches === null ? 0 : matches.reduce((sum, match, i) => sum + (match && on[groupOf[i]] ? 1 : 0), 0);
  find("found").textContent = matches === null ? "" : `${number(shown)} of ${number(count)}`;
  choice++;
  redraw();
}

/** Open the next record found, or the one before. */
function step(by) {
  for (let i = 1; matches !== null && i <= count; i++) {
    const next = (((pinned < 0 && by < 0 ? 0 : pinned) + by * i) % count + count) % count;
    if (matches[next] && on[groupOf[next]]) {
      centre(next);
      pin(next);
      return;
    }
  }
}

// The pointer and the keys.

const pointers = new Map();
let moved = 0;

const at = (event) => {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
};
const reach = () => Math.max(9, radius() + 4);

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, at(event));
  if (pointers.size === 1) moved = 0;
});

canvas.addEventListener("pointermove", (event) => {
  const now = at(event), before = pointers.get(event.pointerId);
  if (!before) {
    hover(nearest(now.x, now.y, reach()), now.x, now.y);
    return;
  }
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
  moved += Math.hypot(now.x - before.x, now.y - before.y);
  pointers.set(event.pointerId, now);
  if (moved < 4) return;
  hover(-1);
  canvas.classList.add("dragging");
  if (other) {
    const apart = (p) => Math.max(1, Math.hypot(p.x - other.x, p.y - other.y));
    zoom(apart(now) / apart(before), other.x, other.y);
  } else {
    move(now.x - before.x, now.y - before.y);
  }
});

function release(event) {
  const tapped = pointers.delete(event.pointerId) && moved < 4 && event.type === "pointerup";
  if (!pointers.size) canvas.classList.remove("dragging");
  if (tapped) {
    const { x, y } = at(event);
    pin(nearest(x, y, reach()));
  }
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => hover(-1));

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const { x, y } = at(event);
  // By pixels, lines or pages.
  zoom(Math.exp(-event.deltaY * [0.0016, 0.04, 0.4][event.deltaMode]), x, y);
  hover(-1);
}, { passive: false });

const keys = {
  ArrowLeft: () => move(60, 0),
  ArrowRight: () => move(-60, 0),
  ArrowUp: () => move(0, 60),
  ArrowDown: () => move(0, -60),
  "+": () => zoom(1.4),
  "=": () => zoom(1.4),
  "-": () => zoom(1 / 1.4),
  0: showWhole,
  Enter: () => (matches === null ? pin(nearest(size.width / 2, size.height / 2, Infinity)) : step(1)),
};

canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  keys[event.key]();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") pin(-1); });

find("words").addEventListener("input", lookFor);
find("words").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  step(event.shiftKey ? -1 : 1);
});
find("search").addEventListener("submit", (event) => event.preventDefault());
find("nearer").addEventListener("click", () => zoom(1.4));
find("farther").addEventListener("click", () => zoom(1 / 1.4));
find("whole").addEventListener("click", showWhole);
find("all").addEventListener("click", () => switchGroups(() => true));
find("none").addEventListener("click", () => switchGroups(() => false));

// The start.

function resize() {
  const ratio = window.devicePixelRatio || 1;
  const first = size.width <= 1, whole = view.scale === wholeScale;
  const before = size;
  size = { width: stage.clientWidth, height: stage.clientHeight };
  canvas.width = Math.round(size.width * ratio);
  canvas.height = Math.round(size.height * ratio);
  if (first || whole) showWhole();
  else move((size.width - before.width) / 2, (size.height - before.height) / 2);
}

const sampled = count < data.total;
document.title = `${data.collection}: map`;
find("title").textContent = data.collection;
find("about").textContent = [
  sampled ? `${number(count)} of ${number(data.total)} records, a random sample` : `${number(count)} record${count === 1 ? "" : "s"}`,
  ...(data.where ? [`where ${data.where}`] : []),
  data.method,
  data.made,
].join(" · ");
find("grouped-by").textContent = `Coloured by ${data.groupedBy}`;
canvas.setAttribute("aria-label", `Map of ${number(count)} records of ${data.collection}; find words to step through records`);
fillLegend();
darkness.addEventListener("change", () => { fillLegend(); pin(pinned); });
new ResizeObserver(resize).observe(stage);
