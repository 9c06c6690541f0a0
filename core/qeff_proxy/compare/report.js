"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const SVG = "http://www.w3.org/2000/svg";
const tip = document.getElementById("tip");

// Errors come as numbers; "inf" stands for a NaN, an infinity or a mismatch of shapes.
const number = (e) => (e === "inf" ? Infinity : e);
const share = (e) => {
  if (e === null) return "–";
  e = number(e);
  if (e === Infinity) return "∞";
  if (e === 0) return "0";
  return e >= 0.1 ? (100 * e).toFixed(0) + "%" : (100 * e).toPrecision(2) + "%";
};
const short = (v) => (v === null ? "–" : v === "inf" ? "∞" : v === 0 ? "0" : v < 1e-3 ? v.toExponential(2) : v.toPrecision(3));

function element(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function html(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
function explain(node, text) {
  node.addEventListener("mousemove", (event) => {
    tip.textContent = text;
    tip.style.display = "block";
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = left + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  node.addEventListener("mouseleave", () => { tip.style.display = "none"; });
}
function range(values) {
  const known = values.map(number).filter((e) => e > 0 && e < Infinity);
  if (!known.length) return [-8, 0];
  const low = Math.max(Math.floor(Math.log10(Math.min(...known))), -12);
  const high = Math.ceil(Math.log10(Math.max(...known)));
  return [Math.min(low, high - 2), Math.min(high, 4)];
}
const power = (k) => (k >= -6 ? parseFloat((100 * 10 ** k).toPrecision(1)) + "%" : "1e" + (k + 2) + "%");

// Layers by their numbers; below them, in two rows, the names of what is not a layer.
function drawTicks(svg, places, x, floor) {
  const ends = [0, 0, 0];
  places.forEach((place, i) => {
    const half = 3.3 * String(place).length + 3;
    const row = (isNaN(place) ? [1, 2] : [0]).find((r) => x(i) - half >= ends[r]);
    if (row === undefined) return;
    ends[row] = x(i) + half;
    svg.append(element("text", { x: x(i), y: floor + 18 + 14 * row, "text-anchor": "middle" }, place));
  });
}
const below = data.places.some(isNaN) ? 70 : 42;
function drawLayers() {
  const plot = document.getElementById("layer-plot"), legend = document.getElementById("layer-legend");
  plot.replaceChildren(); legend.replaceChildren();
  const series = data.series;
  if (!series.length) { document.getElementById("layers-card").hidden = true; return; }
  const places = data.places, width = 1100, height = 288 + below, left = 58, right = 16, top = 16, bottom = below;
  const [low, high] = range(series.flatMap((s) => s.points.map((p) => p.error)));
  const floor = height - bottom;
  const x = (i) => left + 14 + (places.length < 2 ? 0.5 : i / (places.length - 1)) * (width - left - right - 28);
  const y = (e) => {
    e = number(e);
    if (e === 0) return floor;
    const share = (Math.min(Math.max(Math.log10(e), low), high) - low) / (high - low);
    return floor - 14 - share * (floor - 14 - top);
  };
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "error by layer" });
  for (let k = low; k <= high; k += Math.max(1, Math.round((high - low) / 7))) {
    svg.append(element("line", { x1: left, x2: width - right, y1: y(10 ** k), y2: y(10 ** k), stroke: "var(--line)" }));
    svg.append(element("text", { x: left - 8, y: y(10 ** k) + 4, "text-anchor": "end" }, power(k)));
  }
  svg.append(element("line", { x1: left, x2: width - right, y1: floor, y2: floor, stroke: "var(--soft)" }));
  svg.append(element("text", { x: left - 8, y: floor + 4, "text-anchor": "end" }, "exact"));
  drawTicks(svg, places, x, floor);
  svg.append(element("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, data.axis));
  const first = data.first_place;
  if (first !== null) {
    svg.append(element("line", { x1: x(first), x2: x(first), y1: top, y2: floor, stroke: "var(--bad)", "stroke-dasharray": "4 4" }));
    const flip = x(first) > width * 0.7;
    svg.append(element("text", { x: x(first) + (flip ? -6 : 6), y: top - 4, "text-anchor": flip ? "end" : "start", style: "fill:var(--bad);font-weight:600" }, data.first_text));
  }
  series.forEach((s, n) => {
    const colour = `var(--s${n % 6})`;
    const line = s.points.map((p) => `${x(p.place)},${y(p.error)}`).join(" ");
    svg.append(element("polyline", { points: line, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": n >= 6 ? "5 3" : "none" }));
    for (const p of s.points) {
      const text = `${s.name}, ${data.names[p.place]}: ${share(p.error)} ${p.passed ? "passed" : "FAILED"} (${p.step})`;
      const dot = p.passed
        ? element("circle", { cx: x(p.place), cy: y(p.error), r: 4, fill: colour })
        : element("path", { d: `M${x(p.place) - 4.5} ${y(p.error) - 4.5}l9 9m0-9l-9 9`, stroke: colour, "stroke-width": 2.5 });
      const target = element("circle", { cx: x(p.place), cy: y(p.error), r: 9, fill: "transparent" });
      explain(target, text);
      svg.append(dot, target);
    }
    const item = html("span"), swatch = html("i");
    swatch.style.background = colour;
    item.append(swatch, s.name);
    legend.append(item);
  });
  plot.append(svg);
}

// A line through points, each "x,y".
function drawLine(svg, places, colour, dashes) {
  if (!places.length) return;
  svg.append(element("polyline", { points: places.join(" "), fill: "none", stroke: colour, "stroke-width": dashes ? 1.5 : 2, "stroke-dasharray": dashes || "none" }));
}
function drawDecibels() {
  const plot = document.getElementById("decibel-plot"), legend = document.getElementById("decibel-legend");
  const series = Object.entries(data.decibels), places = data.places;
  if (!series.length) { document.getElementById("decibel-card").hidden = true; return; }
  const values = series.flatMap(([, points]) => points.flatMap((p) => [p.sqnr, p.floor, p.limit])).filter((v) => typeof v === "number");
  const floors = series.some(([, points]) => points.some((p) => p.floor !== null));
  document.querySelectorAll(".floor").forEach((node) => { node.hidden = !floors; });
  const low = Math.floor(Math.min(...values) / 10) * 10, high = Math.ceil(Math.max(...values) / 5) * 5 + 1;
  const width = 1100, height = 258 + below, left = 58, right = 16, top = 16, bottom = below;
  const x = (i) => left + 14 + (places.length < 2 ? 0.5 : i / (places.length - 1)) * (width - left - right - 28);
  const y = (v) => height - bottom - (v - low) / (high - low) * (height - bottom - top);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "SQNR by layer" });
  for (let v = low; v <= high; v += high - low > 60 ? 20 : 10) {
    svg.append(element("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), stroke: "var(--line)" }));
    svg.append(element("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, v + " dB"));
  }
  drawTicks(svg, places, x, height - bottom);
  svg.append(element("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, data.axis));
  series.forEach(([name, points], n) => {
    const colour = `var(--s${n % 6})`, known = points.filter((p) => typeof p.floor === "number");
    drawLine(svg, known.map((p) => `${x(p.place)},${y(p.floor)}`), colour, "2 4");
    drawLine(svg, points.filter((p) => p.limit !== null).map((p) => `${x(p.place)},${y(p.limit)}`), colour, "7 4");
    drawLine(svg, points.map((p) => `${x(p.place)},${y(p.sqnr)}`), colour);
    for (const p of points) {
      const dot = p.passed
        ? element("circle", { cx: x(p.place), cy: y(p.sqnr), r: 4, fill: colour })
        : element("path", { d: `M${x(p.place) - 4.5} ${y(p.sqnr) - 4.5}l9 9m0-9l-9 9`, stroke: colour, "stroke-width": 2.5 });
      const target = element("circle", { cx: x(p.place), cy: y(p.sqnr), r: 9, fill: "transparent" });
      const floor = p.floor === null ? "" : `, floor ${decibels(p.floor)}, limit ${decibels(p.limit)}`;
      explain(target, `${name}, ${data.names[p.place]}, ${p.kind}: ${p.sqnr.toFixed(1)} dB${floor} ${p.passed ? "passed" : "FAILED"}`);
      svg.append(dot, target);
    }
    const item = html("span"), swatch = html("i");
    swatch.style.background = colour;
    item.append(swatch, name);
    legend.append(item);
  });
  plot.append(svg);
}

// Two ramps of one lightness order each: what passed in blue, what failed in orange.
function ramp(share, failed) {
  const t = Math.max(0, Math.min(1, share));
  if (dark.matches) return failed ? `hsl(${28 - 14 * t} 85% ${30 + 36 * t}%)` : `hsl(213 55% ${17 + 40 * t}%)`;
  return failed ? `hsl(${30 - 18 * t} 88% ${78 - 40 * t}%)` : `hsl(213 65% ${96 - 40 * t}%)`;
}
function drawHeat() {
  const box = document.getElementById("heat-map"), legend = document.getElementById("heat-legend");
  box.replaceChildren(); legend.replaceChildren();
  const { rows, columns } = data.heat;
  if (!rows.length || !columns.length) { document.getElementById("heat-card").hidden = true; return; }
  const [low, high] = range(rows.flatMap((r) => r.cells.map((c) => (c ? c[0] : 0))));
  const scale = (e) => { e = number(e); return e === 0 ? 0 : e === Infinity ? 1 : 0.12 + 0.88 * (Math.log10(e) - low) / (high - low); };
  const width = 1100, left = 128, right = 4, cell = Math.max(9, Math.min(22, 460 / rows.length));
  const wide = (width - left - right) / columns.length, height = rows.length * cell + 30;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "error by step and layer" });
  const gap = Math.min(1, wide / 8);
  const every = Math.ceil(12 / cell);
  rows.forEach((row, r) => {
    if (r % every === 0) svg.append(element("text", { x: left - 8, y: r * cell + cell / 2 + 4, "text-anchor": "end" }, row.label));
    row.cells.forEach((c, i) => {
      if (!c) return;
      const rect = element("rect", { x: left + i * wide, y: r * cell, width: wide - gap, height: cell - 1, fill: ramp(scale(c[0]), !c[1]) });
      rect.classList.add("cell");
      explain(rect, `${row.label}, ${columns[i]}: ${share(c[0])} ${c[1] ? "passed" : "FAILED"} (${c[2]})`);
      svg.append(rect);
    });
  });
  const skip = Math.ceil(columns.length / 12);
  columns.forEach((label, i) => {
    const at = left + i * wide;
    if (i % skip === 0 && at + 80 < width) svg.append(element("text", { x: at, y: height - 12 }, label));
  });
  box.append(svg);
  for (const failed of [false, true]) {
    const item = html("span"), strip = html("span", undefined, "ramp");
    for (let i = 0; i <= 8; i++) { const b = html("b"); b.style.background = ramp(i / 8, failed); strip.append(b); }
    item.append(failed ? "outside the tolerance" : "within", strip);
    legend.append(item);
  }
  legend.append(html("span", `exact … ${share(10 ** high)}`, "hint"));
}

const decibels = (v) => (v === "inf" ? "exact" : v === null ? "–" : v.toFixed(1));
// Title, key, class, format; of those that a row has.
const COLUMNS = [
  [data.thing, "name", "left wide"], ["error", "whose", "left"], ["phase", "phase", "left"], ["layer", "layer"],
  ["steps", "steps"], ["failed", "failed"], ["max error", "max_abs", "", short],
  ["at", "at", "left"], ["mean", "mean_abs", "", short], ["max rel.", "max_rel", "", short],
  ["error/peak", "error", "", share], ["SQNR dB", "sqnr", "", decibels], ["floor", "floor", "", decibels], ["limit", "limit", "", decibels], ["SQNR of", "kind", "left"],
  ["cosine", "cosine", "", (v) => (v === null ? "–" : v.toFixed(6))], ["dtype", "dtype", "left"],
  ["held to", "tolerance", "left wide"], ["", "verdict", "left"],
].filter(([, key]) => data.tensors.some((t) => key in t && (!["floor", "limit", "kind"].includes(key) || t.floor !== null)));
let sorted = { column: -1, down: false };
function fillTable() {
  const words = document.getElementById("filter").value.toLowerCase();
  const onlyFailed = document.getElementById("only-failed").checked;
  let rows = data.tensors.filter((t) => [t.name, t.phase, t.whose].join(" ").toLowerCase().includes(words) && !(onlyFailed && t.passed));
  document.getElementById("shown").textContent = `${rows.length} of ${data.tensors.length}`;
  if (sorted.column >= 0) {
    const key = COLUMNS[sorted.column][1], sign = sorted.down ? -1 : 1;
    const rank = (v) => (v === null ? -Infinity : number(v));
    rows = rows.slice().sort((a, b) => {
      const [p, q] = [rank(a[key]), rank(b[key])];
      return sign * (p < q ? -1 : p > q ? 1 : 0);
    });
  }
  const body = document.querySelector("#tensors tbody");
  body.replaceChildren(...rows.map((t) => {
    const tr = html("tr");
    COLUMNS.forEach(([title, key, align, format], i) => {
      const v = t[key];
      const td = html("td", format ? format(v) : v === null ? "–" : String(v), align);
      if (i === 0) td.classList.add("mono");
      if (title === "") td.classList.add(t.passed ? "ok" : "no");
      if (title === "" && t.why) td.title = t.why;
      tr.append(td);
    });
    return tr;
  }));
}
function buildTable() {
  if (!data.tensors.length) { document.getElementById("table-card").hidden = true; return; }
  const head = document.querySelector("#tensors thead tr");
  COLUMNS.forEach(([title, , align], i) => {
    const th = html("th"), button = html("button", title || "verdict");
    if (align) button.style.textAlign = "left";
    button.addEventListener("click", () => {
      sorted = { column: i, down: sorted.column === i ? !sorted.down : i > 2 };
      head.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      fillTable();
    });
    th.append(button);
    head.append(th);
  });
  document.getElementById("filter").addEventListener("input", fillTable);
  document.getElementById("only-failed").addEventListener("change", fillTable);
  fillTable();
}
function fillWorst() {
  const box = document.getElementById("worst");
  if (!data.tensors.length) { document.getElementById("worst-card").hidden = true; return; }
  for (const t of data.worst) {
    const card = html("article");
    card.append(html("div", t.name, "name mono"));
    card.append(html("div", share(t.error) + " of the peak", "big " + (t.passed ? "ok" : "no")));
    for (const line of t.lines) card.append(html("div", line));
    box.append(card);
  }
  if (!data.worst.length) box.append(html("p", "Nothing differs at all.", "hint"));
}
drawLayers(); drawDecibels(); drawHeat(); buildTable(); fillWorst();
dark.addEventListener("change", drawHeat);
document.documentElement.dataset.ready = "yes";
