"""Style sheet and script of the report page, kept as text so that the page needs no other file."""

STYLE = """
:root { color-scheme: light dark;
  --back: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #5b6675; --line: #dfe3e9; --grid: #e9ecf1;
  --accent: #2456b8; --bad: #b3261e; --good: #17723a; --code: #f1f3f6;
  --c0: #2563c9; --c1: #c2410c; --c2: #15803d; --c3: #7e3fb5; --c4: #b0195e; --c5: #0e7490; }
@media (prefers-color-scheme: dark) { :root {
  --back: #12151a; --card: #1b2027; --text: #e6eaf0; --soft: #9aa6b5; --line: #313945; --grid: #29303a;
  --accent: #84b0ff; --bad: #ff9a90; --good: #6cd697; --code: #14181e;
  --c0: #6ea8ff; --c1: #ff9a5c; --c2: #5fd38a; --c3: #c79bff; --c4: #ff86b8; --c5: #55cfe6; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1360px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 26px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 18px 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 6px 0 10px; }
.soft { color: var(--soft); }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 10px 0; border-bottom: 1px solid var(--line); }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-top: 18px; }
.card, figure.chart, .box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 10px 14px 12px; }
.card .what { color: var(--soft); font-size: 13px; }
.card .number { font-size: 25px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .more { color: var(--soft); font-size: 12.5px; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure.chart { padding: 9px 10px 8px; }
figcaption { display: flex; justify-content: space-between; align-items: center; font-size: 14px; font-weight: 600;
  min-height: 26px; overflow-wrap: anywhere; }
.plot { position: relative; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .name { font-size: 11.5px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); } .cross { stroke: var(--soft); stroke-dasharray: 3 3; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.raw { stroke-width: 1; opacity: .38; }
.line.again { stroke-dasharray: 6 3; }
.dot { fill: var(--c); } .area { fill: var(--c); opacity: .78; } .bar { fill: var(--c); }
.bar:hover { opacity: .7; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 1px 14px; margin: 4px 0 0 4px; padding: 0;
  font-size: 12.5px; color: var(--soft); }
.key { display: inline-block; width: 14px; height: 0; border-top: 3px solid var(--c); margin: 0 5px 3px 0; }
.key.again { border-top-style: dashed; }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--line); z-index: 2;
  border-radius: 6px; padding: 4px 8px; font-size: 12.5px; white-space: nowrap; box-shadow: 0 2px 10px rgb(0 0 0 / .22);
  font-variant-numeric: tabular-nums; }
button { font: inherit; font-size: 12.5px; color: var(--soft); background: none; border: 1px solid var(--line);
  border-radius: 5px; padding: 1px 8px; cursor: pointer; white-space: nowrap; flex: none; }
button:hover, button[aria-pressed=true] { color: var(--accent); border-color: var(--accent); }
.scroll { overflow-x: auto; }
.box { padding: 4px 12px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tr:last-child td { border-bottom: none; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.wide { overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th button { border: none; padding: 0; font-size: 13.5px; font-weight: 600; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.best { font-weight: 700; color: var(--good); }
.failed, .bad { color: var(--bad); }
.note { border-left: 4px solid var(--accent); }
.note.warn { border-left-color: var(--bad); }
.settings { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
  align-items: start; }
.settings table { width: 100%; } .settings td:first-child { color: var(--soft); width: 56%; font-size: 13px; }
details.box { padding: 0 12px; } #events { margin-top: 12px; } summary { cursor: pointer; padding: 7px 0; font-weight: 600; }
details[open] { padding-bottom: 8px; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; margin: 6px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
.pictures { display: grid; gap: 12px; }
.pictures figure { padding: 10px 12px; } .pictures img { display: block; max-width: 100%; margin-top: 6px;
  image-rendering: pixelated; }
footer { padding: 26px 20px 34px; color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { main, header, footer { padding-left: 12px; padding-right: 12px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; } .card { padding: 8px 10px; } .card .number { font-size: 21px; } }
@media print { nav, button { display: none; } }
"""

