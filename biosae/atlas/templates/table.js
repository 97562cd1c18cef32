// The table of latents: searched, filtered, sorted; only the rows in view are in the document.

const table = { order: [], by: "association", down: false, rows: new Map(), height: 0, first: 0, last: -1, open: -1, focus: -1 };
const view = { query: "", target: -1, flag: "", which: "all" };

const bar = value => {
  const fill = el("span", { class: "fill" });
  fill.style.inlineSize = `${Math.max(value > 0 ? 2 : 0, 100 * Math.min(1, value))}%`;
  return el("span", { class: "meter", "aria-hidden": "true" }, fill);
};

function estimate(latent) {
  const row = bestRow(latent, view.target);
  if (row < 0) return ["–"];
  const interval = rows.ci_low?.[row] != null && rows.ci_high?.[row] != null
    ? el("span", { class: "interval" }, ` (${num(rows.ci_low[row])} to ${num(rows.ci_high[row])})`) : "";
  return [
    el("span", { class: "what" }, word("target", row), word("contrast", row) ? ` (${word("contrast", row)})` : ""),
    el("span", { class: "sub" }, `${word("effect", row)} ${num(rows.estimate?.[row])}`, interval),
  ];
}

// checks passed, and those that could be decided
function stressed(latent) {
  const decided = checksOf(latent).filter(check => ["passed", "failed", "unclear"].includes(check.verdict));
  return decided.length ? [decided.filter(check => check.verdict === "passed").length, decided.length] : null;
}

const COLUMNS = [
  { key: "latent", label: "Latent", value: i => nameOf(i) ? `0${nameOf(i).toLowerCase()}` : `1${latents.id[i]}`, cell: i => [
    el("a", { href: `#${encodeURIComponent(latents.id[i])}`, tabindex: "-1" }, latents.id[i]),
    el("span", { class: "sub name" }, nameOf(i)),
  ] },
  { key: "shown", label: "Highest", cell: i => [el("span", { class: "strip" }, ...((data.galleries[i].top || {}).items || []).slice(0, 3).map(item => picture(item, "")))] },
  { key: "active", label: "Active", title: `Share of ${data.row}s in which the latent fires`, down: true, value: i => latents.density?.[i], cell: i => [
    el("span", { class: "amount" }, share(latents.density?.[i])), bar(latents.density?.[i] || 0),
  ] },
  { key: "patients", label: "Patients", title: "Patients in whom the latent fires", down: true, when: !!latents.n_active_patients, value: i => latents.n_active_patients[i], cell: i => [
    el("span", { class: "amount" }, whole(latents.n_active_patients[i])),
    el("span", { class: "sub" }, latents.top_share[i] == null ? "" : `one: ${share(latents.top_share[i])}`),
  ] },
  { key: "association", label: "Association", title: "Strongest evidence first, as the statistics rank it", value: i => { const row = bestRow(i, view.target); return row < 0 ? null : rows.rank[row]; }, cell: estimate },
  { key: "q", label: "q", title: "p-value corrected for all tests of the target; a dash: not tested", value: i => { const row = bestRow(i, view.target); return row < 0 ? null : rows.q?.[row]; }, when: !!rows.q, cell: i => { const row = bestRow(i, view.target); return [el("span", { class: "amount" }, row < 0 ? "–" : chance(rows.q[row]))]; } },
  { key: "flag", label: "Confounding", value: flagOf, when: data.confounders.some(list => list.length), cell: i => flagOf(i) ? [el("span", { class: `flag ${flagOf(i).replace(/ /g, "-")}` }, flagOf(i))] : ["–"] },
  { key: "stress", label: "Stress", title: "Checks passed, of those with an interval", down: true, when: Object.keys(data.cards).length > 0, value: i => { const s = stressed(i); return s && s[0] / s[1] + s[1] / 1e3; }, cell: i => { const s = stressed(i); return [el("span", { class: "amount" }, s ? `${s[0]} of ${s[1]}` : checksOf(i).length ? "no interval" : "–")]; } },
  { key: "status", label: "Status", value: i => nameOf(i, "status"), cell: i => [nameOf(i, "status"), nameOf(i, "note") ? el("span", { class: "sub" }, "note") : null] },
].filter(column => column.when !== false);

function haystack(latent) {
  const row = bestRow(latent, view.target);
  return [latents.id[latent], nameOf(latent), nameOf(latent, "note"), nameOf(latent, "status"), row < 0 ? "" : word("target", row)].join("\n").toLowerCase();
}

const WHICH = {
  all: ["all latents", () => true],
  alive: ["those that fire", i => (latents.n_active?.[i] ?? 1) > 0],
  tested: ["tested, q ≤ 0.05", i => { const row = bestRow(i, view.target); return row >= 0 && rows.q?.[row] != null && rows.q[row] <= 0.05; }],
  named: ["named or noted", i => FIELDS.some(field => nameOf(i, field))],
  unnamed: ["without a name", i => !nameOf(i)],
};

