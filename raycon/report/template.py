"""Style sheet and script of the report page, kept as text so that the page needs no other file."""

STYLE = """
:root { color-scheme: light dark;
  --back: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #5b6675; --line: #dfe3e9; --grid: #e9ecf1;
  --accent: #2456b8; --bad: #b3261e; --good: #17723a; --code: #f1f3f6;
  --c0: #2563c9; --c1: #c2410c; --c2: #15803d; --c3: #7e3fb5; --c4: #b0195e; --c5: #0e7490; --c6: #a16207; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root {
  --back: #12151a; --card: #1b2027; --text: #e6eaf0; --soft: #9aa6b5; --line: #313945; --grid: #29303a;
  --accent: #84b0ff; --bad: #ff9a90; --good: #6cd697; --code: #14181e;
  --c0: #6ea8ff; --c1: #ff9a5c; --c2: #5fd38a; --c3: #c79bff; --c4: #ff86b8; --c5: #55cfe6; --c6: #e6c04b; --c7: #a7b0bd; } }
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
.c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 1px 14px; margin: 4px 0 0 4px; padding: 0;
  font-size: 12.5px; color: var(--soft); }
.pieces { display: flex; height: 26px; gap: 1px; margin: 12px 4px 10px; border-radius: 5px; overflow: hidden; }
.pieces i { background: var(--c); min-width: 1px; } .pieces i:hover { opacity: .7; }
.shares { list-style: none; margin: 0 4px; padding: 0; font-size: 13px; font-variant-numeric: tabular-nums; }
.shares li { display: grid; grid-template-columns: auto 1fr 5.5em 3.2em; border-top: 1px solid var(--grid); padding: 2px 0;
  align-items: baseline; } .shares b { text-align: right; font-weight: 500; } .shares .key { margin-right: 8px; }
.key { display: inline-block; width: 14px; height: 0; border-top: 3px solid var(--c); margin: 0 5px 3px 0; }
.key.again { border-top-style: dashed; }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--line); z-index: 2;
  border-radius: 6px; padding: 4px 8px; font-size: 12.5px; white-space: nowrap; box-shadow: 0 2px 10px rgb(0 0 0 / .22);
  font-variant-numeric: tabular-nums; }
button { font: inherit; font-size: 12.5px; color: var(--soft); background: none; border: 1px solid var(--line);
  border-radius: 5px; padding: 1px 8px; cursor: pointer; white-space: nowrap; flex: none; }
button:hover, button[aria-pressed=true] { color: var(--accent); border-color: var(--accent); }
.scroll { overflow-x: auto; } .box + .charts, .box + details.box { margin-top: 12px; }
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
.settings { columns: 340px; column-gap: 12px; } .settings > * { break-inside: avoid; margin-bottom: 12px; }
.settings table { width: 100%; } .settings td:first-child { color: var(--soft); width: 56%; font-size: 13px; }
details.box { padding: 0 12px; } #events { margin-top: 12px; } summary { cursor: pointer; padding: 7px 0; font-weight: 600; }
details[open] { padding-bottom: 8px; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; margin: 6px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
.maps { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.paper { padding: 8px 12px 12px; } .paper img { display: block; width: 100%; border-radius: 4px; }
.pictures { display: grid; gap: 12px; }
.pictures figure { padding: 10px 12px; } .pictures img { display: block; max-width: 100%; margin-top: 6px;
  image-rendering: pixelated; }
section > details > summary { list-style: none; padding: 0; margin: 34px 0 10px; }
section > details > summary::-webkit-details-marker { display: none; }
section > details > summary h2 { margin: 0; display: inline; }
section > details > summary h2::before { content: "▾"; display: inline-block; width: 1em; color: var(--soft); }
section > details:not([open]) > summary h2::before { content: "▸"; }
section > details:not([open]) > summary { border-bottom: 1px solid var(--line); margin-bottom: 0; }
.tile { --s: 44px; display: inline-block; width: var(--s); height: var(--s); flex: none; border-radius: 3px;
  background-size: calc(var(--w) * var(--s)) calc(var(--h) * var(--s)); background-repeat: no-repeat;
  background-position: calc(var(--x) * -1 * var(--s)) calc(var(--y) * -1 * var(--s)); }
.small-pictures .tile { image-rendering: pixelated; }
.tile.right { outline: 3px solid var(--good); outline-offset: -1px; }
.tile.wrong { outline: 3px solid var(--bad); outline-offset: -1px; }
.strip { margin: 0 0 9px; } .strip .what { font-size: 12.5px; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 5px; align-items: flex-start; }
.arrow { color: var(--soft); line-height: 44px; }
.strips { display: grid; gap: 2px 26px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 590px), 1fr)); }
.groups { display: grid; gap: 0 26px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.groups .tile { --s: 30px; } .groups .tiles { gap: 2px; }
.folds { display: grid; gap: 10px; }
.weighed { display: inline-grid; gap: 5px; } .weighed .bar { height: 6px; background: linear-gradient(90deg,
  var(--c0) calc(var(--p) * 100%), var(--grid) 0); border-radius: 2px; }
.switches { display: flex; flex-wrap: wrap; gap: 6px 26px; padding: 6px 0; }
.switch { display: inline-flex; flex-wrap: wrap; gap: 6px; align-items: baseline; font-size: 13px; }
.mapplot { position: relative; height: clamp(300px, 62vw, 640px); } .mapplot canvas { width: 100%; height: 100%;
  display: block; touch-action: pan-y; }
.pick li { cursor: pointer; } .pick li[aria-pressed=true] { color: var(--accent); text-decoration: underline; }
.pick i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 5px; }
.pop { position: fixed; z-index: 9; pointer-events: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 7px; font-size: 12.5px; max-width: 240px; box-shadow: 0 3px 14px rgb(0 0 0 / .3); }
.pop .tile { --s: 112px; display: block; margin-bottom: 4px; }
.confusion { margin: 4px 0 8px; } .confusion td, .confusion th { padding: 3px 6px; text-align: right; border: none; }
.confusion thead th { vertical-align: bottom; text-align: center; padding-bottom: 6px; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion td { min-width: 34px; } .confusion tbody td { border: 1px solid var(--card); }
.hit { background: color-mix(in srgb, var(--good) calc(var(--p) * 55%), transparent); }
.miss { background: color-mix(in srgb, var(--bad) calc(var(--p) * 90%), transparent); }
.differs td { vertical-align: top; } .compare td, .compare th { padding-right: 22px; }
footer { padding: 26px 20px 34px; color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { main, header, footer { padding-left: 12px; padding-right: 12px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; } .card { padding: 8px 10px; } .card .number { font-size: 21px; } }
@media (max-width: 640px) { .tile { --s: 26px; } .tiles { gap: 4px; } .arrow { line-height: 26px; margin: 0 -3px; }
  .pop .tile { --s: 96px; } .groups .tile { --s: 25px; } .groups .tiles { gap: 2px; } }
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

const pop = document.createElement("div");
pop.className = "pop"; pop.hidden = true; document.body.append(pop);
function popUp(x, y, tile, words) {
  const text = document.createElement("div"); text.textContent = words;
  pop.replaceChildren(tile, text); pop.hidden = false;
  const w = pop.offsetWidth, h = pop.offsetHeight;
  pop.style.left = Math.max(4, x + 16 + w > innerWidth ? x - 16 - w : x + 16) + "px";
  pop.style.top = Math.max(4, Math.min(innerHeight - h - 4, y + 12)) + "px";
}
function enlarge(event) {
  const tile = event.target.closest(".tile");
  if (!tile) { if (!event.target.closest("canvas")) pop.hidden = true; return; }
  const large = tile.cloneNode(); large.className = "tile"; large.removeAttribute("role");
  popUp(event.clientX, event.clientY, large, tile.getAttribute("aria-label"));
}
addEventListener("pointermove", enlarge); addEventListener("pointerdown", enlarge);
addEventListener("scroll", () => { pop.hidden = true; }, {passive: true});

function map(box) {
  const data = JSON.parse(box.dataset.map), canvas = box.querySelector("canvas"), pen = canvas.getContext("2d");
  const dark = matchMedia("(prefers-color-scheme: dark)"), legend = box.querySelector(".pick");
  let layout = Object.keys(data.at)[0], by = Object.keys(data.by)[0], only = null, near = -1, place = [];
  const first = dark.matches
    ? ["#6ea8ff", "#ff9a5c", "#5fd38a", "#ff86b8", "#c79bff", "#e6d04b", "#55cfe6", "#c98f6a", "#ff6b6b", "#b6bcc6"]
    : ["#2563c9", "#e0701a", "#15803d", "#d6246e", "#7e3fb5", "#b59a00", "#0e93ab", "#8a5a3b", "#c62323", "#5b6675"];
  const hue = i => i < first.length && data.names[by] ? first[i] : "hsl(" + (i * 137.508 + 215) % 360 + " " + (62 + i % 3 * 12) + "% " +
    ((dark.matches ? 64 : 44) + (i >> 2) % 3 * 7) + "%)";
  const value = i => by === undefined ? 0 : data.by[by][i];
  const name = v => v < 0 ? "none" : (data.names[by] || [])[v] ?? "#" + v;
  function draw() {
    const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
    if (!w || !h) return;
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
      canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0); pen.clearRect(0, 0, w, h);
    const at = data.at[layout], size = Math.max(2, Math.min(5, 130 / Math.sqrt(data.tile.length)));
    // The map fills the plot: each axis over its own range, with the same unit unless the plot is much wider than high.
    let xs = [1e9, -1e9], ys = [1e9, -1e9];
    for (let i = 0; i < data.tile.length; i++) { xs = [Math.min(xs[0], at[2 * i]), Math.max(xs[1], at[2 * i])];
      ys = [Math.min(ys[0], at[2 * i + 1]), Math.max(ys[1], at[2 * i + 1])]; }
    const pad = 10, unit = Math.min((w - 2 * pad) / (xs[1] - xs[0] || 1), (h - 2 * pad) / (ys[1] - ys[0] || 1));
    place = [];
    for (let i = 0; i < data.tile.length; i++) place.push([
      w / 2 + (at[2 * i] - (xs[0] + xs[1]) / 2) * unit, h / 2 - (at[2 * i + 1] - (ys[0] + ys[1]) / 2) * unit]);
    for (const front of [false, true]) for (let i = 0; i < data.tile.length; i++) {
      const v = value(i), shown = only === null || v === only;
      if (shown !== front) continue;
      pen.globalAlpha = shown ? .82 : .1; pen.fillStyle = v < 0 ? "#888" : hue(v);
      pen.beginPath(); pen.arc(place[i][0], place[i][1], size, 0, 7); pen.fill();
    }
    if (near >= 0) { pen.globalAlpha = 1; pen.lineWidth = 2; pen.strokeStyle = dark.matches ? "#fff" : "#000";
      pen.beginPath(); pen.arc(place[near][0], place[near][1], size + 2.5, 0, 7); pen.stroke(); }
  }
  function list() {
    const all = [...new Set(data.by[by] || [])].sort((a, b) => a - b);
    legend.replaceChildren();
    if (all.length > 60) { const li = document.createElement("li");
      li.textContent = all.length + " values, too many to list; colours repeat"; li.style.cursor = "default"; legend.append(li); return; }
    for (const v of all) {
      const li = document.createElement("li"), key = document.createElement("i");
      key.style.background = v < 0 ? "#888" : hue(v); li.append(key, name(v)); li.tabIndex = 0;
      li.setAttribute("role", "button"); li.setAttribute("aria-pressed", only === v);
      const choose = () => { only = only === v ? null : v; list(); draw(); };
      li.addEventListener("click", choose);
      li.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(); } });
      legend.append(li);
    }
  }
  function show(i, x, y) {
    near = i; draw();
    const tile = document.createElement("i"); tile.className = "tile";
    tile.style.setProperty("--x", data.tile[i] % data.across);
    tile.style.setProperty("--y", Math.floor(data.tile[i] / data.across));
    const more = by === undefined || by in data.names ? "" : ", " + by + ": " + name(value(i));
    popUp(x, y, tile, data.words[i] + more);
  }
  function point(event) {
    const frame = canvas.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
    let best = -1, least = 400;
    for (let i = 0; i < place.length; i++) {
      if (only !== null && value(i) !== only) continue;
      const d = (place[i][0] - x) ** 2 + (place[i][1] - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    if (best < 0) { if (near >= 0) { near = -1; draw(); } pop.hidden = true; } else show(best, event.clientX, event.clientY);
  }
  canvas.addEventListener("pointermove", point); canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => { near = -1; pop.hidden = true; draw(); });
  canvas.addEventListener("keydown", event => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) { if (event.key === "Escape") { near = -1; pop.hidden = true; draw(); } return; }
    event.preventDefault();
    const next = (near + way + place.length) % place.length, frame = canvas.getBoundingClientRect();
    show(next, frame.left + place[next][0], frame.top + place[next][1]);
  });
  for (const button of box.querySelectorAll(".switch button")) button.addEventListener("click", () => {
    for (const b of button.parentElement.querySelectorAll("button")) b.setAttribute("aria-pressed", b === button);
    if (button.dataset.layout) layout = button.dataset.layout; else { by = button.dataset.by; only = null; list(); }
    draw();
  });
  new ResizeObserver(draw).observe(canvas); dark.addEventListener("change", () => { list(); draw(); });
  list(); draw();
}

function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target) { const fold = target.querySelector("details"); if (fold) fold.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", unfold); unfold();
document.querySelectorAll("[data-map]").forEach(map);
document.querySelectorAll("figure[data-chart]").forEach(hover);
document.querySelectorAll("table.sort").forEach(sortable);
document.querySelectorAll("button.copy").forEach(button => button.addEventListener("click", () => {
  const range = document.createRange(); range.selectNodeContents(button.parentElement.querySelector("pre"));
  const chosen = getSelection(); chosen.removeAllRanges(); chosen.addRange(range);
  if (document.execCommand("copy")) { button.textContent = "copied"; setTimeout(() => button.textContent = "copy", 1500); }
}));
"""
