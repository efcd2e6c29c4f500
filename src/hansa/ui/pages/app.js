// The pages of `hansa ui`. Whatever comes from runs is put in as text, never as markup; the one
// exception is plots, SVG that Hansa itself has drawn, which are parsed as SVG.
"use strict";

const EVERY = 1500; // milliseconds between looks at what is going on
const STATES = ["running", "stopped", "done", "unreadable"];
const main = document.getElementById("main");

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

async function ask(address) {
  const answer = await fetch(address, { headers: { Accept: "application/json" } });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error || answer.statusText);
  return told;
}

// Calls `show` with what an address tells, and again whenever that has changed. Where the server is
// gone, what is shown stays, and a line says so.
function follow(address, show) {
  const line = el("p", { role: "status", class: "note" }, "Loading.");
  document.querySelector("header").after(line);
  let last = "";
  async function look() {
    try {
      const told = await ask(address);
      const text = JSON.stringify(told);
      if (text !== last) show(told);
      last = text;
      if (line.textContent) line.textContent = "";
    } catch (error) {
      const gone = error instanceof TypeError;
      line.textContent = gone ? "The server does not answer; trying again." : error.message;
      if (!gone && !last) main.replaceChildren(el("h1", {}, "Nothing to show"));
    }
    setTimeout(look, document.hidden ? 4 * EVERY : EVERY);
  }
  look();
}

const pathOf = (run) => "/run?path=" + encodeURIComponent(run.path);
const addressOf = (path) => "/report/" + path.split("/").map(encodeURIComponent).join("/");
const progressOf = (run) => (run.done === null ? "" : `${run.done} of ${run.total}`);

function bytesOf(run) {
  if (run.bytes === null) return "";
  let number = run.bytes;
  for (const unit of ["B", "kB", "MB"]) {
    if (number < 1000) return `${unit === "B" ? number : number.toFixed(2)} ${unit}`;
    number /= 1000;
  }
  return `${number.toFixed(2)} GB`;
}

function whenOf(run) {
  const at = new Date(run.changed * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

const stateOf = (run) => el("span", { class: "state", "data-state": run.state }, run.state);

function tableOf(table) {
  const head = table.columns.map((name) => el("th", { scope: "col" }, name));
  const rows = table.rows.map((row, number) => {
    const path = table.paths ? table.paths[number] : "";
    const first = path ? el("a", { href: pathOf({ path }) }, row[0]) : row[0];
    const cells = row.slice(1).map((cell) => el("td", {}, cell));
    return el("tr", {}, el("th", { scope: "row" }, first), ...cells);
  });
  return [
    el("h2", {}, table.title),
    el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": table.title },
      el("table", { class: table.paths ? "words" : null }, el("caption", {}, table.title),
        el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))),
  ];
}

