// The page of one latent.

const part = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);

function head(latent) {
  const id = latents.id[latent];
  const name = el("input", { id: "name", maxlength: data.names.longest.name, placeholder: "no name yet", autocomplete: "off" });
  const note = el("textarea", { id: "note", rows: 2, maxlength: data.names.longest.note, placeholder: "what speaks for it, what against" });
  const known = data.names.statuses.includes(nameOf(latent, "status")) || !nameOf(latent, "status");
  const status = el("select", { id: "status" }, ...["", ...data.names.statuses, ...(known ? [] : [nameOf(latent, "status")])]
    .map(word => el("option", { value: word }, word || "not judged")));
  name.value = nameOf(latent);
  note.value = nameOf(latent, "note");
  status.value = nameOf(latent, "status");
  name.addEventListener("change", () => rename(latent, "name", name.value));
  name.addEventListener("keydown", event => { if (event.key === "Enter") { name.blur(); event.preventDefault(); } });
  note.addEventListener("change", () => rename(latent, "note", note.value));
  status.addEventListener("change", () => rename(latent, "status", status.value));
  const at = table.order.indexOf(latent);
  const go = (to, text, label) => el("button", { type: "button", class: "step", "aria-label": label, disabled: !(to >= 0 && to < table.order.length), on: { click: () => openLatent(table.order[to]) } }, text);
  return el("header", { class: "top" },
    el("div", { class: "row between" },
      el("button", { type: "button", class: "back", on: { click: closeLatent } }, "← Table"),
      el("div", { class: "row" }, go(at < 0 ? -1 : at - 1, "Previous", "Previous latent of the table"), go(at < 0 ? -1 : at + 1, "Next", "Next latent of the table"))),
    el("h2", { tabindex: "-1" }, id),
    el("div", { class: "naming" }, el("label", { class: "grow" }, "Name", name), el("label", {}, "Status", status), el("label", { class: "note-field" }, "Note", note)));
}

function figures(latent) {
  const pairs = [
    ["fires in", `${whole(latents.n_active?.[latent])} of ${plural(data.n_rows, data.row)} (${share(latents.density?.[latent])})`],
    data.n_patients && latents.n_active_patients ? ["patients", `${whole(latents.n_active_patients[latent])} of ${whole(data.n_patients)}`] : null,
    latents.top_share?.[latent] != null ? ["most in one patient", share(latents.top_share[latent])] : null,
    ["mean where it fires", num(latents.mean_active?.[latent])],
    ["largest", num(latents.max?.[latent])],
    latents.min ? ["smallest", num(latents.min[latent])] : null,
  ].filter(Boolean);
  const list = el("dl", { class: "facts" }, ...pairs.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, value))));
  return el("div", { class: "side" }, list, histogram(latent));
}

function histogram(latent) {
  const shape = data.histograms[latent];
  if (!shape) return el("p", { class: "small" }, "It never fires.");
  const width = 240, height = 64, most = Math.max(...shape.counts), step = width / shape.counts.length;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "histogram", role: "img", "aria-label": `Histogram of codes from ${num(shape.low)} to ${num(shape.high)}` });
  shape.counts.forEach((n, i) => {
    const h = n ? Math.max(1.5, (height - 2) * n / most) : 0;
    chart.append(svg("rect", { x: i * step + 0.5, y: height - h, width: step - 1, height: h }));
  });
  return el("figure", {}, chart, el("figcaption", { class: "ends" }, el("span", {}, num(shape.low)), el("span", {}, "code where it fires"), el("span", {}, num(shape.high))));
}

function flags(latent) {
  const list = data.confounders[latent];
  if (!list.length) return null;
  return part("Confounding", el("ul", { class: "plain" }, ...list.map(({ factor, flag, technical, biology }) => el("li", {},
    el("span", { class: `flag ${flag.replace(/ /g, "-")}` }, flag), ` ${factor}: η² ${num(technical)} of the technical factor, ${num(biology)} of biology`))));
}

