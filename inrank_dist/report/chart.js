"use strict";
// Draws the plots of a page from the JSON in #page-data, which chart.py writes. SVG is written as text, so that the
// page needs no namespace address; every text of the run goes through `esc`.

const page = JSON.parse(document.getElementById("page-data").textContent);
const drawings = []; // one function for each plot, which is told whether it is for paper
const AXIS = {
  step: { label: "optimizer step", units: ["", "k", "M", "B", "T"] },
  tokens: { label: "tokens", units: ["", "k", "M", "B", "T"] },
  flops: { label: "floating-point operations", units: ["", "k", "M", "G", "T", "P", "E", "Z", "Y"] },
  seconds: { label: "training time" },
};
const TIME = [[259200, 86400, "days"], [10800, 3600, "hours"], [180, 60, "minutes"], [0, 1, "seconds"]];
const GLYPH = 7.8; // width of a character of a tick, about, in pixels
const RIGHT = 14, TOP = 10, BOTTOM = 40;
const hiddenMarks = new Set();
let axis = "step";

const esc = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
const power = (n) => String(n).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);

/** A value for reading: four significant digits, or more for whole numbers. */
function format(value, units = ["", "", "M", "B", "T"]) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size && size < 1e-3) {
    const exponent = Math.floor(Math.log10(size) + 1e-9);
    return `${trim((value / 10 ** exponent).toFixed(2))}×10${power(exponent)}`;
  }
  const thousands = Math.min(Math.floor(Math.log10(size || 1) / 3 + 1e-9), units.length - 1);
  if (size >= 1e6 && thousands > 1) return trim((value / 1000 ** thousands).toPrecision(4)) + units[thousands];
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return trim(value.toPrecision(4));
}

