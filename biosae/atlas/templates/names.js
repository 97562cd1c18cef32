// Names and notes: kept in this browser under the fingerprint of the dictionary, saved to and loaded from a file.

const FIELDS = Object.keys(data.names.longest);
const KEY = `biosae-names:${data.fingerprint}`;
const names = { own: Object.create(null), dirty: false, kept: true };

function store(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { if (key === KEY) names.kept = false; }
  return null;
}

function plainText(text, lines) {
  const kept = String(text).replace(/\r\n?/g, "\n").replace(/[^\S\n\t ]/gu, " ")
    .replace(/(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}]/gu, "").normalize("NFC");
  return lines ? kept.trim() : kept.split(/\s+/u).filter(Boolean).join(" ");
}

function readKept() {
  try {
    const held = JSON.parse(store(KEY) || "{}");
    for (const [id, entry] of Object.entries(held.latents || {})) {
      if (!place.has(id)) continue;
      const own = {};
      for (const field of FIELDS) if (typeof entry[field] === "string") own[field] = entry[field];
      names.own[id] = own;
    }
    names.dirty = held.dirty === true;
  } catch { /* what another page left there is not ours */ }
}

function nameOf(latent, field = "name") {
  const own = names.own[latents.id[latent]];
  return own && own[field] !== undefined ? own[field] : latents[`given_${field}`][latent];
}

function rename(latent, field, text) {
  const value = plainText(text, field === "note").slice(0, data.names.longest[field]);
  if (value === nameOf(latent, field)) return;
  (names.own[latents.id[latent]] ||= {})[field] = value;
  names.dirty = true;
  keep();
  document.dispatchEvent(new CustomEvent("renamed", { detail: latent }));
}

function keep() {
  store(KEY, JSON.stringify({ latents: names.own, dirty: names.dirty }));
  const said = names.dirty ? (names.kept ? "kept in this browser, not in a file" : "not kept: save a file") : "";
  get("unsaved").textContent = said;
}

function saveNames() {
  const named = [];
  for (let i = 0; i < count; i++) {
    const entry = { latent: latents.id[i] };
    for (const field of FIELDS) entry[field] = plainText(nameOf(i, field), field === "note");
    if (FIELDS.some(field => entry[field])) named.push(entry);
  }
  const content = { format: data.names.format, version: data.names.version, fingerprint: data.fingerprint, latents: named };
  const link = el("a", {
    href: URL.createObjectURL(new Blob([JSON.stringify(content, null, 1) + "\n"], { type: "application/json" })),
    download: `names-${data.fingerprint.slice(0, 8)}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  names.dirty = false;
  keep();
}

function checked(text) {
  const content = JSON.parse(text.replace(/^\ufeff/, ""));
  if (content?.format !== data.names.format) throw Error("This is not a file of names.");
  if (content.version !== data.names.version) throw Error(`This page reads version ${data.names.version} of files of names.`);
  if (content.fingerprint !== data.fingerprint) throw Error("These names were given to the latents of another dictionary.");
  if (!Array.isArray(content.latents)) throw Error("The file holds no list of latents.");
  return content.latents.map(entry => {
    const latent = place.get(entry?.latent);
    if (latent === undefined) throw Error(`There is no latent ${String(entry?.latent).slice(0, 40)} here.`);
    const texts = {};
    for (const field of FIELDS) {
      if (entry[field] != null && typeof entry[field] !== "string") throw Error(`The ${field} of ${entry.latent} is not text.`);
      texts[field] = plainText(entry[field] || "", field === "note").slice(0, data.names.longest[field]);
    }
    return { latent, texts };
  });
}

async function loadNames(file) {
  let entries;
  try {
    if (file.size > 32 * 2 ** 20) throw Error("The file is too large for a file of names.");
    entries = checked(await file.text());
  } catch (error) {
    await ask("Nothing was loaded", error instanceof SyntaxError ? "The file is not valid JSON." : error.message, ["Close"]);
    return;
  }
  const changes = entries.flatMap(({ latent, texts }) => FIELDS
    .filter(field => texts[field] && texts[field] !== nameOf(latent, field))
    .map(field => ({ latent, field, text: texts[field], clash: nameOf(latent, field) !== "" })));
  const clashes = changes.filter(change => change.clash);
  let taken = changes;
  if (clashes.length) {
    const { latent, field, text } = clashes[0];
    const example = `${latents.id[latent]} ${field}: here “${nameOf(latent, field).slice(0, 80)}”, in the file “${text.slice(0, 80)}”.`;
    const answer = await ask("The file differs from what is here", `${plural(clashes.length, "text")} differ. ${example}`, ["Keep mine", "Take the file's", "Load nothing"]);
    if (answer === "Keep mine") taken = changes.filter(change => !change.clash);
    else if (answer !== "Take the file's") return;
  }
  const dirty = names.dirty;
  for (const { latent, field, text } of taken) rename(latent, field, text);
  names.dirty = dirty || taken.length < changes.length;
  keep();
  get("unsaved").textContent = taken.length ? `${plural(taken.length, "text")} loaded` : "nothing new in the file";
}

function ask(title, text, answers) {
  const dialog = get("question");
  get("question-title").textContent = title;
  get("question-text").textContent = text;
  get("question-buttons").replaceChildren(...answers.map(answer =>
    el("button", { type: "button", on: { click: () => dialog.close(answer) } }, answer)));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(done => dialog.addEventListener("close", () => done(dialog.returnValue), { once: true }));
}
