// The data of the page, and small helpers. Text from the data reaches the page as text only, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const latents = data.latents, rows = data.associations;
const count = latents.id.length;
const place = new Map(latents.id.map((id, i) => [id, i]));
const get = id => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter(child => child != null));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const whole = value => value == null ? "–" : value.toLocaleString("en");
const share = value => value == null ? "–" : value >= 0.0995 || value === 0 ? `${(100 * value).toFixed(0)} %` : `${(100 * value).toPrecision(2)} %`;

function num(value, digits = 2) {
  if (value == null) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(size).toLocaleString("en")
    : size >= 0.01 || size === 0 ? size.toFixed(digits) : Number(size.toPrecision(2)).toString();
  return (value < 0 ? "−" : "") + text;
}

const power = text => text.replace(/^(.+)e-0*(\d+)$/, (_, a, b) => `${a} × 10⁻${[...b].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")}`);
const chance = value => value == null ? "–" : value === 0 ? "< 10⁻³⁰⁰" : value >= 0.001 ? String(Number(value.toPrecision(2))) : power(value.toExponential(0));
const plural = (n, noun) => `${whole(n)} ${noun}${n === 1 ? "" : "s"}`;
const word = (column, row) => rows[column] && rows[column].at[row] >= 0 ? rows[column].words[rows[column].at[row]] : "";
const nullOf = row => rows.null[rows.effect.at[row]] ?? 0;

function unpack(text, Kind) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

// rows of each latent: they stand together, the strongest evidence first
const firstRow = new Int32Array(count + 1);
for (const latent of rows.latent) firstRow[latent + 1]++;
for (let i = 0; i < count; i++) firstRow[i + 1] += firstRow[i];

function bestRow(latent, target) {
  for (let row = firstRow[latent]; row < firstRow[latent + 1]; row++) {
    if (target < 0 || rows.target.at[row] === target) return row;
  }
  return -1;
}

function picture(item, alt) {
  const source = data.pictures.src[item];
  if (source) return el("img", { src: `data:image/webp;base64,${source}`, alt, decoding: "async" });
  return el("span", { class: "gone" }, data.pictures.why[item] || "no picture");
}

const flagOf = latent => data.confounders[latent].length ? data.confounders[latent][0].flag : "";
const checksOf = latent => (data.cards[latent] || []).flatMap(card => card.checks);