function duration(seconds) {
  const whole = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
  const days = Math.floor(whole / 86400), hours = Math.floor(whole / 3600) % 24;
  const rest = `${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
  return days ? `${days}d ${pad(hours)}:${rest}` : `${hours}:${rest}`;
}

/** Round numbers from at most `low` to at least `high`, about `count`. */
function linearTicks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) ticks.push(i * step);
  return ticks;
}

/** Powers of ten, and 2 and 5 times these where there are few, from at most `low` to at least `high`. */
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const stride = Math.max(1, Math.ceil((last - first) / 8)), factors = high < 1000 * low ? [1, 2, 5] : [1];
  const ticks = [];
  for (let i = first; i < last + stride; i += stride) for (const factor of factors) ticks.push(factor * 10 ** i);
  const from = ticks.filter((tick) => tick <= low * (1 + 1e-9)).length - 1;
  const to = ticks.findIndex((tick) => tick >= high * (1 - 1e-9));
  return ticks.slice(Math.max(from, 0), (to < 0 ? ticks.length - 1 : to) + 1);
}

/** Labels of one axis in one notation. */
function tickLabels(ticks, units = ["", "k", "M", "B", "T"]) {
  const sizes = ticks.map(Math.abs), top = Math.max(...sizes), least = Math.min(...sizes.filter((size) => size), top);
  const asPower = (tick, exponent) => {
    const factor = trim((tick / 10 ** exponent).toFixed(6));
    return (factor === "1" ? "" : `${factor}×`) + `10${power(exponent)}`;
  };
  if (top > 0 && (top < 0.01 || least < 1e-4 || top >= 1000 ** units.length)) {
    const shared = Math.floor(Math.log10(top) + 1e-9), wide = top > 100 * least;
    return ticks.map((t) => (t ? asPower(t, wide ? Math.floor(Math.log10(Math.abs(t)) + 1e-9) : shared) : "0"));
  }
  if (top >= 1e4) {
    const at = Math.min(Math.floor(Math.log10(top) / 3 + 1e-9), units.length - 1);
    return ticks.map((tick) => (tick ? trim((tick / 1000 ** at).toPrecision(6)) + units[at] : "0"));
  }
  if (top >= 1000) return ticks.map((tick) => tick.toLocaleString("en-US"));
  const digits = Math.max(...ticks.map((tick) => (trim(tick.toPrecision(6)).split(".")[1] || "").length));
  return ticks.map((tick) => tick.toFixed(digits));
}

/** Index of the last of the increasing `values` that is at most `value`; 0 if there is none. */
function atOrBefore(values, value) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (values[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

/** Position of a step of a run on an axis; null if the run did not record it. */
function place(run, step, name = axis) {
  const from = run.axes.step, to = run.axes[name];
  if (!to) return null;
  if (name === "step") return step;
  const i = Math.min(atOrBefore(from, step), Math.max(from.length - 2, 0)), width = from[i + 1] - from[i];
  if (!(width > 0)) return to[i];
  return to[i] + (Math.min(step - from[i], width) / width) * (to[i + 1] - to[i]);
}

/** The step of a run at a position on an axis. */
function stepAt(run, where, name) {
  const to = run.axes.step, from = run.axes[name];
  const i = Math.min(atOrBefore(from, where), Math.max(from.length - 2, 0)), width = from[i + 1] - from[i];
  return width > 0 ? to[i] + ((where - from[i]) / width) * (to[i + 1] - to[i]) : to[i];
}

/** Shows a box of values beside a pixel, within the plot. */
function showTip(tip, x, width) {
  tip.hidden = false;
  const side = x > width / 2 ? x - tip.offsetWidth - 12 : x + 12;
  tip.style.left = `${Math.max(0, Math.min(side, width - tip.offsetWidth))}px`;
}

/** Ticks of the x axis that fit, with labels that do not touch, and the label of the axis. */
function xTicks(low, high, room, spec) {
  if (spec.xLog) {
    let ticks = logTicks(low, high).filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    while (ticks.length * 44 > room) ticks = ticks.filter((_, i) => i % 2 === 0);
    return { ticks, labels: ticks.map((tick) => format(tick)), label: spec.x };
  }
  const on = spec.axis || axis, time = !spec.x && on === "seconds";
  const [, unit, name] = time ? TIME.find(([least]) => high >= least) : [0, 1, ""];
  const units = spec.x ? undefined : AXIS[on].units;
  let count = Math.max(2, Math.floor(room / 64)), ticks, labels;
  do {
    ticks = linearTicks(low / unit, high / unit, count).filter((t) => t * unit >= low && t * unit <= high * 1.0001);
    labels = tickLabels(ticks, units);
    count -= 1;
  } while (count > 1 && labels.reduce((sum, label) => sum + label.length * GLYPH + 16, 0) > room);
  return { ticks: ticks.map((t) => t * unit), labels, label: spec.x || AXIS[on].label + (time ? `, ${name}` : "") };
}

/** The minimum and maximum that the y axis must cover. */
function yRange(spec, lines) {
  let low = Infinity, high = -Infinity;
  const cover = (value) => { if (value < low) low = value; if (value > high) high = value; };
  spec.references.forEach((each) => cover(each.y));
  for (const line of lines) {
    let values = [...line.y, ...line.low, ...line.high].filter((v) => v !== null && (v > 0 || !spec.log));
    if (line.faint && values.length > 20) {
      values.sort((a, b) => a - b);
      const cut = Math.floor(values.length / 100);
      values = [values[cut], values[values.length - 1 - cut]];
    }
    values.forEach(cover);
  }
  if (low > high) return [0, 1];
  if (spec.zero && !spec.log) low = Math.min(low, 0);
  if (high - low < 1e-9 * Math.max(Math.abs(high), 1e-12)) {
    const margin = Math.abs(high) / 10 || 1;
    return [low - (spec.zero ? 0 : margin), high + margin];
  }
  return [low, high];
}

/** The x axis with its labels, none of which leaves the plot or touches another. */
function xAxis({ ticks, labels, label }, px, left, right, bottom) {
  let free = -Infinity;
  const parts = ticks.map((tick, i) => {
    const half = (labels[i].length * GLYPH) / 2, x = px(tick), at = Math.min(x, right + RIGHT - half);
    const line = `<path class="axis" d="M${x.toFixed(1)} ${bottom}v4"/>`;
    if (at - half < free) return line;
    free = at + half + 6;
    return `${line}<text class="tick" x="${at.toFixed(1)}" y="${bottom + 17}" text-anchor="middle">${labels[i]}</text>`;
  });
  return `<path class="axis" d="M${left} ${bottom}H${right}"/>${parts.join("")}` +
    `<text class="tick" x="${right}" y="${bottom + 33}" text-anchor="end">${esc(label)}</text>`;
}

/** Vertical marks as SVG; those with the same label keep a distance, as they would fill the plot. */
function verticalMarks(marks, px, top, bottom) {
  const drawn = {}, opacity = marks.length > 60 ? 0.2 : marks.length > 20 ? 0.45 : 1;
  return marks.map((mark) => {
    const x = px(mark.at);
    if (x - (drawn[mark.label] ?? -9) < 4) return "";
    drawn[mark.label] = x;
    return `<path class="mark" d="M${x.toFixed(1)} ${top}V${bottom}" style="stroke:var(${mark.colour})" ` +
      `stroke-dasharray="${mark.dash}" stroke-opacity="${opacity}"/>`;
  }).join("");
}

/** The events of runs, in the order of the axis, without those that it cannot place. */
function marksOf(runs, name = axis) {
  const marks = runs.flatMap((index) => page.runs[index].marks.map((mark) => (
    { ...mark, at: place(page.runs[index], mark.x, name) })));
  return marks.filter((mark) => mark.at !== null && !hiddenMarks.has(mark.label)).sort((a, b) => a.at - b.at);
}

/** Makes a box a plot: `spec` is a function of nothing, since plots of a chosen layer change. */
function plot(box, getSpec) {
  const figure = box.closest("figure"), hidden = new Set();
  let view = null;

  function draw(paper = false) {
    const spec = getSpec(), width = widthOf(box, paper);
    const lines = spec.lines.filter((line) => !hidden.has(line.label)).map((line) => ({
      ...line, at: spec.x ? line.x : line.x.map((step) => place(page.runs[line.run], step)),
    })).filter((line) => line.at[0] !== null);
    const height = spec.height, right = width - RIGHT, bottom = height - BOTTOM;
    let [low, high] = yRange(spec, lines);
    const log = spec.log && low > 0 && high > 5 * low;
    const ticks = log ? logTicks(low, high) : linearTicks(low, high, Math.max(3, height / 42));
    [low, high] = [ticks[0], ticks[ticks.length - 1]];
    const within = (spec.own || []).map((mark) => mark.at).filter((at) => spec.x && at !== null);
    const ends = lines.flatMap((line) => [line.at[0], line.at[line.at.length - 1]]).concat(within);
    if (!spec.x) ends.push(0, ...lines.map((line) => page.runs[line.run].axes[axis].slice(-1)[0]));
    const first = ends.length ? Math.min(...ends) : 0;
    let last = Math.max(...ends, first);
    if (last <= first) last = first + (Math.abs(first) || 1);
    const xWarp = spec.xLog ? Math.log10 : Number, yWarp = log ? Math.log10 : Number;
    const tickTexts = tickLabels(ticks), left = Math.max(50, 12 + GLYPH * Math.max(...tickTexts.map((each) => each.length)));
    const px = (x) => left + ((xWarp(x) - xWarp(first)) / (xWarp(last) - xWarp(first))) * (right - left);
    const py = (y) => bottom - ((yWarp(y) - yWarp(low)) / (yWarp(high) - yWarp(low))) * (bottom - TOP);
    const marks = (spec.own || marksOf(spec.marks)).filter((mark) => !hidden.has(mark.label));
    const grid = tickTexts.map((label, i) => {
      const y = py(ticks[i]).toFixed(1);
      return `<path class="grid" d="M${left} ${y}H${right}"/>` +
        `<text class="tick" x="${left - 7}" y="${+y + 4}" text-anchor="end">${label}</text>`;
    });
    let free = Infinity;
    const references = [...spec.references].sort((a, b) => b.y - a.y).map((each) => {
      const y = py(each.y), at = y > TOP + 18 ? y - 6 : y + 14, fits = Math.abs(free - at) > 16;
      if (fits) free = at;
      return `<path class="reference" d="M${left} ${y.toFixed(1)}H${right}"/>` + (!fits ? "" :
        `<text class="name" x="${right - 4}" y="${at.toFixed(1)}" text-anchor="end">${esc(each.label)}</text>`);
    });
    const clip = `clip-${drawings.indexOf(draw)}`;
    box.innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${esc(summary(spec))}">` +
      `<clipPath id="${clip}"><rect x="${left - 4}" y="${TOP - 4}" width="${Math.max(right - left + 8, 0)}" ` +
      `height="${bottom - TOP + 8}"/></clipPath>${grid.join("")}` +
      xAxis(xTicks(first, last, right - left, spec), px, left, right, bottom) +
      `<g clip-path="url(#${clip})">${verticalMarks(marks, px, TOP, bottom)}` +
      `${lines.map((line) => curve(line, px, py, log, holdEnd(spec, line))).join("")}</g>${references.join("")}` +
      `<path class="cross" d=""/><g class="points"></g></svg><div class="tip" hidden></div>`;
    view = { spec, lines, marks, px, py, log, width, left, right, first, last };
  }

  function curve(line, px, py, log, end) {
    let path = "", pen = false;
    const dots = [], upper = [], lower = [];
    line.y.forEach((value, i) => {
      if (value === null || (log && value <= 0)) { pen = false; return; }
      const x = px(line.at[i]).toFixed(1), y = py(value).toFixed(1);
      if (pen && line.hold) path += `H${x}`;
      path += `${pen ? "L" : "M"}${x} ${y}`;
      pen = true;
      if (line.dots) dots.push(`<circle cx="${x}" cy="${y}" r="2.4" style="fill:var(${line.colour})"/>`);
      if (line.low.length && line.low[i] !== null && line.high[i] !== null && (!log || line.low[i] > 0)) {
        upper.push(`${x} ${py(line.high[i]).toFixed(1)}`);
        lower.unshift(`${x} ${py(line.low[i]).toFixed(1)}`);
      }
    });
    if (line.hold && pen) path += `H${px(end).toFixed(1)}`;
    const band = upper.length ? `<path class="band" d="M${[...upper, ...lower].join("L")}Z" style="fill:var(${line.colour})"/>` : "";
    return `${band}<path class="curve" d="${path}" style="stroke:var(${line.colour})" stroke-width="${line.faint ? 1 : line.width}" ` +
      `stroke-opacity="${line.faint ? 0.35 : 1}" stroke-dasharray="${line.dash}"/>${dots.join("")}`;
  }

  /** Where a line ends that holds its last value: at the end of its run. */
  function holdEnd(spec, line) {
    const end = line.at[line.at.length - 1];
    return spec.x ? end : Math.max(end, ...page.runs[line.run].axes[axis].slice(-1));
  }

  /** Shows the values at a pixel, of every line at its nearest point. */
  function hover(x) {
    if (!view || !view.lines.length) return;
    const { spec, lines, marks, px, py, log, width } = view;
    const found = lines.map((line) => {
      const target = invert(x);
      let i = atOrBefore(line.at, target);
      if (!line.hold && i + 1 < line.at.length && Math.abs(px(line.at[i + 1]) - x) < Math.abs(px(line.at[i]) - x)) i += 1;
      return { line, i, px: px(line.at[i]), value: line.y[i] };
    });
    const nearest = found.reduce((a, b) => (Math.abs(b.px - x) < Math.abs(a.px - x) ? b : a));
    const rows = found.map(({ line, i, value, px: at }) => {
      const range = line.low.length && line.low[i] !== null ? ` (${format(line.low[i])} to ${format(line.high[i])})` : "";
      // A line with few points has none at this place.
      const elsewhere = !line.hold && Math.abs(at - nearest.px) > 3 ? ` <span class="soft">at ${spec.x ? format(line.x[i]) : position(line, i)}</span>` : "";
      return `<tr><td><i style="background:var(${line.colour});opacity:${line.faint ? 0.4 : 1}"></i></td>` +
        `<td><bdi>${esc(line.label)}</bdi></td><td class="n">${format(value)}${range}${elsewhere}</td></tr>`;
    });
    const near = marks.filter((mark) => Math.abs(px(mark.at) - x) < 5).slice(0, 4);
    const events = near.map((mark) => `<p style="color:var(${mark.colour})"><bdi>${esc(mark.tip)}</bdi></p>`);
    const tip = box.querySelector(".tip");
    tip.innerHTML = `<p><b>${where(nearest)}</b></p><table>${rows.join("")}</table>${events.join("")}`;
    showTip(tip, nearest.px, width);
    box.querySelector(".cross").setAttribute("d", `M${nearest.px.toFixed(1)} ${TOP}V${spec.height - BOTTOM}`);
    box.querySelector(".points").innerHTML = found.filter(({ value }) => value !== null && (!log || value > 0))
      .map((each) => `<circle cx="${each.px.toFixed(1)}" cy="${py(each.value).toFixed(1)}" r="3.4" style="fill:var(${each.line.colour})"/>`)
      .join("");
  }

  function invert(x) {
    const { spec, first, last, left, right } = view, part = (x - left) / (right - left);
    if (!spec.xLog) return first + part * (last - first);
    return 10 ** (Math.log10(first) + part * (Math.log10(last) - Math.log10(first)));
  }

  /** The position as text: on all axes if the plot is of one run. */
  function where({ line, i }) {
    const { spec, lines } = view;
    if (spec.x) return `${esc(spec.x)} ${format(line.x[i])}`;
    const run = page.runs[line.run], names = lines.every((each) => each.run === line.run) ? Object.keys(AXIS) : [axis];
    return names.filter((name) => run.axes[name]).map((name) => position(line, i, name)).join(" · ");
  }

  /** The place of a point on an axis as text. */
  function position(line, i, name = axis) {
    const at = place(page.runs[line.run], line.x[i], name);
    if (name === "step") return `step ${Math.round(at).toLocaleString("en-US")}`;
    return name === "seconds" ? duration(at) : `${format(at, AXIS[name].units)} ${name === "flops" ? "FLOPs" : name}`;
  }

  function leave() {
    const tip = box.querySelector(".tip");
    if (!tip) return;
    tip.hidden = true;
    box.querySelector(".cross").setAttribute("d", "");
    box.querySelector(".points").innerHTML = "";
  }

  drawings.push(draw);
  const cursor = { at: null };
  box.addEventListener("pointermove", (event) => {
    cursor.at = event.clientX - box.getBoundingClientRect().left;
    hover(cursor.at);
  });
  box.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !view) return;
    event.preventDefault();
    const { left, right } = view, step = Math.max(1, (right - left) / 200);
    cursor.at = Math.min(right, Math.max(left, (cursor.at ?? left) + by * step));
    hover(cursor.at);
  });
  figure.addEventListener("click", (event) => {
    const key = event.target.closest(".key");
    if (!key) return;
    toggle(hidden, key);
    draw();
  });
  return draw;
}

