"use strict";
const $ = (id) => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);
const given = $("reading") && JSON.parse($("reading").textContent);
const token = new URLSearchParams(location.search).get("token");
const [CELL, ROW, HEAD, BARS, LEVELS, LONGEST] = [24, 26, 46, 12, 8, 20_000]; // the last: branches in the address
const [SANS, MONO] = ["system-ui, 'DejaVu Sans', sans-serif", "ui-monospace, 'DejaVu Sans Mono', monospace"];
const narrow = matchMedia("(max-width: 760px)");
const text = $("text"), grid = $("grid"), phase = document.documentElement.dataset;

// Everything that is chosen. The address holds what differs from these; a control's id is its key here.
const DEFAULTS = {
  run: 0, checkpoint0: "", checkpoint1: "", text: "", start: -1, length: 2000,
  offset: 1, layer: 0, place: -1, pin: -1, all: false,
  colour: "bits", alayer: 1, head: 0, ulayer: 1, unit: 0,
  t: 1, k: 0, n: 200, seed: 0, drafts: false, tree: "", branch: 0,
};
const state = { ...DEFAULTS };
const empty = () => ({ read: "", known: 0, symbols: [], pieces: [], from: [], bits: [], decided: [], grid: {} });
let now = empty(); // the reading that is shown; `from` is where the character of each symbol begins in the text

// What is known of the models.
const model = () => facts.runs[state.run];
const named = (id) => (model().vocabulary.names[id] ?? "?").replace(/^ $/, "␣");
const layers = () => Array.from({ length: model().num_layers }, (_, below) => model().num_layers - below);
const has = (own) => model().heads.some(([at, offset]) => at === own && offset === state.offset);
const headed = () => layers().filter(has);
const offsets = () => [...new Set(model().heads.map(([, offset]) => offset))].sort((a, b) => a - b);
const silent = (own) => model().silent[`${own}/${state.offset}`];
const layer = () => (headed().includes(state.layer) ? state.layer : headed()[0]);
const size = () => now.symbols.length;
const seen = () => Math.min(place(), size() - 1);
const place = () => (state.place >= 0 && state.place < size() ? state.place : size());
const end = (symbol) => now.from[symbol] + now.pieces[symbol].length;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const percent = (p) => (Number.isFinite(p) ? `${(100 * p).toFixed(1)} %` : "");
const counted = (number) => Number(number).toLocaleString("en");
const sum = (values) => values.reduce((a, b) => a + b, 0);

function make(tag, properties, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

function button(words, press, properties) {
  const made = make("button", { type: "button", ...properties }, words);
  made.addEventListener("click", press);
  return made;
}

function rows(table, head, body) {
  table.tHead?.replaceChildren(make("tr", {}, ...head.map((one) => make("th", { scope: "col" }, one))));
  const row = ([first, ...cells]) => make("tr", {}, make("th", { scope: "row" }, first), ...cells);
  table.tBodies[0].replaceChildren(...body.map(row));
}

const cell = (words) => make("td", { className: "number" }, words);

function bar(...shares) {
  const strips = shares.map(() => make("div", {}));
  strips.forEach((strip, one) => (strip.style.width = `${100 * clamp(shares[one], 0, 1)}%`));
  return make("td", { className: "bar" }, ...strips);
}

// The address.
function address() {
  const [own, branches] = [state.start >= 0 || !facts.live ? "" : text.value, tree.length > 1 ? packed() : ""];
  const chosen = { ...state, text: own, tree: branches.length <= LONGEST ? branches : "", branch: current };
  const changed = Object.entries(chosen).filter(([key, value]) => value !== DEFAULTS[key]);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
}

function restore() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const [key, usual] of Object.entries(DEFAULTS)) {
    const value = wanted.get(key) ?? String(usual), number = key === "t" ? Number(value) : Math.trunc(Number(value));
    if (typeof usual === "number") state[key] = Number.isFinite(number) ? number : usual;
    else state[key] = typeof usual === "boolean" ? value === "true" : value;
  }
  state.run = facts.runs[state.run] ? state.run : 0;
  if (!offsets().includes(state.offset)) state.offset = offsets()[0];
  if (!COLOURS[state.colour]?.offered()) state.colour = "bits";
  controls();
  if (facts.live && state.start >= 0) stretch().catch(trouble);
  else begin(state.text);
}

// The server, one request at a time: a newer one ends the older.
let flight = new AbortController(), turn = 0, writing = 0, answers = {}, asked = {};

