// The search page: it asks POST /v1/search for one pipeline or two, and shows what they found and why.
//
// Everything that comes from the server or from the user gets into the page as text (textContent), never as HTML.

const $ = (id) => document.getElementById(id);

// Makes an element. Properties are set on the element, `data-` and `aria-` ones as attributes.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

// Makes an element with a class, a text, and perhaps a title that explains it.
const text = (tag, className, textContent, title) => make(tag, { className, textContent, title });
const notice = (words) => text("p", "notice", words);
const alarm = (words) => make("p", { className: "notice error", role: "alert", textContent: words });

const count = new Intl.NumberFormat("en");
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 });
const items = (total) => `${count.format(total)} ${total === 1 ? "item" : "items"}`;
const money = (value) => (Number.isInteger(value) ? count.format(value) : value.toFixed(2));
const scoreText = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(3));

// Item ids have 64 bits. Those that a JavaScript number would round stay texts.
function parse(text) {
  return JSON.parse(text, (key, value, context) =>
    typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source
      ? context.source
      : value,
  );
}

async function ask(path, body, signal) {
  const options = { signal };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The gateway does not answer.");
  }
  const received = await answer.text();
  let tree;
  try {
    tree = parse(received);
  } catch {
    throw new Error(`The gateway answered with status ${answer.status}.`);
  }
  if (!answer.ok) throw new Error(tree?.error ?? `The gateway answered with status ${answer.status}.`);
  return tree;
}

// State. What the address bar holds is enough to show the same lists again.

const GRADES = ["does not fit", "fits partly", "fits", "fits exactly"];
const COLOURS = 6;

const state = {
  query: "",
  pipelines: ["", ""],
  two: false,
  judging: false,
  filters: {}, // attribute -> array of texts, or {min, max}
  user: { id: "", features: {}, past: "", clicked: [] }, // clicked: [{id, title}]
};
let known = { pipelines: [], attributes: [], user_features: [] };
let settings = { judgments: null };
let panes = [];
let values = {}; // attribute -> values seen for this query, so that they stay when one of them filters
let grades = {}; // item -> grade, for this query
const colours = { inverted: 0, semantic: 1, rewritten: 2, identifier: 3 };

function colour(source) {
  if (!(source in colours)) colours[source] = Object.keys(colours).length % COLOURS;
  return colours[source];
}

function readAddress() {
  const given = new URLSearchParams(location.search);
  state.query = given.get("q") ?? "";
  const names = known.pipelines;
  const first = names.includes(given.get("a")) ? given.get("a") : known.default;
  const other = names.find((name) => name !== first) ?? first;
  state.pipelines = [first, names.includes(given.get("b")) ? given.get("b") : other];
  state.two = given.has("b");
  state.judging = given.has("judge") && settings.judgments !== null;
  state.filters = {};
  for (const attribute of known.attributes) {
    const texts = given.getAll(`f.${attribute.name}`);
    const [low, high] = [given.get(`min.${attribute.name}`), given.get(`max.${attribute.name}`)].map((end) =>
      end === null || end === "" || !Number.isFinite(Number(end)) ? null : Number(end),
    );
    if (attribute.kind !== "number" && texts.length) state.filters[attribute.name] = texts;
    if (attribute.kind === "number" && (low !== null || high !== null)) {
      state.filters[attribute.name] = { min: low, max: high };
    }
  }
  state.user = { id: given.get("user") ?? "", features: {}, past: given.get("past") ?? "", clicked: [] };
  for (const { name } of known.user_features) {
    if (given.has(`u.${name}`)) state.user.features[name] = given.get(`u.${name}`);
  }
  for (const id of given.getAll("clicked")) state.user.clicked.push({ id, title: id });
}