/** Shows or hides what a legend entry names. */
function toggle(hidden, key) {
  const label = key.dataset.label, shown = hidden.delete(label);
  if (!shown) hidden.add(label);
  document.querySelectorAll(".key").forEach((each) => {
    if (each === key || (each.dataset.label === label && key.closest(".controls") && each.closest(".controls"))) {
      each.setAttribute("aria-pressed", String(shown));
    }
  });
}

/** The curves in one sentence, for those who cannot see them. */
function summary(spec) {
  const ends = spec.lines.slice(0, 8).map((line) => {
    const values = line.y.filter((value) => value !== null);
    return `${line.label} from ${format(values[0])} to ${format(values[values.length - 1])}`;
  });
  return `${spec.title}: ${ends.join("; ")}`.slice(0, 600);
}

function drawAll(paper = false) {
  drawings.forEach((draw) => draw(paper));
}

const widthOf = (box, paper) => (paper ? (box.closest(".pair") ? 340 : 700) : box.clientWidth);

document.querySelectorAll("[data-chart]").forEach((box) => plot(box, () => page.charts[box.dataset.chart]));
document.addEventListener("click", (event) => {
  const choice = event.target.closest("[data-axis]"), mark = event.target.closest(".controls .key");
  if (mark) {
    toggle(hiddenMarks, mark);
    drawAll();
  }
  if (!choice) return;
  axis = choice.dataset.axis;
  document.querySelectorAll("[data-axis]").forEach((each) => (
    each.setAttribute("aria-pressed", String(each.dataset.axis === axis))));
  drawAll();
});

function start() {
  drawAll();
  let due = false;
  new ResizeObserver(() => {
    if (!due) requestAnimationFrame(() => { due = false; drawAll(); });
    due = true;
  }).observe(document.querySelector("main"));
  // A page of paper is narrower than a window and wider than a phone.
  addEventListener("beforeprint", () => drawAll(true));
  addEventListener("afterprint", () => drawAll());
}
