// Spectra of a chosen layer: `page.spectra` from spectra.py.

const choosers = []; // one function of the layer's name for each panel

/** Shows a layer in the panels that have it. */
function chooseLayer(name) {
  choosers.forEach((choose) => choose(name));
}

function spectra(panel) {
  const data = page.spectra[panel.dataset.spectra];
  const select = panel.querySelector("select"), range = panel.querySelector("input"), output = panel.querySelector("output");
  const line = (label, x, y, more) => ({
    label, x, y, run: data.run, colour: "--c0", width: 1.8, dash: "", faint: false, hold: false, dots: x.length < 40, low: [], high: [], ...more,
  });
  const blank = { references: [], marks: [], zero: false, log: true, xLog: false, height: 260, x: "" };
  const layer = () => data.layers[select.value];

  /** The layer's spectrum at the chosen step, or at the last one before it. */
  function current() {
    const found = layer().at.filter(([at]) => at <= range.value);
    return found.length ? found[found.length - 1] : layer().at[0];
  }

  function now() {
    const [at, indices, sigma, rank, nullRank, norm] = current(), [, firstIndices, first] = layer().at[0];
    const lines = [line("at this step", data.indices[indices], sigma)];
    if (layer().at[0] !== current()) {
      lines.unshift(line("at first", data.indices[firstIndices], first, { faint: true, dots: false }));
    }
    const untrained = (data.nulls[layer().shape] || {})[at];
    if (untrained && norm) {
      const scaled = untrained[1].map((value) => (value === null ? null : value * norm));
      lines.push(line("null spectrum", data.indices[untrained[0]], scaled, { colour: "--ink", dash: "6 4", width: 1.4, dots: false }));
    }
    const upright = [["rank", rank, "--c2", ""], ["null rank", nullRank, "--ink", "2 3"]];
    const own = upright.filter(([, value]) => value).map(([label, value, colour, dash]) => (
      { label, at: value, colour, dash, tip: `${label} ${value}` }));
    return { ...blank, title: `Spectrum of ${layer().name}`, lines, own, x: "index", xLog: true };
  }

  function overTime() {
    const lines = data.drawn.map(([index, label, colour]) => {
      const points = layer().at.map(([at, indices, sigma]) => {
        const place = data.indices[indices].indexOf(index);
        return [data.steps[at], place < 0 ? null : sigma[place]];
      });
      return line(label, points.map(([step]) => step), points.map(([, value]) => value), { colour, dots: points.length < 40 });
    });
    const run = page.runs[data.run], at = place(run, data.steps[current()[0]]);
    const cursor = { label: "this step", at, colour: "--soft", dash: "", tip: "the step of the spectrum" };
    const own = [...marksOf([data.run]), ...(at === null ? [] : [cursor])].sort((a, b) => a.at - b.at);
    return { ...blank, title: `Singular values of ${layer().name}`, lines: lines.filter((each) => each.y.some((v) => v !== null)), own };
  }

  const draws = [["now", now], ["time", overTime]].map(([part, spec]) => (
    plot(panel.querySelector(`[data-part=${part}]`), spec)));
  const tell = () => {
    const step = data.steps[current()[0]].toLocaleString("en-US");
    output.textContent = `${step} (${+range.value + 1} of ${data.steps.length})`;
  };
  const change = () => { tell(); draws.forEach((draw) => draw()); };
  select.addEventListener("change", change);
  range.addEventListener("input", change);
  choosers.push((name) => {
    const found = data.layers.findIndex((each) => each.name === name);
    if (found < 0) return;
    select.value = found;
    change();
  });
  tell();
}

document.querySelectorAll("[data-spectra]").forEach(spectra);