function writeAddress(push) {
  const given = new URLSearchParams();
  if (state.query) given.set("q", state.query);
  if (state.pipelines[0] !== known.default || state.two) given.set("a", state.pipelines[0]);
  if (state.two) given.set("b", state.pipelines[1]);
  if (state.judging) given.set("judge", "");
  for (const [name, filter] of Object.entries(state.filters)) {
    if (Array.isArray(filter)) filter.forEach((text) => given.append(`f.${name}`, text));
    else for (const end of ["min", "max"]) if (filter[end] !== null) given.set(`${end}.${name}`, filter[end]);
  }
  if (state.user.id) given.set("user", state.user.id);
  if (state.user.past.trim()) given.set("past", state.user.past);
  for (const [name, value] of Object.entries(state.user.features)) if (value) given.set(`u.${name}`, value);
  for (const { id } of state.user.clicked) given.append("clicked", id);
  const address = `${location.pathname}${[...given].length ? `?${given}` : ""}`;
  if (address === `${location.pathname}${location.search}`) return;
  history[push ? "pushState" : "replaceState"](null, "", address);
}

function featureValue(feature, text) {
  const lines = text.split(",").map((part) => part.trim()).filter(Boolean);
  if (feature.kind === "number") return Number(text);
  if (feature.kind === "vector") return lines.map(Number);
  if (feature.kind === "multi") return lines;
  return text;
}

// Keys of shops are texts; an id that looks like a number goes as a number, unless it has too many digits.
function itemValue(id) {
  return !settings.keys && /^\d+$/.test(id) && Number.isSafeInteger(Number(id)) ? Number(id) : String(id);
}

function userOf() {
  const user = {};
  const { id, features, past, clicked } = state.user;
  if (id) user.id = /^\d{1,15}$/.test(id) ? Number(id) : id;
  const given = {};
  for (const feature of known.user_features) {
    const text = (features[feature.name] ?? "").trim();
    if (text) given[feature.name] = featureValue(feature, text);
  }
  if (Object.keys(given).length) user.features = given;
  const queries = past.split("\n").map((line) => line.trim()).filter(Boolean);
  if (queries.length) user.past_queries = queries;
  if (clicked.length) user.clicked_items = clicked.map((item) => itemValue(item.id));
  return user;
}

function filtersOf() {
  const filters = {};
  for (const [name, filter] of Object.entries(state.filters)) {
    if (Array.isArray(filter)) filters[name] = filter;
    else filters[name] = Object.fromEntries(Object.entries(filter).filter(([, end]) => end !== null));
  }
  return filters;
}

// One list: a pipeline, its answer, and the pages that were asked for.

class Pane {
  constructor(index) {
    this.index = index;
    this.items = [];
    this.element = make("section", { className: "pane", "aria-label": index ? "Second list" : "First list" });
    this.top = make("div", { className: "pane-top" });
    this.body = make("div");
    this.element.append(this.top, this.body);
    this.showTop();
  }

  showTop(answer, milliseconds) {
    const select = make("select", { "aria-label": this.index ? "Second pipeline" : "Pipeline" });
    for (const name of known.pipelines) select.append(make("option", { value: name, textContent: name }));
    select.value = state.pipelines[this.index];
    select.addEventListener("change", () => {
      state.pipelines[this.index] = select.value;
      writeAddress(true);
      // The facets are those of the first list.
      this.search();
    });
    const hadFocus = this.top.contains(document.activeElement);
    this.top.replaceChildren(select);
    if (hadFocus) select.focus();
    if (!answer) return;
    this.top.append(
      text("span", "n total", items(answer.total)),
      text("span", "n", `${milliseconds.toFixed(0)} ms`, "from the request to the answer, as this browser sees it"),
      answer.arm ? text("span", "chip", answer.arm, "experiment and arm") : "",
    );
    for (const stage of answer.degraded ?? []) {
      this.top.append(text("span", "chip warn", `without ${stage}`, "the stage failed or was late, and was left out"));
    }
  }

  async search() {
    this.aborter?.abort();
    const aborter = (this.aborter = new AbortController());
    this.element.setAttribute("aria-busy", "true");
    const began = performance.now();
    try {
      const answer = await ask(
        "v1/search",
        {
          query: state.query,
          pipeline: state.pipelines[this.index],
          user: userOf(),
          filters: filtersOf(),
          facets: known.attributes.map((attribute) => attribute.name),
          size: 20,
          explain: true,
        },
        aborter.signal,
      );
      this.show(answer, performance.now() - began);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.fail(error);
    }
    if (aborter === this.aborter) this.element.removeAttribute("aria-busy");
    afterSearch();
  }

