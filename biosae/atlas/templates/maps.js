// Maps: tokens over a picture, and tiles over a slide. Codes are drawn as they are, cell by cell, without smoothing;
// what is silent stays clear.

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
const COLD = [[247, 247, 247], [146, 197, 222], [33, 102, 172]], WARM = [[247, 247, 247], [244, 165, 130], [178, 24, 43]];
const LEVELS = 127;

function colour(value) { // value in -1..1
  const ramp = !data.signed ? RAMP : value < 0 ? COLD : WARM;
  const at = Math.min(1, Math.abs(value)) * (ramp.length - 1), i = Math.min(ramp.length - 2, Math.floor(at));
  return ramp[i].map((c, j) => Math.round(c + (ramp[i + 1][j] - c) * (at - i)));
}

const overlay = { on: true, opacity: 0.6 };

// index of an example among the maps of its latent, or -1
function mapOf(latent, kind, order) {
  const held = data.maps?.latents[latent];
  if (!held) return null;
  let before = 0;
  for (const [other, places] of Object.entries(held.at)) {
    const i = other === kind ? places.indexOf(order) : -1;
    if (i >= 0) {
      const [r, c] = data.maps.grid, size = r * c, codes = held.unpacked ||= unpack(held.codes, Int8Array);
      return { scale: held.scale, codes: codes.subarray((before + i) * size, (before + i + 1) * size) };
    }
    before += places.length;
  }
  return null;
}

function tokenCanvas(map, item) {
  const at = data.maps.boxes.of[item];
  if (at === undefined) return null;
  const [left, upper, right, lower] = data.maps.boxes.edges[at], [r, c] = data.maps.grid;
  const canvas = el("canvas", { class: "map", width: c, height: r, "aria-hidden": "true" });
  const image = new ImageData(c, r);
  map.codes.forEach((code, i) => image.data.set([...colour(code / LEVELS), code ? 255 : 0], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
  Object.assign(canvas.style, { left: `${100 * left}%`, top: `${100 * upper}%`, width: `${100 * (right - left)}%`, height: `${100 * (lower - upper)}%` });
  return canvas;
}

function scaleBar(scale, low, what) {
  const canvas = el("canvas", { class: "ramp", width: 64, height: 1, role: "img", "aria-label": `Colours from ${num(low)} to ${num(scale)}` });
  const image = new ImageData(64, 1), from = low / (scale || 1);
  for (let i = 0; i < 64; i++) image.data.set([...colour(from + (1 - from) * i / 63), 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return el("span", { class: "scale" }, el("span", {}, what), el("span", {}, num(low)), canvas, el("span", {}, num(scale)));
}

function slideSection(latent) {
  const slides = data.slides, held = slides?.latents[latent];
  if (!slides || !held) return null;
  held.where ||= unpack(held.tiles, slides.wide ? Uint32Array : Uint16Array);
  held.unpacked ||= unpack(held.codes, Int8Array);
  const sums = slides.names.map(() => [0, 0, 0]);
  slides.slide.forEach(s => sums[s][0]++);
  held.where.forEach((tile, i) => { const s = sums[slides.slide[tile]]; s[1]++; s[2] += Math.abs(held.unpacked[i]); });
  const strongest = sums.reduce((best, s, i) => s[2] > sums[best][2] ? i : best, 0);
  const choose = el("select", {}, ...slides.names.map((name, i) => el("option", { value: i },
    `${name}: ${whole(sums[i][1])} of ${whole(sums[i][0])} fire`)));
  choose.value = strongest;
  const canvas = el("canvas", { class: "slide", role: "img" }), said = el("p", { class: "small", role: "status" });
  let places = [];
  const paint = () => {
    const chosen = Number(choose.value), code = new Map();
    held.where.forEach((tile, i) => code.set(tile, held.unpacked[i] / LEVELS));
    const tiles = slides.slide.flatMap((s, i) => s === chosen ? [i] : []);
    const xs = tiles.map(i => slides.x[i]), ys = tiles.map(i => slides.y[i]), pitch = slides.pitch[chosen] || 1;
    const bounds = v => v.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
    const [x0, x1] = bounds(xs), [y0, y1] = bounds(ys), width = x1 - x0 + pitch, height = y1 - y0 + pitch;
    const step = Math.min(640 / width, 560 / height), dense = Math.min(2, devicePixelRatio || 1);
    canvas.width = Math.ceil(width * step * dense);
    canvas.height = Math.ceil(height * step * dense);
    canvas.style.inlineSize = `${Math.ceil(width * step)}px`;
    const pen = canvas.getContext("2d"), side = Math.max(1.5, pitch * step * dense * 0.94);
    const silent = getComputedStyle(document.documentElement).getPropertyValue("--silent");
    places = tiles.map((i, k) => [(xs[k] - x0 + pitch / 2) * step, (ys[k] - y0 + pitch / 2) * step, code.get(i) || 0]);
    for (const [x, y, v] of places) {
      pen.fillStyle = v ? `rgb(${colour(v).join(" ")})` : silent;
      pen.fillRect(x * dense - side / 2, y * dense - side / 2, side, side);
    }
    const tail = `${slides.names[chosen]}: fires in ${whole(sums[chosen][1])} of ${plural(sums[chosen][0], data.noun)}`;
    canvas.setAttribute("aria-label", `Map of slide ${tail}`);
    said.textContent = `${tail}. Grey: silent.`;
  };
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect(), ratio = parseFloat(canvas.style.inlineSize) / box.width;
    const x = (event.clientX - box.left) * ratio, y = (event.clientY - box.top) * ratio;
    const near = places.reduce((best, p) => { const d = (p[0] - x) ** 2 + (p[1] - y) ** 2; return d < best[0] ? [d, p] : best; }, [Infinity, null])[1];
    if (near) said.textContent = near[2] ? `Here: ${num(near[2] * held.scale)}` : "Here: silent";
  });
  canvas.addEventListener("pointerleave", paint);
  choose.addEventListener("change", paint);
  const section = part("Over slides", el("div", { class: "row" }, el("label", {}, "Slide", choose), scaleBar(held.scale, data.signed ? -held.scale : 0, `code of one ${data.noun}`)), canvas, said);
  section.addEventListener("paint", paint);
  paint();
  return section;
}