function forest(row, low, high, zero) {
  const width = 150, x = value => 4 + (width - 8) * (Math.min(high, Math.max(low, value)) - low) / (high - low || 1);
  const chart = svg("svg", { viewBox: `0 0 ${width} 18`, class: "forest", "aria-hidden": "true" }, svg("line", { x1: x(zero), x2: x(zero), y1: 0, y2: 18, class: "zero" }));
  const [a, b] = [rows.ci_low?.[row], rows.ci_high?.[row]];
  if (a != null && b != null) chart.append(svg("line", { x1: x(a), x2: x(b), y1: 9, y2: 9, class: "span" }));
  if (rows.estimate?.[row] != null) chart.append(svg("circle", { cx: x(rows.estimate[row]), cy: 9, r: 3.5, class: rows.p?.[row] == null ? "untested" : "" }));
  return chart;
}

function grid(headings, lines, label) {
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label }, el("table", {},
    el("thead", {}, el("tr", {}, ...headings.map(([text, type]) => text ? el("th", { scope: "col", class: type }, text) : el("td", { class: type })))),
    el("tbody", {}, ...lines.map(cells => el("tr", {}, ...cells.map((cell, j) => el("td", { class: headings[j][1] }, cell)))))));
}

function associated(latent) {
  const mine = [];
  for (let row = firstRow[latent]; row < firstRow[latent + 1]; row++) mine.push(row);
  if (!mine.length) return part("Associations", el("p", { class: "small" }, "None in this run."));
  const ends = new Map();
  for (const row of mine) {
    const effect = rows.effect.at[row], zero = nullOf(row), span = ends.get(effect) || [zero, zero];
    for (const column of ["estimate", "ci_low", "ci_high"]) {
      const value = rows[column]?.[row];
      if (value != null) { span[0] = Math.min(span[0], value); span[1] = Math.max(span[1], value); }
    }
    ends.set(effect, span);
  }
  const has = column => rows[column] && mine.some(row => rows[column][row] != null);
  const differs = column => new Set(mine.map(row => word(column, row))).size > 1;
  // how many units, and groups of them, stand below the target: nobody should have to look for n
  const counted = row => `${plural(rows.n_units?.[row], word("unit", row) || "unit")}${rows.n_groups?.[row] != null && rows.n_groups[row] !== rows.n_units[row] ? ` of ${plural(rows.n_groups[row], data.group)}` : ""}`;
  const interval = row => has("ci_low") && rows.ci_low[row] != null ? `${num(rows.ci_low[row])} to ${num(rows.ci_high[row])}` : "";
  const columns = [
    ["target, n", "target", row => lines(word("target", row) + (word("contrast", row) ? ` (${word("contrast", row)})` : ""), counted(row))],
    [`${differs("effect") ? "estimate" : word("effect", mine[0])}${has("ci_low") ? ", 95 % interval" : ""}`, "short", row => lines(`${differs("effect") ? `${word("effect", row)} ` : ""}${num(rows.estimate?.[row])}`, interval(row))],
    ["", "forests", row => forest(row, ...ends.get(rows.effect.at[row]), nullOf(row))],
    has("p") ? ["p", "num", row => lines(chance(rows.p[row]), ...(rows.p_maxt?.[row] != null ? ["by max-T", chance(rows.p_maxt[row])] : []))] : null,
    has("q") ? ["q", "num", row => chance(rows.q[row])] : null,
    mine.some(row => word("status", row) !== "ok") ? ["status", "", row => word("status", row)] : null,
  ].filter(Boolean);
  const refused = mine.filter(row => rows.p?.[row] == null).length;
  const said = refused ? `${refused === mine.length ? "None of these was tested" : `${refused} of ${mine.length} were not tested`}: an open mark is an estimate without a p-value.` : "";
  return part("Associations", grid(columns, mine.map(row => columns.map(column => column[2](row))), "Associations"), said ? el("p", { class: "small" }, said) : null);
}

const lines = (first, ...more) => el("span", {}, first, ...more.filter(Boolean).map(text => el("span", { class: "small below" }, text)));

