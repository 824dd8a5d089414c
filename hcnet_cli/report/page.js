"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// --- light and dark: the system's choice until the button is used
{
  const root = document.documentElement, button = $("#theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = (value) => {
    try { return value === undefined ? localStorage.getItem("hcnet-theme") : localStorage.setItem("hcnet-theme", value); }
    catch { return null; } // storage may be switched off
  };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  if (remembered()) root.dataset.theme = remembered();
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remembered(root.dataset.theme); name(); });
  system.addEventListener("change", name);
  name();
}

// --- tables: click a heading to sort (numbers from the highest), again to turn round, again for the first order
for (const table of $$("main table")) {
  const body = table.tBodies[0], first = [...body.rows], heads = $$("thead th", table);
  heads.forEach((head, index) => $("button", head).addEventListener("click", () => {
    const numeric = head.classList.contains("number"), before = head.getAttribute("aria-sort");
    const turns = numeric ? [null, "descending", "ascending"] : [null, "ascending", "descending"];
    const now = turns[(turns.indexOf(before) + 1) % 3];
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (now) head.setAttribute("aria-sort", now);
    const value = (row) => row.cells[index].dataset.v, sign = now === "descending" ? -1 : 1;
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stays below
      return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
    };
    body.append(...(now ? [...first].sort(compare) : first));
  }));
}
for (const button of $$("button.columns")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.closest("section").classList.toggle("all-columns"));
  });
}

// --- runs: a link opens its run; the field finds by name
const open = () => {
  const target = location.hash.startsWith("#run-") && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") { target.hidden = false; target.open = true; target.scrollIntoView({ block: "start" }); }
};
addEventListener("hashchange", open);
open();
$("#run-find")?.addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/);
  for (const run of $$("#run-list > details")) {
    const text = $("summary", run).textContent.toLowerCase();
    run.hidden = !words.every((word) => text.includes(word));
  }
});

// --- pictures
for (const button of $$(".picture")) {
  button.addEventListener("click", () => {
    const image = $("img", button), large = $("#zoom img");
    large.src = image.src;
    large.alt = image.alt;
    $("#zoom").showModal();
  });
}

