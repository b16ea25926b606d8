"use strict";

// Sort a table by the column whose heading is clicked; empty cells are last either way.
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.querySelectorAll("th")];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    const numeric = heading.classList.contains("number");
    const value = (row) => {
      const cell = row.cells[column];
      const text = cell.dataset.sort ?? cell.textContent;
      return text === "" ? null : numeric ? Number(text) : text;
    };
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const compare = (a, b) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
        return ascending ? order : -order;
      };
      body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
    });
  });
}

function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const METRICS = { train: "training error", test: "test error" };
const MARGIN = { top: 22, right: 40, bottom: 40, left: 44 };

function drawErrors(place, runs) {
  const lines = runs.flatMap((run) =>
    Object.keys(METRICS).map((metric) => ({ run, metric, errors: run[metric] })));
  const kinds = [...new Set(runs.map((run) => run.kind))];
  const depths = [...new Set(runs.map((run) => run.depth))].sort((a, b) => a - b);
  const lastEpoch = lines.reduce((most, line) => line.run.epoch.reduce((a, b) => Math.max(a, b), most), 0);
  const off = new Set(); // keys of all that is switched off
  const panels = new Map(kinds.map((kind) => [kind, makePanel(kind)]));
  const tip = html("div", { id: "tip", hidden: "" });
  const spoken = html("p", { class: "unseen", "aria-live": "polite" });
  const note = html("p", { class: "note" });
  const grid = html("div", { class: "panels" }, ...[...panels.values()].map((panel) => panel.box));
  off.add("log");
  place.replaceChildren(makeLegend(), grid, note, tip, spoken);
  let width = 0;
  new ResizeObserver(() => {
    if (grid.clientWidth !== width) draw();
  }).observe(grid);
  draw();

  function colour(line) {
    return `var(--line-${line.run.colour})`;
  }

  function isShown(line) {
    return ![`kind ${line.run.kind}`, `depth ${line.run.depth}`, line.metric].some((key) => off.has(key));
  }

  // The entries of the legend are toggle buttons.
  function makeLegend() {
    const sample = (metric, stroke) => {
      const path = svg("path", { d: "M1,5H21", class: `line ${metric}` });
      path.style.stroke = stroke;
      return svg("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, path);
    };
    const button = (key, ...content) => {
      const element = html("button", { type: "button", "aria-pressed": !off.has(key), "data-key": key }, ...content);
      element.addEventListener("click", () => {
        if (!off.delete(key)) off.add(key);
        element.setAttribute("aria-pressed", !off.has(key));
        draw();
      });
      return element;
    };
    const group = (name, ...buttons) =>
      html("div", { role: "group", "aria-label": name }, html("span", {}, name), ...buttons);
    return html("div", { class: "legend" },
      group("depth", ...depths.map((depth) => {
        const line = lines.find((other) => other.run.depth === depth);
        return button(`depth ${depth}`, sample("train", colour(line)), String(depth));
      })),
      group("line", ...Object.entries(METRICS).map(([metric, name]) =>
        button(metric, sample(metric, "currentColor"), name))),
      group("kind", ...kinds.map((kind) => button(`kind ${kind}`, kind))),
      group("scale", button("log", "logarithmic")));
  }

  function makePanel(kind) {
    const picture = svg("svg", {
      tabindex: 0, role: "group",
      "aria-label": `${kind}: error against epoch. Left and right move along a line, up and down to another line.`,
    });
    const panel = { kind, picture, box: html("div", { class: "panel" }, html("h3", {}, kind), picture), lines: [] };
    const point = (event) => {
      const box = picture.getBoundingClientRect();
      const scale = panel.width / box.width;
      read(panel, nearest(panel, (event.clientX - box.left) * scale, (event.clientY - box.top) * scale));
    };
    picture.addEventListener("pointermove", point);
    picture.addEventListener("pointerdown", point);
    picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read(panel, null));
    picture.addEventListener("focus", () => picture.matches(":focus-visible") && step(panel, "End"));
    picture.addEventListener("blur", () => read(panel, null));
    picture.addEventListener("keydown", (event) => step(panel, event.key) && event.preventDefault());
    return panel;
  }

  // One scale of errors for all panels, fitted to the lines shown.
  function makeScale(shown, height) {
    const errors = shown.flatMap((line) => line.errors).filter((error) => error !== null);
    const most = errors.reduce((a, b) => Math.max(a, b), 0) || 1;
    const bottom = height - MARGIN.bottom, room = bottom - MARGIN.top;
    if (off.has("log")) {
      const steps = ticks(Math.min(100, 1.05 * most), 5);
      const top = Math.max(Math.min(100, 1.05 * most), steps.at(-1));
      return { ticks: steps, y: (error) => bottom - room * error / top, zero: null };
    }
    const least = errors.reduce((a, b) => (b > 0 ? Math.min(a, b) : a), most);
    const zero = errors.includes(0) ? least / 2 : null;
    const low = Math.log(zero ?? least / 1.1), high = Math.log(1.1 * most);
    let steps = [];
    for (let power = Math.floor(low / Math.LN10); power <= high / Math.LN10; power++) {
      steps.push(...[1, 2, 5].map((digit) => Number(`${digit}e${power}`)));
    }
    steps = steps.filter((tick) => Math.log(tick) > low + 0.06 * (high - low) * (zero !== null) && Math.log(tick) <= high);
    if (steps.length > 9) steps = steps.filter((tick) => Number.isInteger(Math.round(1e6 * Math.log10(tick)) / 1e6));
    return {
      ticks: steps, zero,
      y: (error) => bottom - room * (Math.log(Math.max(error, zero ?? 0)) - low) / (high - low),
    };
  }

  function draw() {
    width = grid.clientWidth;
    const shown = lines.filter(isShown);
    for (const panel of panels.values()) {
      panel.lines = shown.filter((line) => line.run.kind === panel.kind);
      panel.box.hidden = panel.lines.length === 0;
    }
    read(null, null);
    note.textContent = shown.length ? "" : "Nothing is switched on: choose a depth, a line and a kind above.";
    for (const panel of panels.values()) {
      if (panel.lines.length) drawPanel(panel, shown);
    }
  }

  function drawPanel(panel, shown) {
    const width = panel.width = panel.box.clientWidth;
    const height = Math.round(Math.min(380, Math.max(250, 0.62 * width)));
    const scale = makeScale(shown, height);
    const bottom = height - MARGIN.bottom, right = width - MARGIN.right;
    panel.x = (epoch) => MARGIN.left + (right - MARGIN.left) * epoch / lastEpoch;
    panel.y = scale.y;
    const parts = [];
    const yTick = (error, label) => parts.push(
      svg("path", { d: `M${MARGIN.left},${scale.y(error)}H${right}`, class: "grid" }),
      svg("text", { x: MARGIN.left - 8, y: scale.y(error) + 4, "text-anchor": "end" }, label));
    for (const error of scale.ticks) yTick(error, String(error));
    if (scale.zero !== null) yTick(0, "0");
    for (const epoch of ticks(lastEpoch, width / 90).filter(Number.isInteger)) parts.push(
      svg("path", { d: `M${panel.x(epoch)},${bottom}v5`, class: "axis" }),
      svg("text", { x: panel.x(epoch), y: bottom + 19, "text-anchor": "middle" }, String(epoch)));
    parts.push(
      svg("path", { d: `M${MARGIN.left},${bottom}H${right}`, class: "axis" }),
      svg("text", { x: (MARGIN.left + right) / 2, y: height - 4, "text-anchor": "middle" }, "epoch"),
      svg("text", { x: 0, y: 11 }, yLabel(scale)));
    for (const line of panel.lines) {
      const points = line.errors.map((error, i) => error === null ? null : [panel.x(line.run.epoch[i]), scale.y(error)]);
      let path = "";
      points.forEach((point, i) => {
        if (point) path += `${i && points[i - 1] ? "L" : "M"}${point[0].toFixed(1)},${point[1].toFixed(1)}`;
      });
      line.element = svg("path", { d: path, class: `line ${line.metric}` });
      line.element.style.stroke = colour(line);
      parts.push(line.element);
      if (points.length === 1 && points[0]) { // a path of one point cannot be seen
        const dot = svg("circle", { cx: points[0][0], cy: points[0][1], r: line.metric === "train" ? 3 : 1.5 });
        dot.style.fill = colour(line);
        parts.push(dot);
      }
    }
    panel.marker = svg("circle", { r: 5, class: "marker", visibility: "hidden" });
    panel.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    panel.picture.replaceChildren(...parts, ...labelEnds(panel), panel.marker);
  }

  function yLabel(scale) {
    if (off.has("log")) return "error (%)";
    const zero = scale.zero === null ? "" : `; 0 is drawn at ${Number(scale.zero.toPrecision(2))}`;
    return `error (%), logarithmic${zero}`;
  }

  // Label the end of each depth's lines, moved up where two labels would overlap.
  function labelEnds(panel) {
    const metric = off.has("train") ? "test" : "train";
    const ends = depths.map((depth) => {
      let found = panel.lines.filter((line) => line.run.depth === depth && line.metric === metric && line.errors.at(-1) !== null);
      // Only the seeds that got furthest count.
      const last = Math.max(...found.map((line) => line.run.epoch.at(-1)));
      found = found.filter((line) => line.run.epoch.at(-1) === last);
      const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
      return {
        depth, found,
        x: panel.x(last),
        y: mean(found.map((line) => panel.y(line.errors.at(-1)))),
      };
    }).filter((end) => end.found.length);
    let lowest = Infinity;
    return ends.sort((a, b) => b.y - a.y).map((end) => {
      lowest = Math.min(end.y, lowest - 13);
      return svg("text", { x: end.x + 7, y: lowest + 4, class: "depth" }, String(end.depth));
    });
  }

  // Reading points: a pointer or finger reads the nearest one, the keyboard steps along the lines.
  function nearest(panel, x, y) {
    let best = null, least = Infinity;
    for (const line of panel.lines) {
      line.errors.forEach((error, index) => {
        if (error === null) return;
        const distance = Math.hypot(panel.x(line.run.epoch[index]) - x, panel.y(error) - y);
        if (distance < least) [best, least] = [{ line, index }, distance];
      });
    }
    return best;
  }

  function step(panel, key) {
    const along = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[key];
    const across = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (key === "Escape") read(panel, null);
    if (along === undefined && across === undefined) return false;
    let { line, index } = panel.reading ?? { line: panel.lines[0], index: 0 };
    if (across) {
      const count = panel.lines.length;
      line = panel.lines[(panel.lines.indexOf(line) + across + count) % count];
    }
    index = Math.max(0, Math.min(line.errors.length - 1, index + (along ?? 0)));
    spoken.textContent = read(panel, { line, index });
    return true;
  }

  function read(panel, point) {
    for (const other of panels.values()) {
      other.reading = null;
      other.picture.classList.remove("reading");
      other.marker?.setAttribute("visibility", "hidden");
      for (const line of other.lines) line.element?.classList.remove("read");
    }
    tip.hidden = point === null;
    if (point === null) return "";
    const { line, index } = point;
    const { run } = line;
    panel.reading = point;
    panel.picture.classList.add("reading");
    line.element.classList.add("read");
    const x = panel.x(run.epoch[index]), y = line.errors[index] === null ? null : panel.y(line.errors[index]);
    if (y !== null) {
      fill(panel.marker, { cx: x, cy: y, visibility: "visible" }, []);
      panel.marker.style.fill = colour(line);
    }
    const percent = (error) => (error === null ? "none" : `${error.toFixed(2)} %`);
    const epoch = `epoch ${Number(run.epoch[index].toFixed(2))}`;
    const name = `${run.kind}, depth ${run.depth}, seed ${run.seed}`;
    const rows = Object.entries(METRICS).map(([metric, label]) =>
      html("div", metric === line.metric ? { class: "read" } : {}, html("span", {}, label), html("span", {}, percent(run[metric][index]))));
    tip.replaceChildren(html("div", {}, name), html("div", {}, epoch), ...rows);
    // Place the tip next to the point, to the left if the right has no room, within the figure.
    const box = panel.picture.getBoundingClientRect(), frame = place.getBoundingClientRect();
    const scale = box.width / panel.width;
    const left = box.left - frame.left + x * scale, top = box.top - frame.top + (y ?? MARGIN.top) * scale;
    const wanted = left + tip.offsetWidth + 14 < frame.width ? left + 14 : left - tip.offsetWidth - 14;
    tip.style.left = `${Math.max(0, Math.min(wanted, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, top - tip.offsetHeight - 10)}px`;
    return `${name}, ${epoch}, ${METRICS[line.metric]} ${percent(line.errors[index])}`;
  }
}

// About `count` round numbers from 0 to `most`.
function ticks(most, count) {
  const rough = most / Math.max(2, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((digit) => digit * power >= rough) * power;
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(12)));
}

const figure = document.getElementById("figure");
if (figure) drawErrors(figure, JSON.parse(document.getElementById("data").textContent));