async function ask(name, body) {
  flight.abort();
  const { signal } = (flight = new AbortController());
  const headers = { "Content-Type": "application/json", "X-Token": token };
  const answer = await fetch(name, { method: "POST", headers, signal, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

function trouble(error) {
  if (error.name === "AbortError") return;
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  phase.state = "failed";
}

const checkpoint = (run) => state[`checkpoint${run}`] || null;
const base = () => ({ run: state.run, checkpoint: checkpoint(state.run), text: text.value });
const looksAt = (colour) => colour === state.colour && size() > 0;
// What else is asked, in this order, where it is wanted and the question is a new one.
const QUESTIONS = {
  distribution: () => ({ ...base(), layer: layer(), offset: state.offset, place: place() }),
  follow: () => state.pin >= 0 && { ...base(), symbol: state.pin, offset: state.offset },
  attention: () => looksAt("attention") && { ...base(), layer: state.alayer, head: state.head, place: seen() },
  unit: () => looksAt("unit") && { ...base(), layer: state.ulayer, unit: state.unit },
  ngrams: () => model().ngrams.length > 0 && place() < size() && { ...base(), place: place() },
  adapted: () => looksAt("adapted") && base(),
  compare: () => two() && size() > 0 && { text: text.value, checkpoints: [checkpoint(0), checkpoint(1)] },
};

const update = () => renew().catch(trouble);

async function renew() {
  const mine = ++turn;
  flight.abort();
  generating(false);
  clearTimeout(writing);
  writing = setTimeout(address, 250);
  branches();
  phase.state = "reading";
  if (facts.live) await readOn(mine);
  else fromPage();
  for (const [name, question] of facts.live ? Object.entries(QUESTIONS) : []) {
    const body = question() || null, key = JSON.stringify(body);
    if (mine !== turn) return;
    if (asked[name] === key) continue;
    const answer = body && (await (await ask(name, body)).json());
    if (mine !== turn) return;
    [answers[name], asked[name]] = [answer?.pieces ? perSymbol(answer) : answer, key];
  }
  $("problem").hidden = true;
  show();
  await new Promise(requestAnimationFrame);
  if (mine === turn) phase.state = "done";
}

// Reads only what follows the beginning that the text shares with the one read before: at once what is near, then more.
async function readOn(mine) {
  const { text: whole, ...which } = base(), what = JSON.stringify([which, state.offset]);
  if (now.what !== what) now = { ...empty(), what };
  else if (now.read === whole && now.total) return;
  const same = common(whole, now.read), changed = now.symbols.findIndex((_, symbol) => end(symbol) > same);
  cut(Math.min(changed < 0 ? size() : changed, now.known));
  asked = {};
  for (let most = 256, of = Infinity; size() < of; most = 4096) {
    const answer = await (await ask("read", { ...base(), offset: state.offset, since: size(), most })).json();
    if (mine !== turn) return;
    append(answer);
    [of, now.known, now.read] = [answer.of, size(), whole.slice(0, size() ? end(size() - 1) : 0)];
    if (size() === of || !now.total) now.total = answer.total;
    const last = state.offset === 1 && answer.next && now.grid[model().num_layers];
    if (last) for (const key in last) last[key].push(answer.next[key]); // what is expected after the text
    if (size() < of) [showText(), showGrid()];
    else show();
  }
}

// How many code units two texts begin with alike.
function common(one, other) {
  let same = 0;
  while (same < one.length && one[same] === other[same]) same += 1;
  return same;
}

function cut(count) {
  for (const key of ["symbols", "pieces", "from", "bits", "decided"]) now[key] = now[key].slice(0, count);
  for (const one of Object.values(now.grid)) for (const key in one) one[key] = one[key].slice(0, count);
}

function append(part) {
  cut(part.since);
  let at = size() ? end(size() - 1) : 0;
  for (const piece of part.pieces) {
    now.from.push(piece === "" ? now.from.at(-1) ?? 0 : at);
    at += piece.length;
  }
  for (const key of ["symbols", "pieces", "bits", "decided"]) now[key] = now[key].concat(part[key]);
  for (const [key, { symbol, probability }] of Object.entries(part.grid)) {
    const before = now.grid[key] ?? { symbol: [], probability: [] };
    now.grid[key] = { symbol: before.symbol.concat(symbol), probability: before.probability.concat(probability) };
  }
}

// A page for one text: all that it shows is in it.
function fromPage() {
  const pieces = given.pieces.map((piece) => piece.replace("\r", "␍"));
  const { grid, decided } = given.others[state.offset] ?? given;
  now = { ...empty(), total: given.total };
  append({ ...given, grid, decided, pieces, since: 0 });
  replaceText(pieces.join(""));
  now.read = text.value;
  const known = state.offset === 1 && layer() === headed()[0] && given.likeliest, row = now.grid[layer()], at = place();
  answers.distribution = known ? { symbols: known.symbols[at] ?? [], probabilities: known.probabilities[at] ?? [] }
    : row && { symbols: row.symbol.slice(at, at + 1), probabilities: row.probability.slice(at, at + 1) };
}

// Colours of the text: a value per symbol, of which `most` has the deepest shade.
function perSymbol({ pieces, bits }) {
  const costs = new Map();
  let offset = 0, begun = 0;
  pieces.forEach((piece, one) => {
    begun = piece === "" ? begun : offset;
    offset += piece.length;
    costs.set(begun, bits.map((own, run) => own[one] + (costs.get(begun)?.[run] ?? 0)));
  });
  const first = (symbol) => now.pieces[symbol] !== "" || symbol === 0;
  const own = bits.map((_, run) => now.from.map((from, symbol) => (first(symbol) ? costs.get(from)?.[run] ?? 0 : 0)));
  const sums = own.map(sum), means = sums.map((one) => (one / Math.max(1, costs.size)).toFixed(4));
  return { bits: own, sums, means, gap: own[0].map((cost, symbol) => own[1][symbol] - cost) };
}

const asBits = (value) => `${value.toFixed(2)} bits`, asIs = (value) => value.toPrecision(3);
const asChange = (value) => `${value < 0 ? "−" : "+"}${asBits(Math.abs(value))}`;
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0) || 1;
const live = () => facts.live, two = () => facts.live && facts.runs.length > 1;
const COLOURS = {
  bits: { title: "bits it cost", offered: () => true, values: () => now.bits, most: 8, words: asBits },
  attention: { title: "attention", offered: live, values: () => answers.attention?.weights, words: percent },
  unit: { title: "a unit's activation", offered: live, values: () => answers.unit?.values, words: asIs },
  adapted: { title: "change by learning", offered: live, values: () => answers.adapted?.gap, most: 4, words: asChange },
  difference: { title: "the runs' gap", offered: two, values: () => answers.compare?.gap, most: 4, words: asChange },
};

const tint = (level) => `${level > 0 ? "p" : "m"}${Math.abs(level)}`;

function shading() {
  const kind = COLOURS[state.colour], values = kind.values() ?? [], most = kind.most ?? largest(values);
  const level = (value) => clamp(Math.trunc((LEVELS * (value ?? 0)) / most), -LEVELS, LEVELS);
  return { ...kind, values, most, level, isSigned: [asChange, asIs].includes(kind.words) };
}

// The text box: the mirror behind it has the same lines, and colours for the part that is in view.
let drafts = [];

function replaceText(value) {
  if (text.value !== value) text.value = value;
  mirror();
}

function mirror() {
  if ($("mirror").textContent !== `${text.value}\n`) $("mirror").textContent = `${text.value}\n`;
}

function spanOf(from, to) {
  const node = $("mirror").firstChild, range = new Range();
  range.setStart(node, Math.min(from, node.length));
  range.setEnd(node, Math.min(to, node.length));
  return range;
}

// The first of `count` for which `isBefore` is false.
function search(count, isBefore) {
  let low = 0, high = count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isBefore(middle)) low = middle + 1;
    else high = middle;
  }
  return low;
}

