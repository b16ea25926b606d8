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

// Read the curves: a pointer or finger reads the nearest point, the keyboard steps along curves.
const METRICS = { train: "training error", test: "test error" };
const figure = document.getElementById("figure");
const tip = document.getElementById("tip");
let active = null; // the panel being read
if (figure) {
  const runs = JSON.parse(document.getElementById("data").textContent);
  for (const svg of figure.querySelectorAll(".panel svg")) makeReadable(svg, findCurves(svg, runs));
}

// A curve has a point [x, y] of its panel for every error, or null where the error is invalid.
function findCurves(svg, runs) {
  return runs.flatMap((run, i) => Object.keys(METRICS).map((metric) => {
    const element = svg.querySelector(`.${metric}.run-${i}`);
    const vertices = element?.querySelector("path").getAttribute("d")?.match(/[\d.]+ [\d.]+/g) ?? [];
    const points = run[metric].map((e) => (e === null ? null : vertices.shift()?.split(" ").map(Number)));
    return { run, metric, element, points };
  })).filter((curve) => curve.element);
}

function makeReadable(svg, curves) {
  const shown = () => curves.filter((curve) => getComputedStyle(curve.element).display !== "none");
  let place = null; // { curve, index } being read
  const read = (next) => {
    if (!next && active !== svg) return null; // the focus has moved to another panel
    place = next;
    active?.classList.remove("reading");
    active = next && svg;
    active?.classList.add("reading");
    for (const { element } of curves) element.classList.toggle("read", element === place?.curve.element);
    tip.hidden = place === null;
    return place && showPoint(svg, place);
  };
  const point = (event) => {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    read(findNearest(shown(), x, y));
  };
  const key = (name) => {
    if (name === "Escape") read(null);
    const next = step(shown(), place, name);
    if (next) document.getElementById("spoken").textContent = read(next);
    return next;
  };
  svg.setAttribute("tabindex", 0);
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label",
    `${curves[0].run.kind}: error against epoch. Left and right move along a line, up and down to another line.`);
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read(null));
  svg.addEventListener("focus", () => svg.matches(":focus-visible") && key("End"));
  svg.addEventListener("blur", () => read(null));
  svg.addEventListener("keydown", (event) => key(event.key) && event.preventDefault());
  figure.addEventListener("change", () => read(null));
}

function findNearest(curves, x, y) {
  let nearest = null, least = Infinity;
  for (const curve of curves) {
    curve.points.forEach((point, index) => {
      const distance = point ? Math.hypot(point[0] - x, point[1] - y) : Infinity;
      if (distance < least) [nearest, least] = [{ curve, index }, distance];
    });
  }
  return nearest;
}

// Return the place that a key leads to, or null for other keys.
function step(curves, place, key) {
  const along = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[key] ?? 0;
  const across = { ArrowUp: -1, ArrowDown: 1 }[key] ?? 0;
  if ((!along && !across) || !curves.length) return null;
  const current = place ? curves.indexOf(place.curve) : 0;
  const curve = curves[(current + across + curves.length) % curves.length];
  const index = Math.max(0, Math.min(curve.points.length - 1, (place?.index ?? 0) + along));
  return { curve, index };
}

// Show the tip next to a point, to the left if the right has no room, and return the point's text.
function showPoint(svg, { curve: { run, metric, element, points }, index }) {
  const percent = (error) => (error === null ? "none" : `${error.toFixed(2)} %`);
  const describe = (key) => `${METRICS[key]} ${percent(run[key][index])}`;
  const lines = [`${run.kind}, depth ${run.depth}, seed ${run.seed}`, `epoch ${Number(run.epoch[index].toFixed(2))}`];
  tip.textContent = [...lines, ...Object.keys(METRICS).map(describe)].join("\n");

  const [x, y] = points[index] ?? [0, 0];
  const marker = svg.querySelector(".marker");
  marker.classList.toggle("invalid", !points[index]);
  marker.setAttribute("cx", x);
  marker.setAttribute("cy", y);
  marker.setAttribute("fill", element.querySelector("path").getAttribute("stroke"));
  const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  const frame = figure.getBoundingClientRect();
  const left = at.x - frame.left, room = frame.width - tip.offsetWidth;
  tip.style.left = `${Math.max(0, left + 14 < room ? left + 14 : left - tip.offsetWidth - 14)}px`;
  tip.style.top = `${Math.max(0, at.y - frame.top - tip.offsetHeight - 10)}px`;
  return [...lines, describe(metric)].join(", ");
}
