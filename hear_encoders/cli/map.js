"use strict";
// The page's data, written by hear_encoders/cli/map.py.
// title, method, folders; and lists, in which a sound is known by its row:
// names, folder (row in folders), x, y, neighbors, similarity, audio (URL or null), steps (or null).
const data = JSON.parse(document.getElementById("data").textContent);
const MOST_RESULTS = 50;
const SYMBOLS = [["circle", "●"], ["square", "■"], ["diamond", "◆"], ["triangle-up", "▲"], ["cross", "✚"]];
const COLORS = 10;

const byId = (id) => document.getElementById(id);
const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const map = byId("map"), matrix = byId("matrix"), audio = byId("audio"), search = byId("search");
const rowsOfFolder = data.folders.map(() => []);
data.folder.forEach((folder, row) => rowsOfFolder[folder].push(row));
const pickedFolders = new Set();
let chosen = null;
let shown = null; // rows that the search and the picked folders leave; null: all

// ---- small parts ----

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Plotly reads a few HTML tags in its texts: a name is not to be read as one.
function plotlyText(text) {
  const cut = text.length > 60 ? `${text.slice(0, 25)}…${text.slice(-34)}` : text;
  return cut.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// A name that may break after punctuation.
function breakable(name, tag = "span") {
  return element(tag, {}, ...name.split(/(?<=[_\-/ ])/).flatMap((part) => [part, element("wbr")]));
}

const fileName = (row) => data.names[row].slice(data.names[row].lastIndexOf("/") + 1);
const folderName = (row) => data.names[row].slice(0, data.names[row].lastIndexOf("/") + 1);
const colorName = (folder) => `c${folder % COLORS}`;
const symbol = (folder) => SYMBOLS[Math.floor(folder / COLORS) % SYMBOLS.length];

function sign(folder) {
  const made = element("span", { className: "sign" }, symbol(folder)[1]);
  made.setAttribute("aria-hidden", "true");
  made.style.setProperty("--c", `var(--${colorName(folder)})`);
  return made;
}

function link(row, ...children) {
  const made = element("a", { href: `#${row}`, title: data.names[row] }, ...children);
  made.addEventListener("click", (event) => {
    event.preventDefault();
    go(row);
  });
  return made;
}

// ---- the map ----

const markerSize = data.names.length > 2000 ? 6 : 9; // pixels

function mapTraces() {
  return data.folders.map((name, folder) => {
    const rows = rowsOfFolder[folder];
    return {
      type: "scatter", mode: "markers", name: plotlyText(name), customdata: rows,
      x: rows.map((row) => data.x[row]), y: rows.map((row) => data.y[row]),
      text: rows.map((row) => `<b>${plotlyText(fileName(row))}</b><br>${plotlyText(folderName(row))}`),
      hoverinfo: "text",
      marker: {
        color: cssColor(colorName(folder)), symbol: symbol(folder)[0], size: markerSize,
        line: { color: cssColor("card"), width: 1 },
        opacity: rows.map((row) => (shown === null || shown.has(row) ? 0.9 : 0.12)),
      },
    };
  });
}

// Rings around the chosen sound and its neighbors. As shapes, they change without drawing all points again.
function rings() {
  if (chosen === null) return [];
  const ring = (row, radius, width) => ({
    type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: data.x[row], yanchor: data.y[row],
    x0: -radius, x1: radius, y0: -radius, y1: radius, line: { color: cssColor("ink"), width },
  });
  return [...data.neighbors[chosen].map((row) => ring(row, markerSize / 2 + 3, 1.2)), ring(chosen, markerSize / 2 + 6, 3)];
}

function mapLayout() {
  const axis = { visible: false, zeroline: false };
  return {
    xaxis: { ...axis }, yaxis: { ...axis, scaleanchor: "x" }, showlegend: false, dragmode: "pan", hovermode: "closest",
    margin: { l: 8, r: 8, t: 8, b: 8 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent", uirevision: "map",
    hoverlabel: {
      bgcolor: cssColor("page"), bordercolor: cssColor("soft"), font: { color: cssColor("ink") }, align: "left",
    },
    shapes: rings(),
    modebar: { bgcolor: "transparent", color: cssColor("soft"), activecolor: cssColor("ink") },
  };
}

function drawMap() {
  const buttons = [["zoomIn2d", "zoomOut2d", "resetScale2d"]];
  return Plotly.react(map, mapTraces(), mapLayout(), {
    displaylogo: false, displayModeBar: true, modeBarButtons: buttons, responsive: true, scrollZoom: true,
  });
}

// Mark the chosen sound. If it is outside of the map, move the map.
function showChosen() {
  const update = { shapes: rings() };
  for (const [axis, value] of [["xaxis", data.x[chosen]], ["yaxis", data.y[chosen]]]) {
    const [low, high] = map.layout[axis].range;
    if (value < low || value > high) update[`${axis}.range`] = [value - (high - low) / 2, value + (high - low) / 2];
  }
  Plotly.relayout(map, update);
}

// ---- search and folders ----

function applyFilter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (row) =>
    (!pickedFolders.size || pickedFolders.has(data.folder[row])) &&
    words.every((word) => data.names[row].toLowerCase().includes(word));
  const rows = data.names.map((_, row) => row).filter(matches);
  shown = words.length || pickedFolders.size ? new Set(rows) : null;
  const results = rows.slice(0, shown === null ? 0 : MOST_RESULTS);
  const item = (row) => element("li", {}, link(row, sign(data.folder[row]), breakable(data.names[row])));
  byId("results").replaceChildren(...results.map(item));
  byId("results").hidden = !results.length;
  byId("found").hidden = shown === null;
  const more = rows.length > results.length ? `; the first ${results.length}:` : "";
  byId("found").textContent = rows.length ? `${rows.length} of ${data.names.length} sounds${more}` : "No such sound";
  drawMap();
}

function addFolders() {
  if (data.folders.length < 2) return;
  data.folders.forEach((name, folder) => {
    const count = element("small", {}, ` ${rowsOfFolder[folder].length}`);
    const button = element("button", { type: "button" }, sign(folder), ` ${name}`, count);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      if (!pickedFolders.delete(folder)) pickedFolders.add(folder);
      button.setAttribute("aria-pressed", String(pickedFolders.has(folder)));
      applyFilter();
    });
    byId("folders").append(element("li", {}, button));
  });
}

