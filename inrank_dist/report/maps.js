// Heat maps: `page.maps` from heatmap.py.

const GUTTER = 38, HEADING = 18, MAP_TOP = 4, COLOURS = 7;

/** Value of a row at a step; null before its first one. */
function rowValue(row, step) {
  return row.x.length && row.x[0] <= step ? row.v[atOrBefore(row.x, step)] : null;
}

function level(quantity, value) {
  if (value === quantity.start) return 0;
  if (quantity.high === quantity.low) return Math.floor(COLOURS / 2) + 1;
  return 1 + Math.min(Math.floor(((value - quantity.low) / (quantity.high - quantity.low)) * COLOURS), COLOURS - 1);
}

function heatMap(box) {
  const map = page.maps[box.dataset.map], quantity = map.quantities[box.dataset.quantity], run = page.runs[map.run];
  let tops = [], view = null;

  function draw(paper = false) {
    const width = widthOf(box, paper), right = width - RIGHT, steps = run.axes.step;
    const known = run.axes[axis] ? axis : "step", last = place(run, steps[steps.length - 1], known) || 1;
    const px = (step) => GUTTER + (place(run, step, known) / last) * (right - GUTTER);
    const cells = {}, texts = [];
    let y = MAP_TOP, kind = null, free = 0;
    tops = map.layers.map((layer, i) => {
      if (layer.kind !== kind) {
        kind = layer.kind;
        texts.push(`<text class="group" x="${GUTTER}" y="${y + 13}">${esc(kind.length > 40 ? `${kind.slice(0, 39)}…` : kind)}</text>`);
        y += HEADING;
        free = y - 1;
      }
      const row = quantity.rows[i], top = y, bottom = (y + map.row + (map.row < 6 ? 0.3 : -1)).toFixed(1);
      row.x.forEach((step, at) => {
        // Neighbours of one colour are one rectangle.
        const colour = level(quantity, row.v[at]);
        if (at && level(quantity, row.v[at - 1]) === colour) return;
        let next = at + 1;
        while (next < row.x.length && level(quantity, row.v[next]) === colour) next += 1;
        const end = next < row.x.length ? px(row.x[next]) : right;
        (cells[colour] ??= []).push(`M${px(step).toFixed(1)} ${top.toFixed(1)}H${end.toFixed(1)}V${bottom}H${px(step).toFixed(1)}Z`);
      });
      if (top >= free && layer.number.length < 6) {
        const middle = (top + map.row / 2 + 4).toFixed(1);
        texts.push(`<text class="tick" x="${GUTTER - 6}" y="${middle}" text-anchor="end">${layer.number}</text>`);
        free = top + 13;
      }
      y += map.row;
      return top;
    });
    const paths = Object.entries(cells).map(([colour, shapes]) => `<path class="h${colour}" d="${shapes.join("")}"/>`);
    const marks = marksOf([map.run], known).filter((mark) => mark.label !== "growth");
    box.innerHTML = `<svg class="heat" viewBox="0 0 ${width} ${(y + BOTTOM).toFixed(0)}" role="img" ` +
      `aria-label="${esc(`${quantity.title} of every layer, from ${format(quantity.low)} to ${format(quantity.high)}`)}">` +
      `${paths.join("")}${verticalMarks(marks, (at) => GUTTER + (at / last) * (right - GUTTER), MAP_TOP, y)}${texts.join("")}` +
      xAxis(xTicks(0, last, right - GUTTER, { axis: known }), (x) => GUTTER + (x / last) * (right - GUTTER), GUTTER, right, y) +
      `<path class="row" d=""/></svg><div class="tip" hidden></div>`;
    view = { width, right, last, known };
  }

  function at(event) {
    const frame = box.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  function hover(x, y) {
    const i = tops.findIndex((top) => y >= top && y < top + map.row);
    if (i < 0 || x < GUTTER || x > view.right) return leave();
    const where = ((x - GUTTER) / (view.right - GUTTER)) * view.last, layer = map.layers[i];
    const step = Math.round(stepAt(run, where, view.known));
    const rows = [...map.quantities.map((each) => [each.title.split(" of ")[0], each.rows[i]]), ["Null rank", map.nulls[i]]];
    const cells = rows.map(([title, row]) => `<tr><td>${title}</td><td class="n">${format(rowValue(row, step))}</td></tr>`);
    const tip = box.querySelector(".tip");
    tip.innerHTML = `<p class="long"><b><bdi>${esc(layer.name)}</bdi></b></p><p>step ${step.toLocaleString("en-US")}</p><table>${cells.join("")}</table>`;
    showTip(tip, x, view.width);
    tip.style.top = `${tops[i] + map.row + 6}px`;
    box.querySelector(".row").setAttribute("d", `M${GUTTER} ${tops[i]}H${view.right}V${tops[i] + map.row - 1}H${GUTTER}Z`);
  }

  function leave() {
    const tip = box.querySelector(".tip");
    if (!tip) return;
    tip.hidden = true;
    box.querySelector(".row").setAttribute("d", "");
  }

  drawings.push(draw);
  const cursor = { row: -1, x: null };
  box.addEventListener("pointermove", (event) => hover(...at(event)));
  box.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("click", (event) => {
    const y = at(event)[1], i = tops.findIndex((top) => y >= top && y < top + map.row);
    if (i >= 0) chooseLayer(map.layers[i].name);
  });
  box.addEventListener("keydown", (event) => {
    const [down, across] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
    if (!down && !across) return;
    event.preventDefault();
    cursor.row = Math.max(0, Math.min(tops.length - 1, cursor.row + down));
    cursor.x = Math.max(GUTTER, Math.min(view.right, (cursor.x ?? view.right) + (across * (view.right - GUTTER)) / 100));
    hover(cursor.x, tops[cursor.row] + map.row / 2);
  });
}

document.querySelectorAll("[data-map]").forEach(heatMap);