const bottom = (offset) => spanOf(offset, offset + 1).getBoundingClientRect().bottom;
const symbolAt = (offset) => search(size(), (symbol) => end(symbol) <= offset);

function paint(shade = shading()) {
  mirror();
  CSS.highlights.forEach((mark) => mark.clear());
  const view = $("box").getBoundingClientRect(), count = text.value.length;
  const below = (y) => symbolAt(search(count, (offset) => bottom(offset) < y)), last = below(view.bottom + 40);
  for (let symbol = below(view.top), next; symbol <= last && symbol < size(); symbol = next) {
    let sum = shade.values[symbol] ?? 0;
    for (next = symbol + 1; now.pieces[next] === ""; next++) sum += shade.values[next] ?? 0;
    const level = shade.level(sum);
    if (level) mark(tint(level), now.from[symbol], end(symbol));
  }
  for (const { from, to, kind } of drafts) mark(kind, from, to);
  frame();
}

function mark(kind, from, to) {
  const { startContainer, startOffset, endContainer, endOffset } = spanOf(from, to);
  if (!CSS.highlights.has(kind)) CSS.highlights.set(kind, new Highlight());
  CSS.highlights.get(kind).add(new StaticRange({ startContainer, startOffset, endContainer, endOffset }));
}

function frame() {
  const at = place(), here = $("here"), paper = $("paper").getBoundingClientRect();
  const box = at < size() && spanOf(now.from[at], now.from[at] + (now.pieces[at].length || 1)).getClientRects()[0];
  here.hidden = !box;
  if (!box) return;
  const sides = [box.left - paper.left - 2, box.top - paper.top - 2, Math.max(box.width, 6) + 4, box.height + 4];
  [here.style.left, here.style.top, here.style.width, here.style.height] = sides.map((pixels) => `${pixels}px`);
}

