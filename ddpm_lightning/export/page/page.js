"use strict";
/* Controls and pictures. The mathematics is in diffusion.js. */
(() => {
  const FILM = 10; // states shown of the way of an image
  const FIRST_STEPS = 20;
  const STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750, 1000];

  const at = (id) => document.getElementById(id);
  const [channels, height, width] = MODEL.shape;
  const pixels = channels * height * width;
  const T = MODEL.gamma.length;
  const choices = [...STEPS.filter((steps) => steps < T), T];
  let model = null;
  let example = 0; // the number of the image at one noise level
  let noiseSeed = 0;
  let asked = false; // whether the prediction of a newer noise level is wanted
  let predicting = false;
  let drawing = 0; // the number of the drawing in progress; 0 for none
  let drawings = 0;
  let finished = null; // { images, labels }

  const examples = MODEL.examples.map(({ pixels: packed, label }) => {
    const grey = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    return { x0: Float64Array.from(grey, (level) => (2 * level) / (MODEL.levels - 1) - 1), label };
  });

  const paint = (canvas, images) => Pictures.paint(canvas, images, MODEL.shape);
  const rounded = (value) => value.toPrecision(3);
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  const nothing = new Float64Array(pixels).fill(-1);

  function complain(error) {
    at("status").textContent = error.message;
    at("status").classList.add("error");
    console.error(error);
  }

  // --- one noise level

  function showExamples() {
    at("examples").replaceChildren(
      ...examples.map(({ x0, label }, k) => {
        const [button, canvas] = [document.createElement("button"), document.createElement("canvas")];
        button.type = "button";
        button.setAttribute("aria-pressed", String(k === example));
        button.setAttribute("aria-label", label === null ? `image ${k + 1}` : `image of class ${label}`);
        button.onclick = () => choose(k);
        paint(canvas, x0);
        button.append(canvas);
        return button;
      }),
    );
  }

  function choose(k) {
    example = k;
    [...at("examples").children].forEach((button, j) => button.setAttribute("aria-pressed", String(j === k)));
    showLevel();
  }

  function showLevel() {
    const [n, { x0, label }] = [Number(at("time").value), examples[example]];
    const gamma = MODEL.gamma[n - 1];
    const [alpha, sigma] = [Diffusion.alpha(gamma), Diffusion.sigma(gamma)];
    const eps = Diffusion.normals(noiseSeed, 1, pixels, 1000)();
    const x = x0.map((value, i) => alpha * value + sigma * eps[i]);
    paint(at("clean"), x0);
    paint(at("noisy"), x);
    at("time-text").textContent = `${rounded(MODEL.t[n - 1])}, state ${n} of ${T}`;
    Pictures.curves(at("schedule"), MODEL.gamma, n);
    showNumbers({ "γ = −log SNR": rounded(gamma), α: rounded(alpha), σ: rounded(sigma) });
    at("tell-row").hidden = label === null || !MODEL.no_class;
    predictLevel();
  }

  // the newest noise level that is asked for; those in between are left out
  async function predictLevel() {
    asked = true;
    if (predicting || model === null) return;
    predicting = true;
    while (asked) {
      asked = false;
      const [n, { x0, label }] = [Number(at("time").value), examples[example]];
      const x = model.noised(x0, n, Diffusion.normals(noiseSeed, 1, pixels, 1000)());
      const told = label === null || (MODEL.no_class && !at("tell").checked) ? null : [label];
      try {
        const prediction = await model.predict(x, n, { labels: told });
        paint(at("guess"), prediction.x0);
        const squares = prediction.x0.map((value, i) => (value - x0[i]) ** 2);
        const error = Math.sqrt(squares.reduce((a, b) => a + b) / pixels);
        showNumbers({ "RMS error of x̂₀": rounded(error) });
      } catch (error) {
        complain(error);
      }
      await frame();
    }
    predicting = false;
  }

  const numbers = {};
  function showNumbers(some) {
    Object.assign(numbers, some);
    at("numbers").replaceChildren(
      ...Object.entries(numbers).map(([name, value]) => {
        const [entry, term, data] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
        term.textContent = name;
        data.textContent = value;
        entry.append(term, data);
        return entry;
      }),
    );
  }

  // --- from noise to images

  function wanted() {
    const count = Number(at("count").value);
    const label = at("label").value;
    const labels = Array.from({ length: count }, (_, k) => (label === "each" ? k % MODEL.classes : Number(label)));
    const free = label === "none";
    return {
      count,
      labels: MODEL.classes === null || free ? null : labels,
      guidance: MODEL.no_class && !free ? Number(at("guidance").value) : 1,
      sampler: at("sampler").value,
      steps: choices[Number(at("steps").value)],
      seed: Math.trunc(Number(at("seed").value)) || 0,
    };
  }

  function showChoices() {
    const { sampler, steps, guidance } = wanted();
    const evaluations = sampler === "HeunSampler" ? 2 * steps - 1 : steps;
    at("steps-text").textContent = steps === T ? `${steps}, the whole chain` : `${steps} of ${T}`;
    at("guidance-text").textContent = guidance === 1 ? "1, the model itself" : `${guidance}`;
    at("pause-text").textContent = `${at("pause").value} ms`;
    at("guidance").disabled = at("label").value === "none";
    const plural = evaluations === 1 ? "" : "s";
    const twice = guidance === 1 ? "" : ", each with and without the class";
    at("cost").textContent = `${evaluations} evaluation${plural} of the network for each image${twice}.`;
  }

  async function draw() {
    at("draw").textContent = drawing ? "Draw" : "Stop";
    showChoices();
    if (drawing) {
      drawing = 0; // the loop below sees it and ends
      return;
    }
    const own = (drawing = ++drawings);
    const { count, labels, guidance, sampler, steps, seed } = wanted();
    const normal = Diffusion.normals(seed, count, pixels);
    const start = performance.now();
    let spent = 0;
    let k = 0;
    at("film").replaceChildren();
    at("prediction").classList.remove("done");
    finished = null;
    try {
      const states = Diffusion.draw(model, normal(), { sampler, steps, normal, cond: { labels, guidance } });
      for (;;) {
        const before = performance.now();
        const { value, done } = await states.next();
        spent += performance.now() - before;
        if (done || own !== drawing) break;
        showStep(value, k++, steps);
        await frame();
        if (value.n > 0) await new Promise((go) => setTimeout(go, Number(at("pause").value)));
        if (value.n === 0) finished = { images: value.x0, labels };
      }
      if (finished && own === drawing) {
        const seconds = ((performance.now() - start) / 1000).toFixed(1);
        at("cost").textContent = `Done in ${seconds} s, ${(spent / 1000).toFixed(2)} s of it in the sampler and the network.`;
        at("prediction").classList.add("done");
      }
    } catch (error) {
      complain(error);
    }
    if (own !== drawing) return; // stopped, and perhaps another one begun
    drawing = 0;
    at("draw").textContent = "Draw";
  }

  function showStep({ n, x, x0 }, k, steps) {
    paint(at("state"), x);
    paint(at("prediction"), x0);
    at("state-text").replaceChildren(named(n), n === 0 ? ", the images" : ", the state");
    at("progress").value = k / steps;
    const frames = Math.min(FILM - 1, steps);
    if (!Array.from({ length: frames + 1 }, (_, j) => Math.round((j * steps) / frames)).includes(k)) return;
    const [column, caption] = [document.createElement("figure"), document.createElement("figcaption")];
    for (const images of [x, x0]) {
      const canvas = document.createElement("canvas");
      paint(canvas, images.subarray(0, pixels));
      column.append(canvas);
    }
    caption.append(named(n));
    column.append(caption);
    at("film").append(column);
    at("film").scrollLeft = at("film").scrollWidth; // where it does not fit
  }

  // x with the number of the state below
  function named(n) {
    const [symbol, index] = [document.createElement("span"), document.createElement("sub")];
    symbol.className = "formula";
    index.textContent = n;
    symbol.append("x", index);
    return symbol;
  }

  function take(event) {
    if (finished === null) return;
    const count = finished.images.length / pixels;
    const columns = Math.ceil(Math.sqrt(count));
    const rows = Math.ceil(count / columns);
    const box = at("prediction").getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const k = column + columns * Math.floor(((event.clientY - box.top) / box.height) * rows);
    if (k >= count) return;
    const label = finished.labels ? finished.labels[k] : null;
    examples[example] = { x0: finished.images.slice(k * pixels, (k + 1) * pixels), label };
    showExamples();
    showLevel();
    at("examples").scrollIntoView({ behavior: "smooth", block: "center" });
  }

  // --- the beginning

  function lay() {
    const size = `${channels === 3 ? "coloured " : ""}${width} × ${height} pixels, ${MODEL.levels} levels`;
    const classes = MODEL.classes === null ? "no classes" : `${MODEL.classes} classes`;
    at("about").textContent = `Model ${MODEL.name}: ${size}, ${classes}, a chain of T = ${T} states.`;
    document.title = `${MODEL.name}: a diffusion model in the browser`;
    at("time").max = T;
    at("time").value = Math.max(1, Math.round(0.4 * T));
    at("steps").max = choices.length - 1;
    at("steps").value = choices.findLastIndex((steps) => steps <= FIRST_STEPS);
    at("label-row").hidden = MODEL.classes === null;
    at("guidance-row").hidden = !MODEL.no_class;
    const labels = Array.from({ length: MODEL.classes ?? 0 }, (_, label) => [label, String(label)]);
    at("label").append(new Option("each in turn", "each"), ...labels.map(([value, text]) => new Option(text, value)));
    if (MODEL.no_class) at("label").append(new Option("none", "none"));
    for (const id of ["clean", "noisy", "guess", "state", "prediction"]) paint(at(id), nothing);
    showExamples();
    at("time").oninput = showLevel;
    at("tell").onchange = showLevel;
    at("renoise").onclick = () => {
      noiseSeed += 1;
      showLevel();
    };
    for (const id of ["sampler", "count", "label", "steps", "guidance", "pause"]) at(id).oninput = showChoices;
    at("draw").onclick = draw;
    at("prediction").onclick = take;
    showChoices();
    showLevel();
  }

  async function begin() {
    lay();
    try {
      const network = await Network.load(MODEL, (text) => (at("status").textContent = text));
      model = new Diffusion.Model(MODEL, network);
      const times = [];
      for (let k = 0; k < 4; k++) {
        const start = performance.now();
        await model.predict(nothing, T, {});
        times.push(performance.now() - start); // the first is slow
      }
      const least = Math.min(...times).toFixed(1);
      at("status").textContent = `Ready. An evaluation of the network takes ${least} ms for one image here.`;
      at("draw").disabled = false;
      predictLevel();
      draw();
    } catch (error) {
      complain(error);
    }
  }

  begin();
})();