// --- training curves
if ($("#charts")) {
  const runs = JSON.parse($("#curve-data").textContent);
  const charts = $("#charts"), list = $("#curve-runs"), choice = $("#curve-group"), find = $("#curve-find");
  const COLORS = 8, chosen = new Map(); // run -> colour number
  const element = (name, attributes = {}, ...children) => {
    const svg = ["svg", "path", "text", "line", "g", "circle"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const color = (run) => `var(--c${chosen.get(run) % COLORS})`;
  const show = (value) => Math.abs(value) >= 1e-3 || value === 0 ? String(+value.toPrecision(4)) : (+value.toPrecision(3)).toExponential();
  const ticks = (low, high, count) => {
    const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough), all = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + step * 1e-9; i++) all.push(i * step);
    return all;
  };
  const short = (step) => step >= 1e6 ? `${+(step / 1e6).toPrecision(3)}M` : step >= 1e4 ? `${+(step / 1e3).toPrecision(3)}k` : String(step);

  const draw = () => {
    const shown = [...chosen.keys()];
    const kinds = [["loss", "Training loss"], ["metric", `Validation ${shown[0]?.primary ?? "metric"} (%)`], ["lr", "Learning rate"]];
    charts.replaceChildren(...kinds.map(([key, title]) => chart(key, title, shown.filter((run) => run[key].length))));
  };
  const chart = (key, title, shown) => {
    const readout = element("span", { class: "readout" });
    const figure = element("figure", {}, element("figcaption", {}, element("span", {}, title), readout));
    if (!shown.length) { figure.append(element("p", { class: "muted" }, "Nothing chosen has this curve.")); return figure; }
    const width = Math.max(280, charts.clientWidth - 34), height = key === "lr" ? 184 : 264;
    const left = 52, right = width - 12, top = 8, bottom = height - 40;
    const all = shown.flatMap((run) => run[key]), values = all.map((p) => p[1]).sort((a, b) => a - b);
    const last = Math.max(1, ...all.map((p) => p[0]));
    // a metric's first, far values would flatten all the rest: the axis begins at the 5 % point of what was measured
    let low = key === "lr" ? 0 : key === "metric" ? values[Math.floor(values.length * 0.05)] : values[0], high = values.at(-1);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    high += room;
    if (key !== "lr") low -= room;
    const x = (step) => left + step / last * (right - left), y = (value) => bottom - (value - low) / (high - low) * (bottom - top);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title} of ${shown.length} runs over ${last} steps` });
    const clip = `clip-${key}`;
    svg.innerHTML = `<clipPath id="${clip}"><rect x="${left}" y="${top}" width="${right - left}" height="${bottom - top}"/></clipPath>`;
    const marks = ticks(low, high, 5), small = Math.max(...marks.map(Math.abs)) < 0.01;
    const tickText = (value) => small && value !== 0 ? (+value.toPrecision(3)).toExponential() : String(+value.toPrecision(4));
    for (const tick of marks) {
      svg.append(element("path", { class: "grid", d: `M${left} ${y(tick)}H${right}` }), element("text", { class: "tick", x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)));
    }
    for (const tick of ticks(0, last, width > 500 ? 8 : 4)) {
      svg.append(element("text", { class: "tick", x: x(tick), y: height - 22, "text-anchor": tick / last > 0.97 ? "end" : "middle" }, short(tick)));
    }
    svg.append(element("text", { class: "tick", x: (left + right) / 2, y: height - 2, "text-anchor": "middle" }, "step"));
    const group = element("g", { "clip-path": `url(#${clip})` });
    for (const run of shown) {
      const path = run[key].map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
      if (run[key].length === 1) { // a line through one point is not seen
        group.append(element("circle", { cx: x(run[key][0][0]), cy: y(run[key][0][1]), r: 3.5, style: `fill:${color(run)}` }));
      }
      const dash = chosen.get(run) >= COLORS ? { "stroke-dasharray": "5 3" } : {};
      group.append(element("path", { class: "curve", d: `M${path}`, style: `stroke:${color(run)}`, ...dash }));
    }
    const cursor = element("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    svg.append(group, cursor);
    const point = (event) => {
      const box = svg.getBoundingClientRect(), step = Math.max(0, Math.min(last, ((event.clientX - box.left) * width / box.width - left) / (right - left) * last));
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
      cursor.setAttribute("visibility", "visible");
      const near = (run) => run[key].reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      readout.replaceChildren(`step ${Math.round(step).toLocaleString("en")}: `, ...shown.slice(0, 4).flatMap((run, i) => {
        const value = element("b", { style: `color:${color(run)}` }, show(near(run)[1]));
        return i ? [", ", value] : [value];
      }), shown.length > 4 ? " …" : "");
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.replaceChildren(); });
    figure.append(svg);
    return figure;
  };
  const choose = (run, yes, box) => {
    if (yes) {
      const used = new Set(chosen.values());
      let number = 0;
      while (used.has(number)) number++;
      chosen.set(run, number);
      box.style.setProperty("--swatch", color(run));
    } else {
      chosen.delete(run);
      box.style.removeProperty("--swatch");
    }
  };
  const fill = () => {
    chosen.clear();
    const members = groups.get(choice.value);
    list.replaceChildren(...members.map((run, index) => {
      const input = element("input", { type: "checkbox" });
      const box = element("label", { title: run.label }, input, element("span", { class: "swatch" }), element("span", {}, run.label));
      if (index < 6) { input.checked = true; choose(run, true, box); }
      input.addEventListener("change", () => { choose(run, input.checked, box); draw(); });
      return box;
    }));
    find.value = "";
    draw();
  };
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/);
    for (const box of list.children) box.hidden = !words.every((word) => box.textContent.toLowerCase().includes(word));
  });
  $(".picker").addEventListener("submit", (event) => event.preventDefault());
  const groups = Map.groupBy(runs, (run) => run.group);
  // first what is trained now, then the data and metric that most was trained for: trials of a few steps come last
  const weight = (group) => Math.max(...groups.get(group).map((run) => run.images)) + (groups.get(group).some((run) => run.running) ? 1e15 : 0);
  const byNumber = [...groups.keys()].sort((a, b) => weight(b) - weight(a));
  choice.append(...byNumber.map((group) => element("option", { value: group }, `${group} (${groups.get(group).length})`)));
  choice.addEventListener("change", fill);
  let seen = 0;
  new ResizeObserver(() => { if (charts.clientWidth !== seen) { seen = charts.clientWidth; draw(); } }).observe(charts);
  if (runs.length) fill(); else $("#curves").hidden = true;
}