// ---- the chosen sound ----

// Choose a sound as a click does. The address keeps it, so that the browser's Back leads to the one before.
function go(row) {
  if (location.hash === `#${row}`) choose(row);
  else location.hash = `#${row}`; // calls `chooseFromAddress`
}

function chooseFromAddress() {
  const row = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1;
  if (row >= 0 && row < data.names.length) choose(row);
}

function choose(row) {
  chosen = row;
  byId("hint").hidden = true;
  byId("chosen").hidden = false;
  byId("name").replaceChildren(sign(data.folder[row]), " ", breakable(fileName(row)));
  byId("folder").textContent = folderName(row);
  const item = (other, place) => neighbor(other, data.similarity[row][place]);
  byId("neighbors").replaceChildren(...data.neighbors[row].map(item));
  showChosen();
  drawMatrix();
  play(0);
}

function neighbor(row, similarity) {
  const part = element("i");
  part.style.width = `${100 * Math.max(similarity, 0)}%`;
  part.style.setProperty("--c", `var(--${colorName(data.folder[row])})`);
  const bar = element("span", { className: "bar" }, similarity.toFixed(2), element("b", {}, part));
  const name = breakable(fileName(row));
  if (folderName(row)) name.append(element("br"), breakable(folderName(row), "small"));
  return element("li", {}, link(row, sign(data.folder[row]), name, bar));
}