// Figures on canvases.
function prepared(canvas, width, height) {
  const ratio = devicePixelRatio, style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  pen.scale(ratio, ratio);
  pen.textBaseline = "middle";
  return [pen, (name) => style.getPropertyValue(`--${name}`)];
}

function write(pen, words, x, y, room, size, family = SANS, weight = "normal") {
  pen.font = `${weight} ${size}px ${family}`;
  const natural = pen.measureText(words).width;
  if (natural > room) pen.font = `${weight} ${Math.max(7, (size * room) / natural)}px ${family}`;
  pen.fillText(words, x, y, room);
}

const label = () => (narrow.matches ? 36 : 104);
let seek = true; // the chosen cell is to come into view

function drawGrid(shade = shading()) {
  const all = layers(), known = headed(), height = HEAD + ROW * all.length, left = label();
  grid.style.height = `${Math.min(height + 16, 500)}px`;
  Object.assign($("room").style, { width: `${left + CELL * (size() + 1)}px`, height: `${height}px` });
  if (seek) inView();
  seek &&= !now.total || now.read !== text.value;
  const { clientWidth: width, clientHeight, scrollLeft, scrollTop } = grid;
  const [pen, colour] = prepared($("drawn"), width, Math.min(clientHeight, height));
  const x = (symbol) => left + CELL * symbol - scrollLeft, y = (row) => HEAD + ROW * row - scrollTop;
  const first = Math.floor(scrollLeft / CELL), last = Math.min(size(), Math.ceil((scrollLeft + width - left) / CELL));
  const across = Array.from({ length: Math.max(0, last - first + 1) }, (_, one) => first + one);
  pen.textAlign = "center";
  for (const own of known) {
    for (const symbol of across) drawCell(pen, colour, own, symbol, x(symbol), y(all.indexOf(own)));
  }
  drawDecided(pen, colour, across, x, (own) => y(all.indexOf(own) + 1));
  Object.assign(pen, { strokeStyle: colour("ink"), lineWidth: 2 });
  pen.strokeRect(x(place()) + 1, y(all.indexOf(layer())) + 1, CELL - 2, ROW - 2);
  pen.fillStyle = colour("page");
  pen.fillRect(0, 0, width, HEAD);
  for (const symbol of across) drawCame(pen, colour, shade, symbol, x(symbol));
  pen.fillStyle = colour("page");
  pen.fillRect(0, 0, left, height);
  pen.textAlign = "left";
  all.forEach((own, row) => y(row) > HEAD - ROW / 2 && drawLabel(pen, colour, own, y(row), left - 8));
  pen.fillStyle = colour("ink");
  write(pen, narrow.matches ? "came" : "what came", 4, HEAD - 15, left - 8, 12);
}

function drawCell(pen, colour, own, symbol, x, y) {
  const guess = now.grid[own]?.symbol[symbol], follow = answers.follow?.layers[own];
  const share = follow ? follow[symbol] : now.grid[own]?.probability[symbol], right = guess === now.symbols[symbol];
  if (!Number.isFinite(share)) return;
  pen.globalAlpha = 0.6 * share;
  pen.fillStyle = colour("series-0");
  pen.fillRect(x, y, CELL, ROW);
  pen.globalAlpha = 1;
  pen.fillStyle = colour(right || follow || symbol === size() ? "ink" : "muted");
  const place = [x + CELL / 2, y + ROW / 2 + 1, CELL - 2];
  if (follow) write(pen, share < 0.005 ? "·" : String(Math.round(100 * share)), ...place, 11);
  else write(pen, named(guess), ...place, 14, MONO, right ? "bold" : "normal");
}

function drawDecided(pen, colour, across, x, under) {
  Object.assign(pen, { strokeStyle: colour("series-1"), lineWidth: 2 });
  pen.beginPath();
  across.forEach((symbol, one) => {
    const [before, own] = [now.decided[across[one - 1]], now.decided[symbol]];
    if (!own) return;
    pen[before ? "lineTo" : "moveTo"](x(symbol), under(own));
    pen.lineTo(x(symbol + 1), under(own));
  });
  pen.stroke();
}

function drawCame(pen, colour, shade, symbol, x) {
  const level = symbol < size() ? shade.level(shade.values[symbol]) : 0;
  pen.globalAlpha = (0.6 * Math.abs(level)) / LEVELS;
  pen.fillStyle = colour(level > 0 ? "surprise" : "series-0");
  pen.fillRect(x, HEAD - ROW - 2, CELL, ROW);
  pen.globalAlpha = 1;
  pen.fillStyle = colour("ink");
  if (symbol < size()) write(pen, named(now.symbols[symbol]), x + CELL / 2, HEAD - 14, CELL - 2, 14, MONO, "bold");
  pen.fillStyle = colour("muted");
  if (symbol % 10 === 0) write(pen, counted(symbol), x + CELL / 2, 9, 2 * CELL, 10);
}

