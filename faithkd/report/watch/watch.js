// Things to drag and watch. Every <div class="watch" data-watch="figure1"> holds its data as JSON; no kernel, no network.
(() => {
  // --- networks: what torch computes, in a few lines
  const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const softmax = (z) => {
    const top = Math.max(...z), powers = z.map((v) => Math.exp(v - top)), sum = powers.reduce((a, b) => a + b);
    return powers.map((v) => v / sum);
  };
  const gap = (f, g) => Math.max(...f.map((v, c) => Math.abs(v - g[c])));
  const best = (f) => f.indexOf(Math.max(...f));

  function network(written) {
    const layers = written.map((layer) => ({ W: floats(layer.weight), b: Array.from(floats(layer.bias)) }));
    function forward(x) { // the input of every layer, then the logits
      const values = [Array.from(x)];
      layers.forEach(({ W, b }, k) => {
        const y = k ? values[k].map((v) => Math.max(v, 0)) : values[k];
        values.push(b.map((v, i) => y.reduce((sum, u, j) => sum + W[i * y.length + j] * u, v)));
      });
      return values;
    }
    const logits = (x) => forward(x).at(-1);
    function pull(x, gradient) { // the gradient on the logits as one on the input
      const values = forward(x);
      for (let k = layers.length - 1; k >= 0; k--) {
        const { W } = layers[k], width = values[k].length;
        gradient = values[k].map((v, j) => (k && v <= 0 ? 0 : gradient.reduce((s, g, i) => s + g * W[i * width + j], 0)));
      }
      return gradient;
    }
    return { logits, pull, says: (x) => softmax(logits(x)) };
  }

  // What each attack climbs, as gradients on the logits of teacher (may be null) and student; f: confidences at z.
  const LOSSES = {
    ARD: ["cross-entropy of the student, as ARD", (f, g, clean, y) => [null, g.map((v, c) => v - (c === y))]],
    RSLAD: ["KL from the teacher at x, as RSLAD", (f, g, clean) => [null, g.map((v, c) => v - clean[c])]],
    FD: ["KL from the teacher at x′, as FD", (f, g) => {
      const kl = f.reduce((sum, v, c) => sum + v * Math.log(v / g[c]), 0);
      return [f.map((v, c) => v * (Math.log(v / g[c]) - kl)), g.map((v, c) => v - f[c])];
    }],
    gap: ["the difference itself, as EmpLB", (f, g) => {
      const apart = f.map((v, c) => Math.abs(v - g[c])), c = best(apart), sign = Math.sign(f[c] - g[c]);
      const along = (h, s) => h.map((v, i) => s * h[c] * ((i === c) - v));
      return [along(f, sign), along(g, -sign)];
    }],
  };
  const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
  function ascend(z, x, eps, size, teacher, student, loss, clean, y) { // projected gradient ascent, eq. (2)
    const [onTeacher, onStudent] = loss(teacher.says(z), student.says(z), clean, y);
    const slope = student.pull(z, onStudent), more = onTeacher && teacher.pull(z, onTeacher);
    return z.map((v, i) => clamp(v + size * Math.sign(slope[i] + (more ? more[i] : 0)), x[i] - eps, x[i] + eps));
  }

  // --- drawing
  function make(parent, tag, settings = {}, text) {
    const svg = ["svg", "polyline", "polygon", "line", "circle", "text"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  }
  const heat = (v) => [255 - 195 * v ** 1.4, 245 - 235 * v, 235 - 165 * v]; // pale to dark, 0 to 1
  function paint(canvas, side, colour) { // colour(column, row) gives red, green and blue
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d"), pixels = context.createImageData(side, side);
    for (let k = 0; k < side * side; k++) pixels.data.set([...colour(k % side, Math.floor(k / side)), 255], 4 * k);
    context.putImageData(pixels, 0, 0);
  }
  const picture = (canvas, x, digits) => paint(canvas, 8, (a, b) => {
    return Array(3).fill(255 * (1 - clamp(x[8 * b + a] * digits.std + digits.mean, 0, 1)));
  });
  function bars(parent, classes, colours) { // confidences of some networks side by side; returns how to set them
    const group = make(parent, "div", { class: "bars", "aria-hidden": "true" });
    const columns = classes.map((name) => {
      const column = make(group, "div"), all = Object.values(colours).map((c) => make(column, "i", { style: `background:${c}` }));
      make(column, "b", {}, name);
      return all;
    });
    return (...sides) => columns.forEach((all, c) => all.forEach((bar, k) => (bar.style.height = `${80 * sides[k][c]}%`)));
  }
  function choice(parent, label, names, changed) {
    const select = make(make(parent, "label", {}, `${label} `), "select");
    names.forEach((name, k) => make(select, "option", { value: k }, name));
    select.addEventListener("change", () => changed(Number(select.value)));
  }
  function buttons(parent, steps) { // step(), back() and reset() as buttons, and one that plays
    const row = make(parent, "div", { class: "watch-row" });
    let timer;
    const stop = () => { clearInterval(timer); timer = undefined; play.textContent = "Play"; };
    const button = (text, act) => make(row, "button", { type: "button" }, text).addEventListener("click", () => { stop(); act(); });
    const play = make(row, "button", { type: "button" }, "Play");
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (!steps.step()) { steps.reset(); }
      play.textContent = "Stop";
      timer = setInterval(() => { if (!play.isConnected || !steps.step()) stop(); }, 450);
    });
    button("Step", steps.step);
    if (steps.back) button("Back", steps.back);
    button("Start again", steps.reset);
    return row;
  }
  const key = (parent, entries) => {
    const row = make(parent, "p", { class: "key" });
    for (const [name, colour] of Object.entries(entries)) make(row, "span", { style: `--c:${colour}` }, name);
  };
  const PAIR = { teacher: "var(--teacher)", student: "var(--student)" }; // a root says which colours these are
  const near = (v) => v.toFixed(3), up = (v) => near(Math.ceil(1e3 * v - 1e-6) / 1e3), down = (v) => near(Math.floor(1e3 * v + 1e-6) / 1e3);

  const WATCH = {
    figure1(root, { looks, digits, figure1: data }) {
      const nets = Object.fromEntries(["RT", "SD", "FD"].map((name) => [name, network(digits.networks[name])]));
      const [x, across, along] = [data.x, data.across, data.along].map(floats), side = 41;
      const at = (a, b) => Array.from(x, (v, i) => v + data.eps * (a * across[i] + b * along[i]));
      const colours = { teacher: looks.colours.RT, SD: looks.colours.SD, FD: looks.colours.FD };
      const row = make(root, "div", { class: "watch-row" });
      const maps = ["SD", "FD"].map((name) => {
        const box = make(row, "figure"), area = make(box, "div", { class: "area", tabindex: 0, role: "application",
          "aria-label": `Square of inputs around the image; colour: how far ${name} is from its teacher. Arrow keys move x′.` });
        make(box, "figcaption", { style: `color:${looks.colours[name]}` }, `student ${name}`);
        const tick = (k) => (2 * k) / (side - 1) - 1;
        paint(make(area, "canvas"), side, (i, j) => heat(gap(nets.RT.says(at(tick(i), -tick(j))), nets[name].says(at(tick(i), -tick(j))))));
        for (const [point, [a, b]] of Object.entries(data.where)) {
          make(area, "span", { class: "mark", style: `left:${50 + 50 * a}%;top:${50 - 50 * b}%` }, { x: "x", x1: "x₁", x2: "x₂" }[point]);
        }
        const dot = make(area, "span", { class: "dot" });
        const drag = (event) => {
          const r = area.getBoundingClientRect();
          move((2 * (event.clientX - r.left)) / r.width - 1, 1 - (2 * (event.clientY - r.top)) / r.height);
        };
        area.addEventListener("pointerdown", (event) => { area.setPointerCapture(event.pointerId); drag(event); });
        area.addEventListener("pointermove", (event) => event.buttons && drag(event));
        area.addEventListener("keydown", (event) => {
          const [da, db] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] || [0, 0];
          if (da || db) { event.preventDefault(); event.stopPropagation(); move(where[0] + 0.05 * da, where[1] + 0.05 * db); }
        });
        return dot;
      });
      const shown = make(row, "div"), image = make(shown, "canvas", { role: "img", "aria-label": "the image x′", class: "image" });
      const set = bars(shown, digits.classes, colours);
      key(shown, colours);
      const says = make(root, "p", { "aria-live": "polite" });
      let where;
      function move(a, b) {
        where = [clamp(a, -1, 1), clamp(b, -1, 1)];
        const z = at(...where), f = ["RT", "SD", "FD"].map((name) => nets[name].says(z));
        maps.forEach((dot) => (dot.style.cssText = `left:${50 + 50 * where[0]}%;top:${50 - 50 * where[1]}%`));
        picture(image, z, digits);
        set(...f);
        const told = ["teacher", "SD", "FD"].map((name, k) => `${name} says ${digits.classes[best(f[k])]} (${f[k][best(f[k])].toFixed(2)})`);
        says.textContent = `${told.join(", ")}. Difference from the teacher: SD ${near(gap(f[0], f[1]))}, FD ${near(gap(f[0], f[2]))}.`;
      }
      move(...data.where.x1);
    },

    epsilon(root, { looks, digits, epsilon: data }) {
      const names = Object.keys(data.students), teacher = network(digits.networks.RT);
      const shades = { interval: "#c9a227", crown: looks.upper, "alpha-crown": "#7a2f10", joint: "#9c7bc0", bab: "#54278f" };
      let name = names[0];
      const row = make(root, "div", { class: "watch-row" }), left = make(row, "div"), right = make(row, "div");
      choice(left, "student", names, (k) => { name = names[k]; draw(); });
      const plot = make(left, "svg", { viewBox: "-28 -8 320 232", role: "img", "aria-label": "Both bounds on δ* against ε" });
      const slider = make(make(left, "label", {}, "ε "), "input", { type: "range", min: 0, max: data.radii.length - 1, value: 3 });
      slider.addEventListener("input", draw);
      key(left, { EmpLB: looks.lower, ...shades });
      const image = make(right, "canvas", { role: "img", "aria-label": "the witness x′", class: "image" });
      const set = bars(right, digits.classes, PAIR);
      key(right, PAIR);
      const says = make(root, "p", { "aria-live": "polite" });
      const place = (k, v) => `${(260 * k) / (data.radii.length - 1)},${200 - 200 * v}`;
      function draw() {
        const found = data.students[name], k = Number(slider.value), z = floats(found.witnesses[k]);
        plot.replaceChildren();
        for (const v of [0, 0.5, 1]) make(plot, "text", { x: -6, y: 204 - 200 * v, "text-anchor": "end" }, v);
        for (const e of [0, 0.1, 0.2, 0.3]) make(plot, "text", { x: (260 * e) / 0.3, y: 218, "text-anchor": "middle" }, e);
        const curve = (values, colour) => make(plot, "polyline", { points: values.map((v, i) => place(i, v)).join(" "), stroke: colour });
        for (const [rung, values] of Object.entries(found.upper)) curve(values, shades[rung]);
        curve(found.lower, looks.lower);
        const [at] = place(k, 0).split(",");
        make(plot, "line", { x1: at, x2: at, y1: 0, y2: 200 });
        picture(image, z, digits);
        const student = network(digits.networks[name]);
        set(teacher.says(z), student.says(z));
        root.style.setProperty("--student", looks.colours[name]);
        slider.setAttribute("aria-valuetext", `ε = ${data.radii[k]}`);
        const rungs = Object.entries(found.upper).map(([rung, values]) => `${rung} ${up(values[k])}`);
        says.textContent = `ε = ${data.radii[k]}: found ${down(found.lower[k])} ≤ δ*; proved δ* ≤ ${rungs.join(", ")}. Beside it the witness: the input at which the difference was found.`;
      }
      draw();
    },

    attacks(root, { looks, digits, attacks: data }) {
      const teacher = network(digits.networks.RT), images = data.images.map((text) => Array.from(floats(text)));
      let name = "SD", chosen = 0, at;
      const top = make(root, "div", { class: "watch-row" }), students = ["SD", "ARD", "RSLAD", "FD"];
      choice(top, "student", students, (k) => { name = students[k]; reset(); });
      choice(top, "image", images.map((_, k) => `${k + 1}: class ${data.labels[k]}`), (k) => { chosen = k; reset(); });
      const row = make(root, "div", { class: "watch-row" });
      const panels = Object.entries(LOSSES).map(([loss, [title, gradients]]) => {
        const box = make(row, "figure"), colour = looks.colours[loss] || looks.lower;
        make(box, "figcaption", { style: `color:${colour}` }, title);
        const image = make(box, "canvas", { role: "img", class: "image", "aria-label": `image moved by ${loss}` });
        const set = bars(box, digits.classes, PAIR);
        return { image, set, gradients, says: make(box, "p") };
      });
      key(root, PAIR);
      const count = make(buttons(root, { step, reset }), "span", { "aria-live": "polite" });
      function reset() { at = 0; panels.forEach((panel) => (panel.z = images[chosen])); root.style.setProperty("--student", looks.colours[name]); draw(); }
      function step() {
        if (at === data.steps) return false;
        const x = images[chosen], clean = teacher.says(x), student = network(digits.networks[name]);
        for (const panel of panels) { // where both agree entirely there is no slope: begin a little aside, as a random start does
          const from = at ? panel.z : x.map((v, i) => v + 0.2 * data.eps * Math.sin(37 * i + 1));
          panel.z = ascend(from, x, data.eps, data.size, teacher, student, panel.gradients, clean, data.labels[chosen]);
        }
        at++;
        draw();
        return at < data.steps;
      }
      function draw() {
        const student = network(digits.networks[name]);
        for (const { image, set, z, says } of panels) {
          const f = teacher.says(z), g = student.says(z);
          picture(image, z, digits);
          set(f, g);
          says.textContent = `teacher ${digits.classes[best(f)]}, student ${digits.classes[best(g)]}; difference ${near(gap(f, g))}`;
        }
        count.textContent = `step ${at} of ${data.steps}`;
      }
      reset();
    },

    ascent(root, { looks, drawn }) {
      const [teacher, student] = ["RT", "SD"].map((name) => network(drawn[name])), side = 81, total = 20, count = 12;
      const apart = (z) => gap(teacher.says(z), student.says(z)), tick = (k) => (2 * k) / (side - 1) - 1;
      const area = make(root, "div", { class: "area wide", role: "img", "aria-label": "Points climb the difference of two networks on a square, and stop at its edges and on its ridges" });
      paint(make(area, "canvas"), side, (i, j) => heat(2.5 * apart([tick(i), -tick(j)])));
      const plot = make(area, "svg", { viewBox: "-1 -1 2 2" });
      let at, paths, seed = 1;
      const random = () => { seed = (seed * 16807) % 2147483647; return (2 * seed) / 2147483647 - 1; };
      const says = make(buttons(root, { step, reset }), "span", { "aria-live": "polite" });
      function reset() { at = 0; paths = Array.from({ length: count }, () => [[random(), random()]]); draw(); }
      function step() {
        if (at === total) return false;
        for (const path of paths) path.push(ascend(path.at(-1), [0, 0], 1, 2.5 / total, teacher, student, LOSSES.gap[1]));
        at++;
        draw();
        return at < total;
      }
      function draw() {
        plot.replaceChildren();
        for (const path of paths) {
          make(plot, "polyline", { points: path.map(([a, b]) => `${a},${-b}`).join(" "), stroke: looks.lower });
          make(plot, "circle", { cx: path.at(-1)[0], cy: -path.at(-1)[1], r: 0.03, fill: looks.lower });
        }
        const found = paths.map((path) => Math.max(...path.map(apart)));
        says.textContent = `step ${at} of ${total}; best of ${count} starts ${near(Math.max(...found))}, worst ${near(Math.min(...found))}`;
      }
      reset();
    },

    parts(root, { looks, drawn, parts: data }) {
      const [teacher, student] = ["RT", "SD"].map((name) => network(drawn[name])), side = 81;
      const tick = (k) => (2 * k) / (side - 1) - 1, row = make(root, "div", { class: "watch-row" });
      const area = make(row, "div", { class: "area", role: "img", "aria-label": "The square, cut into parts, each with its bound" });
      paint(make(area, "canvas"), side, (i, j) => heat(2.5 * gap(teacher.says([tick(i), -tick(j)]), student.says([tick(i), -tick(j)]))));
      const plot = make(area, "svg", { viewBox: "-1 -1 2 2" }), chart = make(row, "svg", { viewBox: "-28 -8 320 232", role: "img", "aria-label": "Bounds against cuts" });
      let at = 0;
      const steps = { step: () => go(at + 1), back: () => go(at - 1), reset: () => go(0) };
      const says = make(root, "p", { "aria-live": "polite" });
      buttons(root, steps);
      key(root, { "largest bound of a part (proved)": looks.upper, "largest difference met": looks.lower });
      function leaves(count) {
        const open = new Set([0]);
        data.steps.slice(0, count).forEach(({ cut }, k) => { open.delete(cut); open.add(2 * k + 1); open.add(2 * k + 2); });
        return [...open];
      }
      const proved = data.steps.map((_, k) => Math.max(...leaves(k).map((i) => data.bounds[i])));
      proved.push(Math.max(...leaves(data.steps.length).map((i) => data.bounds[i])));
      function go(to) {
        at = clamp(to, 0, data.steps.length);
        plot.replaceChildren();
        const open = leaves(at), widest = open.reduce((a, b) => (data.bounds[a] >= data.bounds[b] ? a : b));
        for (const k of open) {
          const corners = data.polygons[k], middle = [0, 1].map((i) => corners.reduce((s, c) => s + c[i], 0) / corners.length);
          make(plot, "polygon", { points: corners.map(([a, b]) => `${a},${-b}`).join(" "), class: k === widest ? "next" : "" });
          if (open.length < 12) make(plot, "text", { x: middle[0], y: -middle[1] + 0.03, "text-anchor": "middle" }, (Math.ceil(100 * data.bounds[k] - 1e-6) / 100).toFixed(2));
        }
        chart.replaceChildren();
        for (const v of [0, 0.5, 1]) make(chart, "text", { x: -6, y: 204 - 200 * v, "text-anchor": "end" }, v);
        make(chart, "text", { x: 260, y: 218, "text-anchor": "end" }, "cuts");
        for (const [values, colour] of [[proved, looks.upper], [data.lowers, looks.lower]]) {
          const points = values.slice(0, at + 1).map((v, k) => `${(260 * k) / data.steps.length},${200 - 200 * v}`);
          make(chart, "polyline", { points: points.join(" "), stroke: colour });
          const [cx, cy] = points.at(-1).split(",");
          make(chart, "circle", { cx, cy, r: 4, fill: colour });
        }
        const next = at < data.steps.length ? ` The outlined part, whose bound is largest, is cut next: along ${data.steps[at].where}.` : "";
        says.textContent = `${open.length} part${at ? "s" : ""}: ${down(data.lowers[at])} ≤ δ* ≤ ${up(proved[at])}.${next}`;
        return at < data.steps.length;
      }
      go(0);
    },
  };

  for (const root of document.querySelectorAll(".watch:not([data-drawn])")) {
    const data = JSON.parse(root.querySelector("script").textContent);
    root.replaceChildren();
    root.dataset.drawn = "";
    root.style.setProperty("--teacher", data.looks.colours.RT);
    WATCH[root.dataset.watch](root, data);
  }
  window.faithkdWatch = { network, softmax };
})();
