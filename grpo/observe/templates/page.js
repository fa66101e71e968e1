"use strict";
const { steps: allSteps, charts } = JSON.parse(document.getElementById("numbers").textContent);
const SMOOTHED = 0.03, LEAST_SMOOTHED = 5, RIGHT = 12, BOTTOM = 22, DIGIT = 7;

function add(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// About `count` round numbers, 1, 2 or 5 times a power of ten apart.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((candidate) => candidate >= rough * 0.8);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high && found.length < 20; i++) found.push(i * step);
  return found;
}

// With so many decimals, or with four digits where a size would make that long or nothing.
function written(value, decimals = NaN) {
  const size = Math.abs(value), plain = Number(value.toPrecision(4));
  if (size !== 0 && (size >= 1e9 || size < 1e-4)) return plain.toExponential();
  for (const [unit, letter] of [[1e6, "M"], [1e3, "k"]])
    if (size >= 10 * unit) return `${Number((value / unit).toPrecision(6))}${letter}`;
  return decimals >= 0 && decimals <= 6 ? value.toFixed(decimals) : String(plain);
}

// Mean of each value and those before it in a window, which is of one value where there are few.
function runningMean(values) {
  const least = Math.min(LEAST_SMOOTHED, Math.ceil(values.length / 6));
  const size = Math.max(least, Math.round(values.length * SMOOTHED));
  return values.map((_, i) => {
    const window = values.slice(Math.max(0, i - size + 1), i + 1);
    return window.reduce((sum, value) => sum + value, 0) / window.length;
  });
}

function range(values, margin) {
  const low = Math.min(...values), high = Math.max(...values);
  return low === high ? [low - 1, high + 1] : [low - margin * (high - low), high + margin * (high - low)];
}

function draw(host) {
  const chart = charts[host.dataset.chart], width = host.clientWidth, height = host.clientHeight;
  if (width < 60 || host.dataset.width === String(width)) return;
  host.dataset.width = width;
  const lines = chart.lines.map((line) => ({ ...line, steps: allSteps[line.steps] }));
  const [x0, x1] = range(lines.flatMap((line) => line.steps), 0);
  const [y0, y1] = range(lines.flatMap((line) => line.values), 0.05);
  const heights = ticks(y0, y1, 4), decimals = Math.ceil(-Math.log10(heights[1] - heights[0]));
  const marks = heights.map((value) => [value, written(value, decimals)]);
  const top = chart.unit ? 24 : 8;
  const left = 10 + DIGIT * Math.max(4, ...marks.map(([, text]) => text.length));
  const x = (step) => left + ((step - x0) / (x1 - x0)) * (width - left - RIGHT);
  const y = (value) => height - BOTTOM - ((value - y0) / (y1 - y0)) * (height - top - BOTTOM);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of [["width", width], ["height", height], ["aria-hidden", "true"]]) svg.setAttribute(key, value);
  if (chart.unit) add(svg, "text", { x: 0, y: 12 }, chart.unit);
  for (const [value, text] of marks) {
    add(svg, "line", { class: "rule", x1: left, x2: width - RIGHT, y1: y(value), y2: y(value) });
    add(svg, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, text);
  }
  const apart = DIGIT * written(x1, 0).length + 24;
  for (const step of ticks(x0, x1, Math.floor((width - left) / apart)).filter(Number.isInteger))
    add(svg, "text", { class: "step", x: x(step), y: height - 6, "text-anchor": "middle" }, written(step, 0));
  add(svg, "text", { x: 0, y: height - 6 }, "step");
  for (const line of lines) {
    const group = add(svg, "g", { class: `c${line.run % 8}` });
    const path = (values) => "M" + values.map((value, i) => `${x(line.steps[i]).toFixed(1)},${y(value).toFixed(1)}`).join("L");
    add(group, "path", { class: "raw", d: path(line.values) });
    add(group, "path", { class: "mean", d: path(runningMean(line.values)) });
  }
  const cursor = add(svg, "line", { class: "cursor", y1: top, y2: height - BOTTOM });
  host.replaceChildren(svg);
  const outputs = [...host.parentElement.querySelectorAll("output")];
  const rest = outputs.map((output) => (output.dataset.rest ??= output.textContent));
  host.onpointermove = (event) => {
    const at = x0 + ((event.clientX - host.getBoundingClientRect().left - left) / (width - left - RIGHT)) * (x1 - x0);
    lines.forEach((line, number) => {
      const near = line.steps.reduce((best, step, i) => (Math.abs(step - at) < Math.abs(line.steps[best] - at) ? i : best), 0);
      outputs[number].textContent = `step ${line.steps[near]}: ${written(line.values[near])}`;
      for (const key of ["x1", "x2"]) cursor.setAttribute(key, x(line.steps[near]));
    });
    cursor.style.visibility = "visible";
  };
  host.onpointerleave = () => {
    cursor.style.visibility = "hidden";
    outputs.forEach((output, number) => (output.textContent = rest[number]));
  };
}

// Says that there is more at the side, while there is.
function hint(box) {
  const hidden = box.scrollWidth - box.clientWidth;
  box.classList.toggle("more", hidden > 1 && box.scrollLeft < hidden - 1);
  let words = box.nextElementSibling;
  if (!words?.classList.contains("hint")) {
    if (hidden <= 1) return;
    words = document.createElement("p");
    words.className = "hint";
    words.textContent = "scroll sideways for more →";
    box.after(words);
  }
  words.hidden = hidden <= 1;
}

const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  if (target.dataset.chart) draw(target);
  else hint(target);
}));
for (const element of document.querySelectorAll(".plot, .scroll")) sizes.observe(element);
for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", () => hint(box), { passive: true });