function drawLabel(pen, colour, own, y, room) {
  const ended = silent(own) === undefined ? "" : `silent at ${counted(silent(own))}`;
  const note = narrow.matches ? "" : has(own) ? ended : "no head";
  pen.fillStyle = colour(has(own) ? "ink" : "muted");
  write(pen, narrow.matches ? `L${own}` : `layer ${own}`, 4, y + (note ? 8 : ROW / 2), room, 12);
  pen.fillStyle = colour("muted");
  write(pen, note, 4, y + 19, room, 10);
}

function drawRunning() {
  const canvas = $("running"), width = canvas.parentElement.clientWidth, height = 96, left = 34, mean = [];
  const [pen, colour] = prepared(canvas, width, height);
  let sum = 0, characters = 0;
  now.bits.forEach((value, symbol) => {
    sum += value ?? 0;
    characters += now.pieces[symbol] !== "";
    mean.push(sum / Math.max(1, characters));
  });
  const most = Math.max(1, Math.ceil(largest(mean.slice(Math.min(10, mean.length >> 2)))));
  const y = (value) => 8 + (height - 16) * (1 - Math.min(value, most) / most);
  for (const value of [0, most / 2, most]) {
    pen.fillStyle = colour("muted");
    write(pen, String(value), 4, y(value), left - 6, 11);
    pen.fillStyle = colour("grid");
    pen.fillRect(left, y(value), width - left, 1);
  }
  Object.assign(pen, { strokeStyle: colour("series-0"), lineWidth: 2, lineJoin: "round" });
  pen.beginPath();
  const step = Math.ceil(mean.length / (2 * width)), across = (width - left - 2) / Math.max(1, mean.length - 1);
  for (let one = 0; one < mean.length; one += step) pen.lineTo(left + across * one, y(mean[one]));
  pen.stroke();
  canvas.ariaLabel = mean.length ? `Running bits per character, ${mean.at(-1).toFixed(3)} at the end` : "No text yet";
}

// Each is done once a frame: what moves when the text or the grid is scrolled, and all that an answer changes.
function atFrame(job) {
  let due = 0;
  const draw = () => [(due = 0), job()];
  return () => (due ||= requestAnimationFrame(draw));
}

const showText = atFrame(() => paint());
const showGrid = atFrame(() => drawGrid());
const show = atFrame(() => PARTS.forEach((part) => part()));

function sizes() {
  const total = now.total ?? {}, most = Math.max(1, ...["charlm", "gzip", "xz"].map((name) => total[name] ?? 0));
  const row = (name) => [name, bar((total[name] ?? 0) / most), cell(`${counted(Math.ceil(total[name] ?? 0))} bytes`)];
  rows($("sizes"), [], ["charlm", "gzip", "xz"].map(row));
  $("total").textContent = !total.characters ? "No text yet."
    : `${counted(total.characters)} characters, ${total.bits_per_character.toFixed(4)} bits per character.`;
  const [still, learning] = (looksAt("adapted") && answers.adapted?.means) || [];
  if (still) $("total").textContent += ` With learning ${learning}, without ${still}.`;
}

function scale(shade = shading()) {
  const chip = (level) => make("i", { className: tint(level) }, shade.words((level * shade.most) / LEVELS));
  $("scale").replaceChildren(...[-8, -4, 1, 4, 8].filter((level) => shade.isSigned || level > 0).map(chip));
}

function status(shade = shading()) {
  const at = place(), isChar = at < size(), row = now.grid[layer()], guess = row?.symbol[at] ?? null;
  const known = (values, words) => (isChar && Number.isFinite(values?.[at]) ? words(values[at]) : "");
  const runs = answers.compare?.bits.map((own) => known(own, asBits)).join(" and ");
  const said = [
    isChar ? `Place ${at}: “${named(now.symbols[at])}”` : `After the text (place ${at})`,
    known(now.bits, (cost) => `cost ${asBits(cost)}`),
    state.colour === "bits" ? "" : known(shade.values, (value) => `${shade.title} ${shade.words(value)}`),
    runs && isChar ? `run by run ${runs}` : "",
    guess === null ? "" : `layer ${layer()} expected “${named(guess)}” (${percent(row.probability[at])})`,
    now.decided[at] ? `decided at layer ${now.decided[at]}` : "",
  ].filter(Boolean).join("; ");
  if ($("status").textContent !== said) $("status").textContent = said;
}