SCRIPT = """
"use strict";
const SVG = "http" + "://www.w3.org/2000/svg";
const exact = v => Math.abs(v) >= 1e-3 && Math.abs(v) < 1e7 || v === 0
  ? v.toLocaleString("en", {maximumSignificantDigits: 5}) : v.toExponential(2);

function hover(figure) {
  const data = JSON.parse(figure.dataset.chart), [left, top, width, height] = data.box;
  const tip = figure.querySelector(".tip"), span = data.x[1] - data.x[0] || 1;
  const perEpoch = +document.body.dataset.perEpoch;
  let at = null;
  const clear = () => { at = null; tip.hidden = true;
    for (const svg of figure.querySelectorAll("svg")) {
      svg.querySelector(".cross").setAttribute("hidden", ""); svg.querySelector(".marks").replaceChildren(); } };
  function show(svg, wanted) {
    let x = null;
    for (const s of data.series) for (const p of s.at)
      if (x === null || Math.abs(p[0] - wanted) < Math.abs(x - wanted)) x = p[0];
    at = x;
    const [low, high] = data.axes[svg.dataset.scale], log = svg.dataset.scale === "log";
    const px = left + (x - data.x[0]) / span * width, marks = svg.querySelector(".marks");
    const cross = svg.querySelector(".cross");
    marks.replaceChildren(); tip.replaceChildren();
    for (const [k, v] of Object.entries({x1: px, x2: px, y1: top, y2: top + height})) cross.setAttribute(k, v);
    cross.removeAttribute("hidden");
    const head = document.createElement("div");
    head.textContent = data.xLabel + " " + exact(x) +
      (data.xLabel === "step" && perEpoch ? " (epoch " + (x / perEpoch).toFixed(2) + ")" : "");
    tip.append(head);
    let sum = 0;
    for (const s of data.series) {
      const near = s.at.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      if (Math.abs(near[0] - x) > span / 50) continue;
      sum += near[1];
      const value = data.stacked ? sum : near[1], dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("class", "dot " + s.colour); dot.setAttribute("r", 3.6); dot.setAttribute("cx", px);
      dot.setAttribute("cy", top + (1 - ((log ? Math.log10(value) : value) - low) / (high - low)) * height);
      marks.append(dot);
      const row = document.createElement("div"), key = document.createElement("i");
      key.className = "key " + s.colour; row.append(key, s.name + ": " + exact(near[1])); tip.append(row);
    }
    tip.hidden = false;
    const scale = svg.clientWidth / svg.viewBox.baseVal.width, room = figure.querySelector(".plot").clientWidth;
    const right = px * scale + 12 + tip.offsetWidth > room;
    tip.style.left = Math.max(0, right ? px * scale - 12 - tip.offsetWidth : px * scale + 12) + "px";
    tip.style.top = top * scale + "px";
  }
  for (const svg of figure.querySelectorAll("svg")) {
    svg.tabIndex = 0;
    const point = event => {
      const box = svg.getBoundingClientRect();
      const px = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      show(svg, data.x[0] + (px - left) / width * span);
    };
    svg.addEventListener("pointermove", point); svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", clear); svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", event => {
      const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!way) { if (event.key === "Escape") clear(); return; }
      const xs = [...new Set(data.series.flatMap(s => s.at.map(p => p[0])))].sort((a, b) => a - b);
      const next = at === null ? (way > 0 ? 0 : xs.length - 1) : xs.indexOf(at) + way;
      show(svg, xs[Math.min(xs.length - 1, Math.max(0, next))]); event.preventDefault();
    });
  }
  const button = figure.querySelector("button.scale");
  if (button) button.addEventListener("click", () => {
    const log = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", log); clear();
    for (const svg of figure.querySelectorAll("svg")) svg.toggleAttribute("hidden", (svg.dataset.scale === "log") !== log);
  });
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    for (const h of heads) h.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const x = value(a), y = value(b), missing = (x === "") - (y === "");
      if (missing) return missing;
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}

document.querySelectorAll("figure[data-chart]").forEach(hover);
document.querySelectorAll("table.sort").forEach(sortable);
document.querySelectorAll("button.copy").forEach(button => button.addEventListener("click", () => {
  const range = document.createRange(); range.selectNodeContents(button.parentElement.querySelector("pre"));
  const chosen = getSelection(); chosen.removeAllRanges(); chosen.addRange(range);
  if (document.execCommand("copy")) { button.textContent = "copied"; setTimeout(() => button.textContent = "copy", 1500); }
}));
"""