function card(latent) {
  const cards = data.cards[latent];
  if (!cards) return part("Stress card", el("p", { class: "small" }, "None was made for this latent (biosae.interpret.stress)."));
  const chosen = cards.some(card => card.chosen) ? el("p", { class: "small" }, "Made because this latent stands first for the target, on the samples that put it there: scores are too high on average. Judge it on others.") : null;
  return part("Stress card", chosen, ...cards.flatMap(({ claim, checks }) => {
    const made = checks.filter(check => check.verdict !== "refused"), refused = checks.filter(check => check.verdict === "refused");
    const named = check => check.check + (check.of ? ` (${check.of})` : "");
    return [
      el("p", { class: "claim" }, claim),
      made.length ? grid([["check", "text"], ["verdict", ""], ["score (dashed: least)", "plot"]], made.map(check => [
        lines(named(check), check.reading),
        el("span", { class: "once" }, el("span", { class: `verdict ${check.verdict.replace(/ /g, "-")}` }, check.verdict), ...[plural(check.n_patients, "patient"), plural(check.n_samples, "sample")].map(text => el("span", { class: "small below" }, text))),
        check.score == null ? "" : el("span", { class: "row" }, num(check.score), scored(check)),
      ]), `Stress card: ${claim}`) : null,
      refused.length ? el("p", { class: "small" }, `Not measured: ${refused.map(check => `${named(check)}: ${check.reason}`).join("; ")}.`) : null,
    ];
  }).filter(Boolean));
}

function scored(check) {
  const x = value => 4 + 142 * Math.min(1, Math.max(0, value));
  const chart = svg("svg", { viewBox: "0 0 150 18", class: "forest", "aria-hidden": "true" },
    svg("line", { x1: x(0), x2: x(1), y1: 9, y2: 9, class: "track" }), svg("line", { x1: x(check.threshold), x2: x(check.threshold), y1: 2, y2: 16, class: "zero" }));
  if (check.ci_low != null) chart.append(svg("line", { x1: x(check.ci_low), x2: x(check.ci_high), y1: 9, y2: 9, class: "span" }));
  chart.append(svg("circle", { cx: x(check.score), cy: 9, r: 3.5 }));
  return chart;
}

function framed(latent, kind, order, item, alt) {
  const frame = el("span", { class: "frame" }, picture(item, alt));
  const map = data.pictures.src[item] ? mapOf(latent, kind, order) : null;
  const canvas = map && tokenCanvas(map, item);
  if (canvas) frame.append(canvas);
  return frame;
}

function example(latent, kind, order) {
  const shown = data.galleries[latent][kind], item = shown.items[order], value = shown.values[order];
  const who = data.patients[item], beside = kind === "near" ? `cos ${num(shown.likeness[order])}` : value ? num(value) : "silent";
  const label = `${data.headings[kind]}, ${data.noun} ${order + 1}: ${beside}${who ? `, patient ${who}` : ""}`;
  return el("button", { type: "button", class: "tile", on: { click: () => enlarge(latent, kind, order, label) } },
    framed(latent, kind, order, item, ""), el("span", { class: "hidden" }, `${data.headings[kind]}, ${data.noun} ${order + 1}: `),
    el("span", { class: "said" }, el("b", {}, beside), who ? el("span", {}, " ", who) : null));
}

function gallery(latent) {
  const shown = data.galleries[latent];
  const blocks = Object.keys(data.headings).filter(kind => shown[kind]).map(kind => el("div", { class: `kind ${kind}` },
    el("h4", {}, `${data.headings[kind][0].toUpperCase()}${data.headings[kind].slice(1)} (${shown[kind].items.length})`),
    el("div", { class: "tiles" }, ...shown[kind].items.map((_, order) => example(latent, kind, order)))));
  const held = data.maps?.latents[latent];
  const tools = el("div", { class: "row" });
  if (held) {
    const on = el("input", { type: "checkbox", id: "maps" }), opacity = el("input", { type: "range", id: "opacity", min: 0.1, max: 1, step: 0.05 });
    on.checked = overlay.on;
    opacity.value = overlay.opacity;
    on.addEventListener("change", () => { overlay.on = on.checked; showMaps(); });
    opacity.addEventListener("input", () => { overlay.opacity = Number(opacity.value); showMaps(); });
    tools.append(el("label", { class: "check" }, on, ` Where in the ${data.noun} it fires`), el("label", { class: "inline" }, "Strength of the map", opacity), scaleBar(held.scale, data.signed ? -held.scale : 0, "code of a token"));
  }
  const enough = ["near", "inactive"].some(kind => shown[kind]) && ["spread", "active", "top"].some(kind => shown[kind]);
  if (enough) tools.append(el("button", { type: "button", on: { click: () => trial(latent) } }, "Test yourself"));
  const size = data.item ? el("p", { class: "small" }, `Each ${data.noun}: ${data.item}.`) : null;
  return part("Examples and controls", size, tools, ...blocks);
}

