// What is wrong with the layout of the page, as a list of sentences. Evaluated in the page by the tests.
(() => {
  const wrong = [], width = document.documentElement.clientWidth;
  const say = (what) => { if (wrong.length < 20) wrong.push(what); };
  const told = (element) => `${element.tagName} "${(element.textContent || "").trim().slice(0, 40)}"`;
  if (document.documentElement.scrollWidth > width) say(`the page is ${document.documentElement.scrollWidth} wide in ${width}`);

  // The part of a box that is seen, since ancestors may cut it or let it scroll.
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  function seen(node, box) {
    let { left, right, top, bottom } = box;
    for (let each = node.parentElement; each; each = each.parentElement) {
      if (getComputedStyle(each).overflow === "visible" && getComputedStyle(each).overflowX === "visible") continue;
      const frame = each.getBoundingClientRect();
      left = Math.max(left, frame.left); right = Math.min(right, frame.right);
      top = Math.max(top, frame.top); bottom = Math.min(bottom, frame.bottom);
    }
    return right - left > 0.5 && bottom - top > 0.5 ? { left, right, top, bottom, node } : null;
  }

  const texts = [], walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, title, option, [hidden]") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      const svg = parent.closest("svg"), frame = svg && svg.getBoundingClientRect();
      if (svg && (rect.left < frame.left - 1 || rect.right > frame.right + 1 || rect.top < frame.top - 4 || rect.bottom > frame.bottom + 1)) {
        say(`${told(parent)} is cut by its plot`);
      }
      const box = seen(node, rect);
      if (!box) continue;
      texts.push(box);
      if (box.right > width + 1 || box.left < -1) say(`${told(parent)} leaves the page at ${box.left.toFixed(0)} to ${box.right.toFixed(0)}`);
    }
  }
  texts.sort((a, b) => a.top - b.top);
  texts.forEach((a, i) => {
    for (let j = i + 1; j < texts.length && texts[j].top < a.bottom - 3; j++) {
      const b = texts[j], across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (a.node !== b.node && across > 1 && down > 3) say(`${told(a.node.parentElement)} overlaps ${told(b.node.parentElement)}`);
    }
  });

  for (const element of document.querySelectorAll("main *")) {
    const box = element.getBoundingClientRect();
    let free = false;
    for (let each = element.parentElement; each && !free; each = each.parentElement) free = scrolls(each) || getComputedStyle(each).overflowX === "hidden";
    if (!free && box.width && box.right > width + 1) say(`${told(element)} ends at ${box.right.toFixed(0)} of ${width}`);
  }
  for (const plot of document.querySelectorAll(".plot")) {
    const shapes = [...plot.querySelectorAll("path.curve, svg.heat > path[class^=h]")];
    if (!shapes.some((path) => path.getAttribute("d").length > 3)) say(`${told(plot.closest("figure"))} is empty`);
    if (/NaN|Infinity|undefined/.test(plot.innerHTML)) say(`${told(plot.closest("figure"))} has a number that is none`);
  }
  for (const heading of document.querySelectorAll("h2")) if (!heading.nextElementSibling) say(`${told(heading)} has nothing below it`);
  for (const table of document.querySelectorAll("table")) if (!table.rows.length) say("a table is empty");
  return wrong;
})()