function plotOf(plot, number) {
  const parsed = new DOMParser().parseFromString(plot.svg, "image/svg+xml").documentElement;
  const svg = document.importNode(parsed, true);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${plot.title}. ${plot.caption}`);
  const id = `plot-${number}`;
  return el("figure", { "aria-labelledby": id }, el("h2", { id }, plot.title),
    el("div", { class: "wide", tabindex: 0, role: "group", "aria-labelledby": id }, svg),
    el("figcaption", {}, plot.caption));
}

// Replaces what is below the heading, and leaves keyboard and reader where they were.
function showParts(place, parts) {
  const held = [...place.querySelectorAll(".wide")].map((each) => each.scrollLeft);
  const open = place.querySelector("details")?.open;
  const links = "a, summary, .wide, pre";
  const focus = [...place.querySelectorAll(links)].indexOf(document.activeElement);
  place.replaceChildren(...parts);
  place.querySelectorAll(".wide").forEach((each, k) => (each.scrollLeft = held[k] || 0));
  if (open) place.querySelector("details").open = true;
  if (focus >= 0) place.querySelectorAll(links)[focus]?.focus({ preventScroll: true });
}

// --- one run ---

function showRun(path) {
  const place = el("div");
  follow("/api/run?path=" + encodeURIComponent(path), (told) => {
    const run = told.run;
    document.title = `${run.name}: ${run.state}, Hansa`;
    if (!place.isConnected) main.replaceChildren(el("h1", {}, run.name), place);
    const facts = [["kind", run.kind], ["method", run.method], ["state", stateOf(run)]];
    facts.push(["result", run.result], ["messages", bytesOf(run)], ["changed", whenOf(run)]);
    if (run.within) facts.push(["stage of", el("a", { href: pathOf({ path: run.within }) }, run.within)]);
    const list = facts.filter(([, value]) => value !== "");
    const unit = run.kind === "pipeline" ? "stages" : "rounds";
    const label = `${progressOf(run)} ${unit}`;
    place.dataset.done = run.done ?? "";
    showParts(place, [
      el("dl", {}, ...list.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      run.done === null ? "" : el("p", {}, el("progress", { max: run.total || 1, value: run.done, "aria-label": label }),
        el("br"), label),
      run.report ? el("p", {}, el("a", { href: addressOf(run.report) }, "Report page")) : "",
      run.kind === "train" && !run.report
        ? el("p", { class: "note" }, `A report page is made by: hansa report FOLDER/${run.path}`) : "",
      told.problem ? el("p", { class: "problem" }, told.problem) : "",
      ...told.tables.flatMap(tableOf),
      ...told.plots.map(plotOf),
      told.config ? el("details", {}, el("summary", {}, "Configuration"), el("pre", { tabindex: 0 }, told.config)) : "",
    ].filter((part) => part !== ""));
  });
}

// --- several runs ---

function showComparison(query) {
  const place = el("div");
  follow("/api/compare?" + query, (told) => {
    document.title = `${told.runs.length} runs compared, Hansa`;
    if (!place.isConnected) main.replaceChildren(el("h1", {}, `${told.runs.length} runs compared`), place);
    const runs = told.runs.map((run) =>
      el("li", {}, el("a", { href: pathOf(run) }, run.path), " ", stateOf(run)));
    showParts(place, [el("ul", {}, ...runs), ...told.plots.map(plotOf), ...told.tables.flatMap(tableOf)]);
  });
}

// --- the list ---

const COLUMNS = [
  ["name", (run) => run.name],
  ["kind", (run) => run.kind],
  ["method", (run) => run.method],
  ["state", (run) => STATES.indexOf(run.state)],
  ["done", (run) => run.done ?? -1],
  ["result", (run) => run.result],
  ["messages", (run) => run.bytes ?? -1],
  ["changed", (run) => run.changed],
];

function showList() {
  const search = new URLSearchParams(location.search);
  const chosen = new Set();
  let runs = [];
  let order = { column: "changed", down: true };
  const text = el("input", { type: "search", name: "text", value: search.get("text") || "", oninput: draw });
  const selects = {};
  for (const key of ["kind", "state", "method"]) selects[key] = el("select", { name: key, onchange: draw });
  const stages = el("input", { type: "checkbox", name: "stages", checked: search.has("stages"), onchange: draw });
  const count = el("p", { role: "status" });
  const compare = el("button", { type: "submit", disabled: true }, "Compare");
  const heads = COLUMNS.map(([name]) => el("th", { scope: "col" },
    el("button", { type: "button", onclick: () => sort(name) }, name)));
  const body = el("tbody");
  const table = el("table", { class: "list", role: "table" }, el("caption", {}, "Runs and pipelines"),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, el("th", { scope: "col" }, "compare"), ...heads)), body);
  body.setAttribute("role", "rowgroup");
  const filters = el("div", { class: "filters", role: "search" },
    el("label", {}, "Search", text),
    ...Object.entries(selects).map(([key, select]) => el("label", {}, key[0].toUpperCase() + key.slice(1), select)),
    el("label", { class: "box" }, stages, "Stages of pipelines"));
  const form = el("form", { action: "/compare", method: "get" }, el("p", {}, compare), table);

  function sort(column) {
    const first = column === "changed" || column === "messages" || column === "done";
    order = { column, down: order.column === column ? !order.down : first };
    draw();
  }

  function options(key) {
    const select = selects[key];
    const wanted = select.value || (select.options.length ? "" : search.get(key) || "");
    const found = [...new Set(runs.map((run) => run[key]).filter(Boolean))].sort();
    if (wanted && !found.includes(wanted)) found.push(wanted);
    const names = ["", ...found];
    if (names.join("\n") === [...select.options].map((each) => each.value).join("\n")) return;
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name || "all")));
    select.value = wanted;
  }

  function fits(run) {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const held = `${run.path} ${run.kind} ${run.method} ${run.state} ${run.result}`.toLowerCase();
    return (stages.checked || !run.within) && words.every((word) => held.includes(word))
      && Object.entries(selects).every(([key, select]) => !select.value || run[key] === select.value);
  }

  function choose(event) {
    const box = event.target;
    if (box.checked) chosen.add(box.value);
    else chosen.delete(box.value);
    count_();
  }

  function count_() {
    compare.disabled = chosen.size < 2;
    compare.textContent = chosen.size ? `Compare ${chosen.size} runs` : "Compare";
    compare.title = chosen.size < 2 ? "Choose two training runs or more" : "";
  }

  function row(run) {
    const box = run.kind === "train"
      ? el("input", { type: "checkbox", name: "run", value: run.path, checked: chosen.has(run.path),
        "aria-label": `compare ${run.path}`, onchange: choose }) : "";
    const where = run.path === run.name ? ""
      : el("small", {}, el("br"), "in ", run.path.slice(0, -run.name.length - 1));
    const cells = [
      ["kind", run.kind], ["method", run.method], ["", stateOf(run)],
      [run.kind === "pipeline" ? "stages" : "rounds", progressOf(run), "number"],
      ["result", run.result], ["messages", bytesOf(run), "number"], ["changed", whenOf(run), "number"],
    ];
    return el("tr", { role: "row", "data-path": run.path }, el("td", { role: "cell" }, box),
      el("th", { scope: "row", role: "rowheader" }, el("a", { href: pathOf(run) }, run.name), where),
      ...cells.map(([name, value, kind]) =>
        el("td", { role: "cell", class: kind || null, "data-name": name || null }, value)));
  }

  function draw() {
    ["kind", "state", "method"].forEach(options);
    const at = COLUMNS.find(([name]) => name === order.column)[1];
    const way = order.down ? -1 : 1;
    const shown = runs.filter(fits).sort((a, b) => {
      const [x, y] = [at(a), at(b)];
      return x === y ? a.path.localeCompare(b.path) : way * (x < y ? -1 : 1);
    });
    heads.forEach((head, k) => {
      if (COLUMNS[k][0] !== order.column) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    });
    const held = new Map([...body.rows].map((each) => [each.dataset.path, each]));
    const focus = document.activeElement;
    const kept = focus && body.contains(focus) ? [focus.closest("tr").dataset.path, focus.tagName] : null;
    const rows = shown.map((run) => {
      const text_ = JSON.stringify(run);
      const old = held.get(run.path);
      if (old && old.told === text_) return old;
      const made = row(run);
      made.told = text_;
      return made;
    });
    if (rows.length !== body.rows.length || rows.some((each, k) => each !== body.rows[k])) {
      body.replaceChildren(...rows);
      if (kept) body.querySelector(`tr[data-path="${CSS.escape(kept[0])}"] ${kept[1]}`)?.focus();
    }
    const all = `${shown.length} of ${runs.length} shown`;
    if (count.textContent !== all) count.textContent = all;
    count_();
    const query = new URLSearchParams();
    if (text.value) query.set("text", text.value);
    for (const [key, select] of Object.entries(selects)) if (select.value) query.set(key, select.value);
    if (stages.checked) query.set("stages", "1");
    history.replaceState(null, "", query.size ? `/?${query}` : "/");
  }

  follow("/api/runs", (told) => {
    runs = told.runs;
    document.title = `${told.folder}: runs, Hansa`;
    if (!form.isConnected) main.replaceChildren(el("h1", {}, `Runs in ${told.folder}`), filters, count, form);
    draw();
  });
}

const search = new URLSearchParams(location.search);
if (location.pathname === "/run") showRun(search.get("path") || "");
else if (location.pathname === "/compare") showComparison(search.getAll("run").map((path) => "run=" + encodeURIComponent(path)).join("&"));
else showList();