function extremes(shade = shading()) {
  const most = [];
  shade.values.forEach((value, symbol) => {
    if (symbol >= size() || (most.length === 6 && Math.abs(value) <= Math.abs(most[5][0]))) return;
    most.push([value ?? 0, symbol]);
    most.sort(([a], [b]) => Math.abs(b) - Math.abs(a)).splice(6);
  });
  const jump = ([value, symbol]) => {
    const words = `${named(now.symbols[symbol])} ${shade.words(value)}`;
    return button(words, () => choose(symbol, layer()), { ariaLabel: `place ${symbol}: ${words}` });
  };
  $("extremes").replaceChildren(...(most.length ? [`Most (${shade.title}):`] : []), ...most.map(jump));
}

function notes() {
  const none = layers().filter((own) => !has(own)).reverse().join(", layer ");
  const ended = headed().filter((own) => silent(own) !== undefined).reverse();
  const when = ended.map((own) => `layer ${own} at step ${counted(silent(own))}`);
  $("headless").textContent = none && `No head of its own for this offset: layer ${none}.`;
  $("silent").textContent = when.length ? `Heads that fell silent in training: ${when.join(", ")}.` : "";
  const follow = Object.entries(answers.follow?.layers ?? {});
  const each = follow.map(([own, values]) => `layer ${own} ${percent(values[place()])}`).join(", ");
  $("followed").textContent = each && `“${named(state.pin)}” at place ${place()}: ${each}`;
}

// What temperature and top-k make of probabilities, the largest first.
function tempered(probabilities) {
  const weight = (p, rank) => (state.t > 0 ? (p / probabilities[0]) ** (1 / state.t) : Number(rank === 0));
  const weights = probabilities.map((p, rank) => (state.k === 0 || rank < state.k ? weight(p, rank) : 0));
  const whole = sum(weights);
  return weights.map((one) => one / whole);
}

function distribution() {
  const { symbols = [], probabilities = [], after } = answers.distribution ?? {}, at = place(), came = now.symbols[at];
  const drawn = facts.live ? after ?? tempered(probabilities) : [], table = $("distribution");
  const kept = document.activeElement?.dataset.act, ranks = [...symbols.keys()];
  const where = at < size() ? `at place ${at}` : "after the text";
  $("whose").textContent = `Layer ${layer()}, ${state.offset} ahead: the character ${where}.`;
  const shown = ranks.filter((rank) => state.all || rank < BARS || [came, state.pin].includes(symbols[rank]));
  rows(table, facts.live ? ["character", "", "model", "after", ""] : ["character", "", "model"], shown.map((rank) => {
    const symbol = symbols[rank], p = probabilities[rank], name = named(symbol), isPinned = symbol === state.pin;
    if (!facts.live) return [name, bar(p), cell(percent(p))];
    const isPart = model().vocabulary.texts[symbol] === null;
    const act = button(name, () => rewrite(symbol), { ariaLabel: `write ${name} here`, disabled: isPart });
    const pin = button("pin", () => setPin(symbol), { ariaLabel: `pin ${name}`, ariaPressed: String(isPinned) });
    [act.dataset.act, pin.dataset.act] = [`write ${symbol}`, `pin ${symbol}`];
    return [act, bar(p, drawn[rank]), cell(percent(p)), cell(percent(drawn[rank])), make("td", {}, pin)];
  }));
  shown.forEach((rank, one) => table.tBodies[0].rows[one].classList.toggle("came", symbols[rank] === came));
  if (kept) table.querySelector(`[data-act="${kept}"]`)?.focus();
}

function ngrams() {
  const found = answers.ngrams?.lengths ?? [];
  $("of-ngrams").textContent = !model().ngrams.length ? "This model has no n-gram tables."
    : found.length ? `The character at place ${place()} without each table's row.` : "Choose a character of the text.";
  const row = (one) => [one.length, cell(asChange(one.bits)), cell(`${named(one.symbol)} ${percent(one.probability)}`)];
  rows($("ngrams"), found.length ? ["length", "cost", "then likeliest"] : [], found.map(row));
}

function compared() {
  const { means = [], sums } = answers.compare ?? {};
  const row = (mean, run) => [facts.runs[run].name, cell(mean), cell(counted(Math.ceil(sums[run] / 8)))];
  rows($("compared"), means.length ? ["run", "bits per character", "bytes"] : [], means.map(row));
}

const PARTS = [paint, drawGrid, drawRunning, sizes, scale, status, extremes, notes, distribution];
if (facts.live) PARTS.push(ngrams, compared);

// Choosing.
function choose(symbol, own) {
  [state.place, state.layer, seek] = [symbol < size() ? symbol : -1, own === headed()[0] ? 0 : own, true];
  if (symbol < size()) text.setSelectionRange(now.from[symbol], end(symbol));
  update();
}