  fail(error) {
    this.items = [];
    this.answer = null;
    this.showTop();
    this.body.replaceChildren(alarm(error.message));
  }

  show(answer, milliseconds) {
    this.answer = answer;
    this.items = answer.items;
    this.tokens = wordPattern(answer.explain?.tokens ?? []);
    this.showTop(answer, milliseconds);
    this.list = make("ol", { className: "list" });
    this.body.replaceChildren(how(answer), this.list);
    if (!answer.items.length) {
      const filtered = Object.keys(state.filters).length > 0;
      this.body.append(notice(filtered ? "Nothing was found with these filters." : "Nothing was found."));
    }
    this.append(answer.items, 0);
    this.more(answer.next_cursor);
    if (this.index === 0) showFacets(answer.facets ?? {});
  }

  append(items, before) {
    items.forEach((item, at) => this.list.append(card(this, item, before + at + 1)));
  }

  more(cursor) {
    this.button?.remove();
    if (!cursor) return;
    this.button = make("button", { type: "button", className: "more", textContent: "More results" });
    this.button.addEventListener("click", async () => {
      this.button.disabled = true;
      const list = this.list;
      try {
        // The cursor carries the list; the pages after the first one have no explanation.
        const page = await ask("v1/search", { cursor, size: 20 });
        if (list !== this.list) return; // another search has begun
        const before = this.items.length;
        this.items = [...this.items, ...page.items];
        this.append(page.items, before);
        this.more(page.next_cursor);
        this.list.children[before]?.focus();
        afterSearch();
      } catch (error) {
        this.button.replaceWith(alarm(error.message));
      }
    });
    this.body.append(this.button);
  }
}

// How the answer came about: the funnel, tokens, rewrites and heads.

const wide = matchMedia("(min-width: 821px)");
let howOpen = wide.matches;

function how(answer) {
  const explain = answer.explain;
  if (!explain) return "";
  const inside = make("div", { className: "how-inside" });
  const stages = explain.stages ?? [];
  const most = Math.max(1, ...stages.filter((stage) => stage.name !== "rewrite").map((stage) => stage.out));
  const rows = stages.map((stage) => {
    const source = stage.name.startsWith("recall.") ? stage.name.slice(7) : null;
    const rewrites = stage.name === "rewrite";
    const bar = make("div", { className: `bar${source === null ? "" : ` b${colour(source)}`}`, hidden: rewrites });
    bar.style.width = `${(100 * stage.out) / most}%`;
    const left = source !== null || rewrites ? "" : `${count.format(stage.in)} → `;
    const right = rewrites ? ` ${stage.out === 1 ? "query" : "queries"}` : "";
    return make(
      "tr",
      { className: stage.error ? "out" : "", title: stage.error || undefined },
      make("th", { scope: "row", textContent: source === null ? stage.name : source }),
      make("td", {}, bar, stage.error ? `left out: ${stage.error}` : ""),
      make("td", { className: "n", textContent: stage.error ? "" : `${left}${count.format(stage.out)}${right}` }),
      make("td", { className: "n ms", textContent: `${stage.ms.toFixed(stage.ms < 10 ? 1 : 0)} ms` }),
    );
  });
  if (rows.length) {
    const column = (className, name) => make("th", { scope: "col", className, textContent: name });
    const head = make("tr", {}, column("", "stage"), make("td"), column("right", "items"), column("right", "time"));
    inside.append(make("table", { className: "funnel" }, make("thead", {}, head), make("tbody", {}, rows)));
  }
  const terms = make("dl", { className: "terms" });
  const add = (name, ...chips) => {
    if (chips.length) terms.append(text("dt", "", name), make("dd", {}, chips));
  };
  const rewrite = (words) => {
    const button = make("button", { type: "button", className: "chip", textContent: words, title: "search for it" });
    button.addEventListener("click", () => searchFor(words));
    return button;
  };
  // Letter trigrams of the inverted index begin with #; dozens of them would hide the words.
  const trigrams = (explain.tokens ?? []).filter((token) => token.startsWith("#"));
  const words = (explain.tokens ?? []).filter((token) => !token.startsWith("#"));
  const letters = text("span", "n", `and ${trigrams.length} letter trigrams`, trigrams.join(" "));
  add("words", ...words.map((token) => text("span", "chip", token)), ...(trigrams.length ? [letters] : []));
  add("rewrites", ...(answer.rewrites ?? []).map(rewrite));
  for (const [source, heads] of Object.entries(explain.heads ?? {})) {
    if (heads.length < 2) continue;
    const top = Math.max(1, ...heads);
    const bars = heads.map((found) => {
      const bar = make("i", { className: `b${colour(source)}` });
      bar.style.height = `${(16 * found) / top}px`;
      return bar;
    });
    const counts = heads.map((found) => count.format(found)).join(" · ");
    add(
      `heads of ${source}`,
      make("span", { className: "heads", "aria-hidden": "true" }, bars),
      text("span", "n", counts, "items that each head of the query tower found"),
    );
  }
  if (explain.identifier) add("identifier", text("span", "chip", "the query is one"));
  if (explain.cut_off) add("cut off", text("span", "n", `${items(explain.cut_off)} with a low score`));
  if (terms.children.length) inside.append(terms);
  if (!inside.children.length) return "";
  const details = make("details", { className: "how", open: howOpen }, text("summary", "", "How it was found"), inside);
  details.addEventListener("toggle", () => (howOpen = details.open));
  return details;
}