function showMaps() {
  document.documentElement.dataset.maps = overlay.on ? "on" : "off";
  for (const canvas of document.querySelectorAll("canvas.map")) canvas.style.opacity = overlay.opacity;
}

function enlarge(latent, kind, order, label) {
  get("viewer-title").textContent = `${latents.id[latent]}${nameOf(latent) ? ` ${nameOf(latent)}` : ""}`;
  const item = data.galleries[latent][kind].items[order];
  const plain = el("span", { class: "frame" }, picture(item, label));
  const map = data.maps && data.pictures.src[item] ? mapOf(latent, kind, order) : null;
  get("viewer-body").replaceChildren(el("p", {}, label[0].toUpperCase() + label.slice(1)),
    data.item ? el("p", { class: "small" }, data.item) : "", el("div", { class: "pair" }, plain, map ? framed(latent, kind, order, item, `The same ${data.noun} with the map of ${latents.id[latent]}`) : null),
    map ? scaleBar(data.maps.latents[latent].scale, data.signed ? -data.maps.latents[latent].scale : 0, "code of a token") : "");
  showMaps();
  get("viewer").showModal();
}

// a reader who has seen only the highest examples says of others whether the latent fires in them
function trial(latent) {
  const shown = data.galleries[latent];
  const draw = (kinds, fires) => kinds.flatMap(kind => (shown[kind]?.items || []).map(item => ({ item, fires })));
  const shuffled = list => list.map(entry => [Math.random(), entry]).sort((a, b) => a[0] - b[0]).map(([, entry]) => entry);
  const firing = shuffled(draw(["spread", "active"], true).concat(shown.spread || shown.active ? [] : draw(["top"], true)));
  const silent = shuffled(draw(["near", "inactive"], false)), n = Math.min(6, firing.length, silent.length);
  const cards = shuffled([...firing.slice(0, n), ...silent.slice(0, n)]), said = el("p", { role: "status" });
  get("viewer-title").textContent = `${latents.id[latent]}: does it fire here?`;
  const tiles = cards.map(({ item }, i) => el("button", { type: "button", class: "tile guess", "aria-pressed": "false", on: { click: event => {
    const tile = event.currentTarget;
    tile.setAttribute("aria-pressed", tile.getAttribute("aria-pressed") !== "true");
  } } }, el("span", { class: "frame" }, picture(item, "")), el("span", { class: "hidden" }, `${data.noun} ${i + 1}: it fires`), el("span", { class: "said" })));
  const show = el("button", { type: "button", on: { click: () => {
    let right = 0;
    tiles.forEach((tile, i) => {
      const guess = tile.getAttribute("aria-pressed") === "true", good = guess === cards[i].fires;
      right += good;
      tile.disabled = true;
      tile.querySelector(".said").textContent = `${cards[i].fires ? "fires" : "silent"}: ${good ? "right" : "wrong"}`;
    });
    said.textContent = `${right} of ${cards.length} right; guessing gives ${cards.length / 2} on average.`;
    show.disabled = true;
  } } }, "Show the answer");
  get("viewer-body").replaceChildren(el("p", {}, `Mark the ${data.noun}s in which you expect it to fire. Half of them do. They are among the examples of this page, so try before you have looked at more than the highest.`), el("div", { class: "tiles" }, ...tiles), el("div", { class: "row" }, show, said));
  get("viewer").showModal();
}

function near(latent) {
  const list = data.neighbours[latent];
  if (!list.length) return null;
  return part("Nearest latents", el("ul", { class: "near" }, ...list.map(([other, cosine]) => el("li", {},
    el("a", { href: `#${encodeURIComponent(latents.id[other])}` }, latents.id[other], nameOf(other) ? ` ${nameOf(other)}` : ""), el("span", { class: "strip" }, ...((data.galleries[other].top || {}).items || []).slice(0, 3).map(item => picture(item, ""))), el("span", { class: "small" }, `cosine ${num(cosine)}`)))));
}

function showLatent(latent) {
  get("latent").replaceChildren(...[head(latent), figures(latent), gallery(latent), associated(latent), slideSection(latent), card(latent), flags(latent), near(latent)].filter(Boolean));
  get("latent").scrollTop = 0;
  showMaps();
}