function inView() {
  const room = grid.clientWidth - label(), x = CELL * place() - grid.scrollLeft;
  const y = ROW * layers().indexOf(layer()) - grid.scrollTop, view = $("box").getBoundingClientRect();
  if (x < 0 || x + CELL > room) grid.scrollLeft += x - room / 2;
  if (y < 0 || y + ROW + HEAD > grid.clientHeight) grid.scrollTop += y - grid.clientHeight / 2;
  const at = place() < size() ? bottom(now.from[place()]) : 0;
  if (at && (at < view.top + 20 || at > view.bottom)) $("box").scrollTop += at - view.top - view.height / 2;
}

function setPin(symbol) {
  state.pin = symbol === state.pin ? -1 : symbol;
  update();
}

function fromCaret({ type }) {
  if (type === "input") [drafts, state.start] = [[], -1];
  mirror();
  [state.place, seek] = [text.selectionStart >= text.value.length ? -1 : symbolAt(text.selectionStart), true];
  update();
}

async function stretch() {
  phase.state = "reading";
  const found = await (await ask("corpus", { run: state.run, start: state.start, length: state.length })).json();
  [$("start").max, state.start] = [found.of, found.start];
  begin(found.text);
}

// Branches: each text that was rewritten stays.
let tree = [], current = 0;

function begin(value) {
  if (facts.live) replaceText(value);
  [tree, drafts, seek] = [unpacked(), [], true];
  [current, state.tree, state.branch] = [clamp(state.branch, 0, tree.length - 1), "", 0];
  update();
}

// For the address: of each branch parent, place and label, and where its text begins to differ from the parent's.
const packed = () => JSON.stringify(tree.map(({ parent, at, label, text: whole }) => {
  const same = common(whole, tree[parent]?.text ?? "");
  return [parent, at, label, same, whole.slice(same)];
}));

function unpacked() {
  const found = [{ parent: null, at: 0, label: "", text: text.value }];
  try {
    JSON.parse(state.tree).forEach(([parent, at, label, same, rest], one) => {
      const before = one ? found[parent].text.slice(0, same) : "";
      found[one] = { parent: one ? parent : null, at, label: String(label), text: before + rest };
    });
  } catch { // none, or an address that somebody changed
    found.length = 1;
  }
  return found;
}

function open(branch) {
  tree[current].text = text.value;
  [current, state.place, state.start, drafts, seek] = [branch, -1, -1, [], true];
  replaceText(tree[branch].text);
}

function rewrite(symbol) {
  const at = place() < size() ? now.from[place()] : text.value.length, own = model().vocabulary.texts[symbol];
  open(tree.push({ parent: current, at, label: named(symbol), text: text.value.slice(0, at) + own }) - 1);
  generate();
}

function branches() {
  const item = (one) => {
    const { at, label, text: whole } = tree[one], before = whole.slice(Math.max(0, at - 8), at);
    const words = label ? `${at}: ${before}[${label}]${whole.slice(at + 1, at + 20)}` : `${whole.slice(0, 24)}…`;
    const press = () => [open(one), update()];
    const made = button(words.replace(/\n/g, "↵"), press, { ariaCurrent: String(one === current) });
    const inside = tree.flatMap(({ parent }, child) => (parent === one ? [item(child)] : []));
    return make("li", {}, made, ...(inside.length ? [make("ul", {}, ...inside)] : []));
  };
  if (tree[current]) tree[current].text = text.value;
  $("branches")?.replaceChildren(...(tree.length > 1 ? [item(0)] : []));
}

// Generation.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
  }
}

async function generate() {
  const mine = ++turn, { t: temperature, k: top_k, n: length, seed } = state;
  let painted = 0;
  generating(true);
  try {
    const answer = await ask("generate", { ...base(), temperature, top_k, length, seed, drafts: state.drafts });
    for await (const event of events(answer)) {
      if (mine !== turn) return;
      if (event.error) throw new Error(event.error);
      grow(event);
      if (performance.now() - painted < 50) continue; // else Stop could not be pressed while much comes at once
      show();
      painted = await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    trouble(error);
  }
  if (mine !== turn) return;
  state.place = -1;
  update();
}

function generating(is) {
  if (facts.live) [$("go").disabled, $("stop").disabled] = [is, !is];
  if (is) [state.place, $("passes").textContent, phase.state] = [-1, "", "writing"];
}

function grow({ symbol, piece, bits, before, after, draft, done, symbols: count, passes }) {
  const from = text.value.length, drawn = new Map(after);
  replaceText(text.value + piece);
  if (done) return ($("passes").textContent = `${count} characters in ${passes} passes, ${count - passes} saved`);
  if (draft && piece) drafts.push({ from, to: text.value.length, kind: draft });
  append({ since: size(), symbols: [symbol], pieces: [piece], bits: [bits ?? null], decided: [], grid: {} });
  [state.start, state.place, seek] = [-1, size() - 1, true];
  const [symbols, probabilities] = [before.map(([one]) => one), before.map(([, p]) => p)];
  answers.distribution = { symbols, probabilities, after: symbols.map((one) => drawn.get(one) ?? 0) };
  [asked.distribution, $("box").scrollTop] = [null, $("box").scrollHeight];
}

// Controls.
function controls() {
  const { num_layers: most, num_heads, d_ff } = model();
  const limits = { alayer: most, ulayer: most, head: num_heads - 1, unit: d_ff - 1, n: facts.limits.length };
  for (const [id, limit] of Object.entries(limits)) if ($(id)) $(id).max = limit;
  fill($("offset"), offsets().map((one) => [one, one]));
  for (const control of document.querySelectorAll("[data-key]")) {
    if (control.type === "checkbox") control.checked = state[control.id];
    else control.value = control.id === "start" ? Math.max(0, state.start) : state[control.id];
  }
  for (const one of document.querySelectorAll(".of")) one.hidden = one.dataset.colour !== state.colour;
  for (const one of document.querySelectorAll(".drafts")) one.hidden = !model().can_draft;
  $("checkpoints")?.replaceChildren(...facts.runs.map(chooser));
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, words]) => make("option", { value }, words)));
}