function play(seconds) {
  const url = data.audio[chosen];
  audio.hidden = url === null;
  showProblem(url === null ? "The audio file was not found when this page was made." : "");
  if (url === null) {
    audio.removeAttribute("src");
    audio.load();
    return;
  }
  if (audio.getAttribute("src") !== url) audio.src = url;
  audio.currentTime = seconds;
  audio.play().catch(() => {}); // not allowed before the first click; errors come as an event
}

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function explainAudioError() {
  if (data.audio[chosen] === null) return; // of the sound before
  const embedded = data.audio[chosen].startsWith("data:");
  showProblem(
    embedded ? "This browser cannot play the sound."
      : "This browser cannot play the file, or it is no longer there. hear-map --embed-audio puts audio that plays " +
        "everywhere into the page."
  );
}

// ---- similarity over time ----

// Rows r >= c of a symmetric matrix as bytes: 0 is a cosine of -1, 255 one of 1.
function fullMatrix(steps) {
  const bytes = Uint8Array.from(atob(steps.lower), (character) => character.charCodeAt(0));
  const full = Array.from({ length: steps.rows }, () => new Array(steps.rows));
  let place = 0;
  for (let row = 0; row < steps.rows; row++) {
    for (let column = 0; column <= row; column++) {
      full[row][column] = full[column][row] = bytes[place++] / 127.5 - 1;
    }
  }
  return full;
}

function drawMatrix() {
  const steps = data.steps && data.steps[chosen];
  byId("over-time").hidden = !steps;
  if (!steps) return;
  const axis = {
    range: [0, steps.rows * steps.row_s], constrain: "domain", color: cssColor("soft"), ticks: "outside", ticksuffix: " s",
    showgrid: false, zeroline: false, fixedrange: true, nticks: 6,
  };
  const trace = {
    type: "heatmap", z: fullMatrix(steps), x0: steps.row_s / 2, dx: steps.row_s, y0: steps.row_s / 2, dy: steps.row_s,
    zmax: 1, colorscale: "Viridis",
    colorbar: { thickness: 10, tickfont: { color: cssColor("soft") }, outlinewidth: 0, len: 0.9 },
    hovertemplate: "%{x:.2f} s and %{y:.2f} s<br>similarity %{z:.2f}<extra></extra>",
  };
  const layout = {
    xaxis: axis, yaxis: { ...axis, scaleanchor: "x", autorange: false, range: [...axis.range].reverse() },
    margin: { l: 40, r: 0, t: 10, b: 26 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent", shapes: [playhead()],
  };
  Plotly.react(matrix, [trace], layout, { displayModeBar: false, responsive: true }).then(() => {
    matrix.removeAllListeners("plotly_click");
    matrix.on("plotly_click", (event) => play(event.points[0].x));
  });
}

function playhead() {
  const x = audio.currentTime, end = data.steps[chosen].rows * data.steps[chosen].row_s;
  return { type: "line", x0: x, x1: x, y0: 0, y1: end, line: { color: "#fff", width: 1.5 } };
}

function movePlayhead() {
  if (data.steps && data.steps[chosen] && matrix.layout) Plotly.relayout(matrix, { shapes: [playhead()] });
}

// ---- start ----

document.title = byId("title").textContent = `Map of ${data.title}`;
byId("summary").textContent = `${data.names.length} sounds, placed by ${data.method}. Sounds that lie close together are ` +
  "similar; the distances between groups, and empty space, mean little.";
addFolders();
drawMap().then(() => {
  map.on("plotly_click", (event) => go(event.points[0].customdata));
  chooseFromAddress();
});
let waiting;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(applyFilter, 150); // not at each key: thousands of points take a while
});
search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  clearTimeout(waiting);
  applyFilter();
  const first = byId("results").querySelector("a");
  if (first) first.click();
});
audio.addEventListener("error", explainAudioError);
audio.addEventListener("timeupdate", movePlayhead);
window.addEventListener("hashchange", chooseFromAddress);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawMap();
  if (chosen !== null) drawMatrix();
});