// Matches the query's words in titles, as whole words where the script has spaces between words.
function wordPattern(tokens) {
  const words = [...new Set(tokens.filter((token) => token.trim()))].sort((a, b) => b.length - a.length);
  if (!words.length) return null;
  const escaped = words.map((word) => word.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"));
  const whole = (word) => (/[\u2e80-\u9fff]/.test(word) ? word : `(?<![\\p{L}\\p{N}])${word}(?![\\p{L}\\p{N}])`);
  try {
    return new RegExp(escaped.map(whole).join("|"), "giu");
  } catch {
    return null;
  }
}

function marked(title, pattern) {
  if (!pattern) return [title];
  const parts = [];
  let end = 0;
  for (const match of title.matchAll(pattern)) {
    if (!match[0]) continue;
    parts.push(title.slice(end, match.index), make("mark", { textContent: match[0] }));
    end = match.index + match[0].length;
  }
  return [...parts, title.slice(end)];
}

// One result.

// A text says what it is by itself; a number, true and false do not.
function valueText(name, value) {
  const words = name.replaceAll("_", " ");
  if (Array.isArray(value)) return value.slice(0, 6).join(", ");
  if (typeof value === "number") return `${words} ${number(value)}`;
  if (value === "true") return words;
  if (value === "false") return `not ${words}`;
  return String(value);
}

const nameOf = (item) => String(item.key ?? item.id);

function card(pane, item, rank) {
  const attributes = { ...item.attributes };
  const taken = (name) => {
    const value = attributes[name];
    delete attributes[name];
    return value;
  };
  const price = typeof attributes.price === "number" ? taken("price") : undefined;
  const brand = typeof attributes.brand === "string" ? taken("brand") : undefined;
  const about = make("div", { className: "about" }, brand === undefined ? "" : text("span", "brand", brand));
  for (const [name, value] of Object.entries(attributes).slice(0, 8)) {
    about.append(text("span", "", valueText(name, value), name));
  }
  const badges = make("div", { className: "badges" });
  for (const source of item.sources ?? []) {
    const found = item.explain?.[source];
    const badge = `badge c${colour(source)}`;
    if (found?.rank) {
      const words = `${source} found it at rank ${found.rank}, with the score ${scoreText(found.score)}`;
      badges.append(text("span", badge, `${source} ${found.rank}`, words));
    } else badges.append(text("span", badge, source, `found by ${source}`));
  }
  for (const reason of item.explain?.rerank ?? []) {
    if (/: (pinned|boosted|buried)$/.test(reason)) badges.append(text("span", "chip", reason, "a rule did this"));
  }
  if (item.variants > 1) badges.append(text("span", "chip", `${item.variants} variants`, item.group ?? undefined));
  badges.append(make("span", { className: "elsewhere" }));

  const act = (words, title) => make("button", { type: "button", className: "quiet", textContent: words, title });
  const why = act("why", "scores and ranks of all stages");
  why.setAttribute("aria-expanded", "false");
  const clicked = act("clicked", "search as somebody who clicked this");
  const title = item.title || nameOf(item);
  const element = make(
    "li",
    {
      className: "card",
      tabIndex: rank === 1 ? 0 : -1,
      "data-item": nameOf(item),
      "aria-label": `${rank}. ${title}`,
    },
    text("span", "rank", rank),
    make(
      "div",
      {},
      make("div", { className: "title" }, marked(title, pane.tokens)),
      about,
      badges,
      gradeButtons(item, pane.index),
    ),
    make(
      "div",
      { className: "right" },
      text("div", "price", price === undefined ? "" : money(price)),
      text("div", "score", scoreText(item.score), "score of the last stage that ranked the list"),
      make("div", { className: "acts" }, why, clicked),
    ),
  );
  why.addEventListener("click", () => {
    const open = element.querySelector(".why");
    if (open) open.remove();
    else element.append(reasons(item));
    why.setAttribute("aria-expanded", String(!open));
  });
  clicked.addEventListener("click", () => addClick(item));
  element.addEventListener("mouseenter", () => markSame(nameOf(item)));
  element.addEventListener("focusin", () => markSame(nameOf(item)));
  element.addEventListener("mouseleave", () => markSame(null));
  return element;
}

function reasons(item) {
  const rows = [];
  const row = (name, words) => {
    rows.push(make("tr", {}, make("th", { scope: "row", textContent: name }), text("td", "", words)));
  };
  for (const [stage, found] of Object.entries(item.explain ?? {})) {
    if (stage === "rerank") (found ?? []).forEach((reason) => row("rerank", reason));
    else if (found && typeof found === "object") {
      row(stage, `rank ${found.rank ?? "–"}, score ${scoreText(found.score)}`);
    } else if (found !== null && found !== undefined) row(stage, `score ${scoreText(found)}`);
  }
  row("item", nameOf(item));
  if (item.key) row("id", item.id);
  if (item.group) row("group", item.group);
  return make("div", { className: "why" }, make("table", {}, make("tbody", {}, rows)));
}

function markSame(name) {
  if (!state.two) return;
  for (const element of document.querySelectorAll(".card")) {
    element.classList.toggle("same", name !== null && element.dataset.item === name);
  }
}

// Judgments.

function gradeButtons(item, pane) {
  const name = nameOf(item);
  const group = make("div", { className: "grades", role: "radiogroup", "aria-label": "Grade", hidden: !state.judging });
  GRADES.forEach((words, grade) => {
    const input = make("input", {
      type: "radio",
      name: `grade-${pane}-${name}`,
      value: grade,
      checked: grades[name] === grade,
      "aria-label": `${grade}, ${words}`,
    });
    input.addEventListener("change", () => judge(name, grade));
    group.append(make("label", { title: words }, input, String(grade)));
  });
  return group;
}

async function judge(name, grade) {
  const before = grades[name];
  grades[name] = grade;
  showGrades();
  try {
    const saved = await ask("v1/judgments", { query: state.query, item: name, grade });
    say(grade === null ? `Judgment of ${name} taken back.` : `${name}: ${grade}, ${GRADES[grade]}. Saved.`);
    showJudged(saved.judgments);
  } catch (error) {
    grades[name] = before;
    showGrades();
    panes[0].body.prepend(alarm(`Not saved: ${error.message}`));
  }
}

function showGrades() {
  for (const element of document.querySelectorAll(".card")) {
    const grade = grades[element.dataset.item];
    const group = element.querySelector(".grades");
    group.hidden = !state.judging;
    for (const input of group.querySelectorAll("input")) input.checked = input.value === String(grade);
  }
}

function showJudged(total) {
  const here = Object.values(grades).filter((grade) => grade !== null && grade !== undefined).length;
  $("judge").textContent = state.judging ? `Judging · ${here} here, ${count.format(total)} in all` : "Judge";
}

async function readGrades() {
  if (!state.judging || !state.query) return;
  const query = state.query;
  const saved = await ask(`v1/judgments?query=${encodeURIComponent(query)}`);
  if (query !== state.query) return;
  grades = saved.grades;
  showGrades();
  showJudged(saved.judgments);
}

function toggleJudging() {
  if (settings.judgments === null) return;
  state.judging = !state.judging;
  $("judge").setAttribute("aria-pressed", String(state.judging));
  writeAddress(false);
  showGrades();
  showJudged(0);
  readGrades().catch(showError);
}

// Facets and the user.

function showFacets(facets) {
  const box = $("facets");
  const focused = box.contains(document.activeElement) ? document.activeElement.id : "";
  const parts = known.attributes.flatMap((attribute) => {
    const facet = facets[attribute.name];
    return facet ? [facet.kind === "number" ? range(attribute.name, facet) : choices(attribute.name, facet)] : [];
  });
  box.replaceChildren(...parts.filter(Boolean));
  if (!known.attributes.length) {
    box.append(text("p", "faint", "The index has no attributes. Name some in the schema under items.filters."));
  } else if (!box.children.length) box.append(text("p", "faint", "No attribute to filter by."));
  if (focused) document.getElementById(focused)?.focus();
  $("clear").hidden = !Object.keys(state.filters).length;
}

function choices(name, facet) {
  const counts = new Map(facet.values.map(({ value, count: found }) => [value, found]));
  const chosen = new Set(state.filters[name] ?? []);
  // The values that were there before one of them was chosen stay, so that another one can be added.
  if (!chosen.size) values[name] = facet.values.map(({ value }) => value);
  const all = [...new Set([...(values[name] ?? []), ...chosen, ...counts.keys()])];
  if (!all.length) return null;
  const box = make("fieldset", {}, make("legend", { textContent: name }));
  const rows = all.map((value, at) => {
    const input = make("input", { type: "checkbox", id: `facet-${name}-${at}`, checked: chosen.has(value) });
    input.addEventListener("change", () => {
      const left = new Set(state.filters[name] ?? []);
      if (input.checked) left.add(value);
      else left.delete(value);
      setFilter(name, left.size ? [...left] : null);
    });
    const found = counts.has(value) ? count.format(counts.get(value)) : "";
    return make("label", { className: "value" }, input, text("span", "", value), text("span", "count", found));
  });
  box.append(...rows.slice(0, 8));
  if (rows.length > 8) {
    const rest = rows.slice(8);
    const words = `${rest.length} more${facet.more ? ` of ${count.format(rest.length + facet.more)}` : ""}`;
    const open = rest.some((row) => row.firstChild.checked);
    box.append(make("details", { open }, text("summary", "faint", words), rest));
  }
  return box;
}

function range(name, facet) {
  const filter = state.filters[name];
  if (facet.min === null && !filter) return null;
  const ends = ["min", "max"].map((end) => {
    // Rounded outwards, so that the shown ends hold all items.
    const round = end === "min" ? Math.floor : Math.ceil;
    const input = make("input", {
      type: "number",
      step: "any",
      id: `facet-${name}-${end}`,
      "aria-label": `${name}, ${end === "min" ? "at least" : "at most"}`,
      placeholder: facet[end] === null ? "" : String(round(facet[end] * 100) / 100),
      value: filter?.[end] ?? "",
    });
    input.addEventListener("change", () => {
      const [min, max] = ends.map((one) => (Number.isFinite(one.valueAsNumber) ? one.valueAsNumber : null));
      setFilter(name, min === null && max === null ? null : { min, max });
    });
    return input;
  });
  const between = text("span", "faint", "to");
  return make("fieldset", {}, text("legend", "", name), make("div", { className: "range" }, ends[0], between, ends[1]));
}

function setFilter(name, filter) {
  if (filter === null) delete state.filters[name];
  else state.filters[name] = filter;
  changed();
}

function changed() {
  writeAddress(true);
  if (state.query) searchAll();
}

function showUser() {
  $("user-id").value = state.user.id;
  $("past").value = state.user.past;
  const fields = known.user_features.map((feature) => {
    const id = `feature-${feature.name}`;
    const input = make("input", {
      id,
      type: feature.kind === "number" ? "number" : "text",
      step: "any",
      autocomplete: "off",
      placeholder: "unknown",
      value: state.user.features[feature.name] ?? "",
    });
    input.addEventListener("change", () => {
      state.user.features[feature.name] = input.value;
      changed();
      showAnonymous();
    });
    return make("label", { className: "field" }, text("span", "", feature.name), input);
  });
  $("features").replaceChildren(...fields);
  showClicks();
  showAnonymous();
}

function showAnonymous() {
  const { id, features, past, clicked } = state.user;
  $("anonymous").hidden = !(id || past.trim() || clicked.length || Object.values(features).some(Boolean));
}

function showClicks() {
  const chips = state.user.clicked.map((item, at) => {
    const button = make("button", {
      type: "button",
      className: "chip",
      textContent: `${item.title.length > 28 ? `${item.title.slice(0, 27)}…` : item.title} ×`,
      title: `${item.title}: take the click back`,
      "aria-label": `Take back the click on ${item.title}`,
    });
    button.addEventListener("click", () => {
      state.user.clicked.splice(at, 1);
      showClicks();
      changed();
    });
    return button;
  });
  $("clicked").replaceChildren(...(chips.length ? chips : [text("span", "faint", "Use “clicked” on a result.")]));
  showAnonymous();
}

function addClick(item) {
  state.user.clicked.push({ id: nameOf(item), title: item.title || nameOf(item) });
  showClicks();
  changed();
  say(`Search as somebody who clicked ${item.title || nameOf(item)}.`);
}

// Searching.

function searchFor(text) {
  $("query").value = text;
  submit();
}

function submit() {
  const query = $("query").value.trim();
  if (query !== state.query) {
    values = {};
    grades = {};
  }
  state.query = query;
  writeAddress(true);
  if (query) searchAll();
}

function searchAll() {
  document.title = `${state.query} · DPSR`;
  readGrades().catch(showError);
  for (const pane of panes) pane.search();
}

function showPanes() {
  const wanted = state.two ? 2 : 1;
  while (panes.length > wanted) panes.pop().aborter?.abort();
  while (panes.length < wanted) panes.push(new Pane(panes.length));
  $("panes").replaceChildren(...panes.map((pane) => pane.element));
  $("panes").classList.toggle("two", state.two);
  $("compare").setAttribute("aria-pressed", String(state.two));
}

function toggleCompare() {
  state.two = !state.two;
  showPanes();
  writeAddress(true);
  if (state.two && state.query) panes[1].search();
  else afterSearch();
}

// Says where each item stands in the other list, once both are there.
function afterSearch() {
  const ranks = panes.map((pane) => new Map(pane.items.map((item, at) => [nameOf(item), at + 1])));
  panes.forEach((pane, index) => {
    const other = panes.length === 2 ? ranks[1 - index] : null;
    for (const element of pane.list?.children ?? []) {
      const note = element.querySelector(".elsewhere");
      const there = other?.get(element.dataset.item);
      note.textContent = !other || !other.size ? "" : there ? `also at ${there}` : "only here";
      note.title = other && there ? `rank ${there} in the ${index ? "first" : "second"} list` : "";
    }
  });
  if (panes.some((pane) => pane.element.getAttribute("aria-busy"))) return;
  const total = ({ answer }) => (answer ? `${answer.pipeline}: ${items(answer.total)}` : "no answer");
  say(panes.map(total).join(". "));
}

const say = (text) => ($("status").textContent = text);

function showError(error) {
  if (error.name === "AbortError") return;
  $("panes").before(alarm(error.message));
}

// Keys.

function cards(pane) {
  return [...(panes[pane]?.list?.children ?? [])];
}

function place() {
  const current = document.activeElement?.closest?.(".card");
  for (let pane = 0; pane < panes.length; pane++) {
    const at = cards(pane).indexOf(current);
    if (at >= 0) return { pane, at, element: current };
  }
  return { pane: 0, at: -1, element: null };
}

function move(pane, at) {
  const all = cards(pane);
  const target = all[Math.max(0, Math.min(at, all.length - 1))];
  if (!target) return;
  for (const element of document.querySelectorAll(".card[tabindex='0']")) element.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
  target.scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const target = event.target;
  if (target.matches("textarea, select, input:not([type='radio'], [type='checkbox'])")) {
    if (event.key === "Escape" && target === $("query")) target.blur();
    return;
  }
  const { pane, at, element } = place();
  const press = (which) => element?.querySelectorAll(".acts button")[which]?.click();
  const actions = {
    "/": () => $("query").select() ?? $("query").focus(),
    j: () => move(pane, at + 1),
    k: () => move(pane, at - 1),
    h: () => move(0, Math.max(at, 0)),
    l: () => move(panes.length - 1, Math.max(at, 0)),
    e: () => press(0),
    x: () => press(1),
    c: toggleCompare,
    g: toggleJudging,
    "?": () => $("keys").showModal(),
  };
  if (state.judging && element && "0123".includes(event.key) && event.key.length === 1) {
    const grade = Number(event.key);
    judge(element.dataset.item, grades[element.dataset.item] === grade ? null : grade);
  } else if (event.key in actions) actions[event.key]();
  else return;
  event.preventDefault();
}

// Start.

function restore() {
  readAddress();
  $("query").value = state.query;
  $("judge").setAttribute("aria-pressed", String(state.judging));
  values = {};
  grades = {};
  showUser();
  // What was asked before must not show up in the lists of now.
  for (const pane of panes) pane.aborter?.abort();
  panes = [];
  showPanes();
  if (state.query) searchAll();
  else $("query").focus();
}

async function start() {
  try {
    [known, settings] = await Promise.all([ask("v1/pipelines"), ask("page.json")]);
  } catch (error) {
    showError(error);
    return;
  }
  known.pipelines = known.pipelines.map((pipeline) => pipeline.name);
  if (settings.judgments !== null) {
    $("judge").hidden = false;
    $("evaluate").hidden = false;
    $("file").textContent = settings.judgments;
    const systems = known.pipelines.map((name) => `--system=search:${location.host}/${name}`);
    const command = ["dpsr evaluate", `--judgments=${settings.judgments}`, "--store=STORE", ...systems];
    $("command").textContent = command.join(" \\\n  ");
  } else for (const element of document.querySelectorAll(".judging")) element.hidden = true;
  if (!wide.matches) $("side").open = false;

  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
    $("query").blur();
  });
  $("user").addEventListener("submit", (event) => event.preventDefault());
  $("user-id").addEventListener("change", () => {
    state.user.id = $("user-id").value.trim();
    showAnonymous();
    changed();
  });
  $("past").addEventListener("change", () => {
    state.user.past = $("past").value;
    showAnonymous();
    changed();
  });
  $("anonymous").addEventListener("click", () => {
    state.user = { id: "", features: {}, past: "", clicked: [] };
    showUser();
    changed();
  });
  $("clear").addEventListener("click", () => {
    state.filters = {};
    changed();
  });
  $("compare").addEventListener("click", toggleCompare);
  $("judge").addEventListener("click", toggleJudging);
  $("help").addEventListener("click", () => $("keys").showModal());
  document.addEventListener("keydown", onKey);
  window.addEventListener("popstate", restore);
  restore();
}

start();