function chooser({ name, checkpoints, checkpoint: first }, which) {
  const key = `checkpoint${which}`, known = checkpoints.map((one) => one.name), at = known.indexOf(state[key] || first);
  const output = make("output", {}), max = known.length - 1;
  const slider = make("input", { type: "range", min: 0, max, id: key, ariaLabel: `checkpoint of ${name}` });
  slider.value = at < 0 ? max : at;
  const tell = () => (slider.ariaValueText = output.textContent = `step ${counted(checkpoints[slider.value].step)}${known[slider.value] === first ? ", best" : ""}`);
  slider.addEventListener("input", () => [tell(), (state[key] = known[slider.value]), update()]);
  tell();
  return make("span", {}, make("label", { htmlFor: key }, two() ? name : "Checkpoint"), slider, output);
}

function changed({ id, tagName, checked, value, validity }) {
  if (["start", "length"].includes(id) || !validity.valid || value === "") return;
  const kinds = { number: Number(value), boolean: checked, string: value };
  state[id] = kinds[typeof DEFAULTS[id]];
  if (tagName === "SELECT") controls();
  update();
}

function move(event) {
  const known = headed(), row = known.indexOf(layer()), page = Math.floor((grid.clientWidth - label()) / CELL);
  const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page, Home: -size(), End: size() };
  const across = steps[event.key] ?? 0, down = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0;
  if (event.key === "Enter") $("distribution-heading").focus();
  if (!across && !down) return;
  event.preventDefault();
  choose(clamp(place() + across, 0, size()), known[clamp(row + down, 0, known.length - 1)]);
}

function pressed({ clientX, clientY }) {
  const box = grid.getBoundingClientRect(), x = clientX - box.left - label(), y = clientY - box.top - HEAD;
  const symbol = Math.floor((x + grid.scrollLeft) / CELL), own = layers()[Math.floor((y + grid.scrollTop) / ROW)];
  if (x >= 0 && symbol <= size()) choose(symbol, y > 0 && headed().includes(own) ? own : layer());
}

fill($("run"), facts.runs.map(({ name }, one) => [one, name]));
fill($("colour"), Object.entries(COLOURS).flatMap(([key, kind]) => (kind.offered() ? [[key, kind.title]] : [])));
document.querySelectorAll("[data-key]").forEach((own) => own.addEventListener("input", () => changed(own)));
text.addEventListener("input", fromCaret);
text.addEventListener("click", fromCaret);
text.addEventListener("keyup", (event) => /^(Arrow|Home|End|Page)/.test(event.key) && fromCaret(event));
grid.addEventListener("keydown", move);
grid.addEventListener("click", pressed);
for (const [box, again] of [[grid, showGrid], [$("box"), showText]]) {
  box.addEventListener("scroll", again, { passive: true });
  new ResizeObserver(again).observe(box);
}
new ResizeObserver(showText).observe($("paper"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
addEventListener("hashchange", restore);
addEventListener("resize", show);
$("open").addEventListener("click", () => {
  [state.start, state.length, state.place] = [Number($("start").value), Number($("length").value), -1];
  stretch().catch(trouble);
});
$("go").addEventListener("click", generate);
$("stop").addEventListener("click", () => flight.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && phase.state === "writing" && flight.abort());
if (!facts.live) for (const one of document.querySelectorAll(".live")) one.remove();
const difference = ([option, ...values]) => [option, ...values.map((value) => make("td", {}, String(value)))];
rows($("differs"), ["option", ...facts.runs.map((run) => run.name)], facts.differs.map(difference));
restore();
