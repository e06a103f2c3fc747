
"use strict";
{
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
    const room = { width: Math.max(40, size.width - 90), height: Math.max(40, size.height - 110) };
    // Few or equal points are not blown up past what a map of many would be.
    const least = data.scale / 4;
    wholeScale = Math.min(room.width / Math.max(right - left, least), room.height / Math.max(bottom - top, least));
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
    view = { scale, x: x - (x - view.x) * by, y: y - (y - view.y) * by };
    redraw();
  }

  function move(right, down) {
    view = { ...view, x: view.x + right, y: view.y + down };
    redraw();
  }

  function centre(i) {
    const [x, y] = toScreen(i);
    if (!inside(x, y, -40)) move(size.width / 2 - x, size.height / 2 - y);
  }

  // Drawing.

  let wanted = false;
  function redraw() {
    if (wanted) return;
    wanted = true;
    requestAnimationFrame(() => { wanted = false; draw(); });
  }

  function radius() {
    const base = Math.min(6, Math.max(1.8, Math.sqrt((size.width * size.height) / count) / 3.9));
    return base * Math.min(2.2, Math.max(0.8, Math.sqrt(view.scale / wholeScale)));
  }

  /** A dot for each group, drawn once and then copied, which is many times as fast as drawing each. */
  function dots(r, ratio) {
    const rim = r > 2.2 ? 0.5 : 0;
    const side = Math.ceil((r + rim) * ratio) * 2 + 2;
    return groups.map((_, group) => {
      const made = document.createElement("canvas");
      made.width = made.height = side;
      const brush = made.getContext("2d");
      brush.beginPath();
      brush.arc(side / 2, side / 2, r * ratio, 0, 2 * Math.PI);
      brush.fillStyle = colour(group);
      brush.fill();
      if (rim) {
        brush.strokeStyle = ink("--paper");
        brush.lineWidth = rim * ratio;
        brush.stroke();
      }
      return made;
    });
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    const r = radius();
    const stamps = dots(r, ratio);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const picked = (i) => (matches === null || matches[i] === 1) && (focus < 0 || groupOf[i] === focus);
    const everything = matches === null && focus < 0;
    const layers = everything ? [[0.9, () => true]] : [[0.13, (i) => !picked(i)], [1, picked]];
    for (const [opacity, chosen] of layers) {
      context.globalAlpha = opacity;
      for (let i = 0; i < count; i++) {
        if (!on[groupOf[i]] || !chosen(i)) continue;
        const x = xs[i] * view.scale + view.x, y = ys[i] * view.scale + view.y;
        if (!inside(x, y, r)) continue;
        const stamp = stamps[groupOf[i]];
        context.drawImage(stamp, x * ratio - stamp.width / 2, y * ratio - stamp.height / 2);
      }
    }
    context.globalAlpha = 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (const i of new Set([hovered, pinned])) if (i >= 0 && on[groupOf[i]]) ring(i, r);
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

  /** The groups' names, the largest group's first; one that would cover another waits until there is room. */
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
}