function arrange() {
  const words = view.query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (let i = 0; i < count; i++) {
    if (view.flag && flagOf(i) !== view.flag) continue;
    if (!WHICH[view.which][1](i)) continue;
    if (words.length) { const text = haystack(i); if (!words.every(w => text.includes(w))) continue; }
    found.push(i);
  }
  const column = COLUMNS.find(c => c.key === table.by);
  const values = new Map(found.map(i => [i, column.value(i)]));
  const sign = table.down ? -1 : 1, missing = v => v == null || v === "";
  found.sort((a, b) => {
    const x = values.get(a), y = values.get(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    return (x < y ? -sign : x > y ? sign : 0) || a - b;
  });
  table.order = found;
  get("count").textContent = found.length === count ? plural(count, "latent") : `${whole(found.length)} of ${plural(count, "latent")}`;
  get("table").setAttribute("aria-rowcount", found.length + 1);
}

function heading() {
  get("table").tHead.rows[0].replaceChildren(...COLUMNS.map(column => {
    if (!column.value) return el("th", { scope: "col", class: column.key }, column.label);
    const sorted = column.key === table.by;
    const act = () => {
      table.down = sorted ? !table.down : !!column.down;
      table.by = column.key;
      refresh();
      get("table").querySelector(`th.${column.key} button`).focus();
    };
    return el("th", { scope: "col", class: column.key, "aria-sort": sorted ? (table.down ? "descending" : "ascending") : null },
      el("button", { type: "button", title: column.title, on: { click: act } }, column.label, el("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (table.down ? " ↓" : " ↑") : "")));
  }));
}

function line(at) {
  const latent = table.order[at];
  const cells = COLUMNS.map((column, j) => el(j ? "td" : "th", { class: column.key, scope: j ? null : "row" }, ...column.cell(latent)));
  const row = el("tr", { "aria-rowindex": at + 2, "data-latent": latent }, ...cells);
  const link = row.querySelector("a");
  if (latent === table.open) { row.classList.add("open"); link.setAttribute("aria-current", "true"); }
  return row;
}

function draw(again = false) {
  const scroll = get("scroll"), body = get("table").tBodies[0];
  if (again) table.rows.clear();
  const height = table.height ||= parseFloat(getComputedStyle(get("table")).getPropertyValue("--row"));
  const head = get("table").tHead.offsetHeight;
  const first = Math.max(0, Math.floor(scroll.scrollTop / height) - 4);
  const last = Math.min(table.order.length - 1, Math.ceil((scroll.scrollTop + scroll.clientHeight - head) / height) + 4);
  if (!again && first === table.first && last === table.last) return;
  [table.first, table.last] = [first, last];
  const held = body.contains(document.activeElement) ? Number(document.activeElement.closest("tr").dataset.latent) : -1;
  const kept = new Map(), lines = [];
  for (let at = first; at <= last; at++) {
    const row = table.rows.get(at) || line(at);
    kept.set(at, row);
    lines.push(row);
  }
  table.rows = kept;
  const gap = rowsLeft => {
    const cell = el("td");
    cell.style.blockSize = `${rowsLeft * height}px`;
    return rowsLeft > 0 ? [el("tr", { class: "gap", "aria-hidden": "true" }, cell)] : [];
  };
  body.replaceChildren(...gap(first), ...lines, ...gap(table.order.length - 1 - last));
  roving();
  if (held >= 0) {
    const again = body.querySelector(`tr[data-latent="${held}"] a`);
    (again || scroll).focus({ preventScroll: true });
  }
}

function roving() {
  const links = [...table.rows.values()].map(row => row.querySelector("a"));
  const at = table.order.indexOf(table.focus >= 0 ? table.focus : table.open);
  const chosen = table.rows.get(at)?.querySelector("a") || links[0];
  for (const link of links) link.tabIndex = link === chosen ? 0 : -1;
}

function refresh() {
  arrange();
  heading();
  get("scroll").scrollTop = 0;
  draw(true);
}

function reveal(at) {
  const scroll = get("scroll"), top = at * table.height, room = scroll.clientHeight - get("table").tHead.offsetHeight;
  if (top < scroll.scrollTop) scroll.scrollTop = top;
  else if (top + table.height > scroll.scrollTop + room) scroll.scrollTop = top + table.height - room;
  draw();
}

function goTo(at) {
  if (!table.order.length) return;
  at = Math.max(0, Math.min(table.order.length - 1, at));
  table.focus = table.order[at];
  reveal(at);
  roving();
  table.rows.get(at)?.querySelector("a").focus({ preventScroll: true });
}

function tableKeys(event) {
  const row = event.target.closest?.("tbody tr");
  if (!row) return;
  const at = table.order.indexOf(Number(row.dataset.latent)), page = Math.max(1, table.last - table.first - 9);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: table.order.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  goTo(to);
}
