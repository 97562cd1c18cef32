// What joins the parts: filters, the address of the page, keys, theme.

const THEMES = ["auto", "light", "dark"];
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let themed = "auto";

function openLatent(latent) { location.hash = encodeURIComponent(latents.id[latent]); }

function closeLatent() {
  const latent = table.open;
  history.replaceState(null, "", location.href.split("#")[0]);
  follow();
  const at = table.order.indexOf(latent);
  if (at >= 0) goTo(at); else get("scroll").focus();
}

function follow() {
  let id = location.hash.slice(1);
  try { id = decodeURIComponent(id); } catch { /* an address that nobody wrote */ }
  const latent = place.has(id) ? place.get(id) : -1;
  const moved = latent !== table.open;
  table.open = latent;
  document.body.classList.toggle("opened", latent >= 0);
  if (moved && latent >= 0) {
    table.focus = latent;
    showLatent(latent);
    document.title = `${id} · ${get("table").dataset.title}`;
  } else if (latent < 0) {
    get("latent").replaceChildren();
    document.title = get("table").dataset.title;
  }
  const at = table.order.indexOf(latent);
  draw(true);
  if (at >= 0) reveal(at);
  if (moved && latent >= 0 && !get("table").contains(document.activeElement)) get("latent").querySelector("h2").focus({ preventScroll: true });
}

function theme(chosen) {
  themed = THEMES.includes(chosen) ? chosen : "auto";
  document.documentElement.dataset.theme = themed === "auto" ? (darkSystem.matches ? "dark" : "light") : themed;
  get("theme").textContent = `Theme: ${themed}`;
  document.querySelector("canvas.slide")?.parentElement.dispatchEvent(new Event("paint"));
}

function keysAct(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.matches?.("input:not([type=checkbox]):not([type=range]), textarea, select");
  if (event.key === "Escape" && table.open >= 0) {
    event.target.blur?.();
    if (!typing) closeLatent();
    return;
  }
  if (typing || !get("keys").checked) return;
  const at = table.order.indexOf(table.open);
  const act = {
    "/": () => { get("query").focus(); get("query").select(); },
    j: () => table.order.length && openLatent(table.order[Math.min(at + 1, table.order.length - 1)]),
    k: () => table.order.length && openLatent(table.order[Math.max(at - 1, 0)]),
    n: () => get("name")?.focus(),
    m: () => { overlay.on = !overlay.on; if (get("maps")) get("maps").checked = overlay.on; showMaps(); },
    "?": () => get("about").showModal(),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
}

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value }, text)));
}

function start() {
  readKept();
  get("table").dataset.title = document.title;
  options(get("target"), [[-1, "strongest of all"], ...rows.target.words.map((text, i) => [i, text])]);
  const known = [...new Set(data.confounders.flatMap(list => list.slice(0, 1).map(entry => entry.flag)))].sort();
  options(get("flag"), [["", "any"], ...known.map(text => [text, text])]);
  get("flag").parentElement.hidden = !known.length;
  options(get("which"), Object.entries(WHICH).map(([value, [text]]) => [value, text]));
  get("facts").replaceChildren(...data.about.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, value))),
    el("div", {}, el("dt", {}, "Made by"), el("dd", {}, `biosae ${data.version}`)), el("div", {}, el("dt", {}, "Fingerprint of the dictionary"), el("dd", {}, el("code", {}, data.fingerprint.slice(0, 16)))));
  get("notes").replaceChildren(...data.notes.map(text => el("li", {}, text)));
  get("filters").addEventListener("submit", event => event.preventDefault());
  get("query").addEventListener("input", () => { view.query = get("query").value; refresh(); });
  get("query").addEventListener("keydown", event => { if (event.key === "ArrowDown") { event.preventDefault(); goTo(0); } if (event.key === "Enter" && table.order.length) openLatent(table.order[0]); });
  get("target").addEventListener("change", () => { view.target = Number(get("target").value); table.by = "association"; table.down = false; refresh(); });
  get("flag").addEventListener("change", () => { view.flag = get("flag").value; refresh(); });
  get("which").addEventListener("change", () => { view.which = get("which").value; refresh(); });
  let waiting = false;
  get("scroll").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }, { passive: true });
  get("scroll").addEventListener("keydown", tableKeys);
  get("scroll").addEventListener("click", event => {
    const row = event.target.closest("tbody tr[data-latent]");
    if (row && !event.target.closest("a")) openLatent(Number(row.dataset.latent));
  });
  get("save").addEventListener("click", saveNames);
  get("load").addEventListener("click", () => get("file").click());
  get("file").addEventListener("change", async () => {
    const [file] = get("file").files;
    if (file) await loadNames(file);
    get("file").value = "";
    draw(true);
    if (table.open >= 0) showLatent(table.open);
  });
  get("theme").addEventListener("click", () => {
    theme(THEMES[(THEMES.indexOf(themed) + 1) % THEMES.length]);
    store("biosae-theme", themed);
  });
  darkSystem.addEventListener("change", () => theme(themed));
  get("help").addEventListener("click", () => get("about").showModal());
  for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
  get("keys").checked = store("biosae-keys") !== "off";
  get("keys").addEventListener("change", () => store("biosae-keys", get("keys").checked ? "on" : "off"));
  document.addEventListener("keydown", keysAct);
  document.addEventListener("renamed", () => draw(true));
  addEventListener("hashchange", follow);
  addEventListener("resize", () => { table.height = 0; draw(true); });
  addEventListener("beforeunload", event => { if (names.dirty && !names.kept) event.preventDefault(); });
  theme(store("biosae-theme"));
  keep();
  refresh();
  follow();
}

start();
