// Small SVG charts: strings of markup, coloured by the classes of style.css, drawn at the width their box has.

// Fills the element `id` with a chart. content(width) gives the markup; label says in words what is to be seen.
function draw(id, height, label, content) {
  const box = document.getElementById(id);
  const width = Math.max(Math.floor(box.clientWidth), 200);
  box.innerHTML = `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img"
    aria-label="${label}">${content(width)}</svg>`;
}

const at = (x) => x.toFixed(1);
const line = (x1, y1, x2, y2, kind) =>
  `<line x1="${at(x1)}" y1="${at(y1)}" x2="${at(x2)}" y2="${at(y2)}" class="${kind}"/>`;
const text = (x, y, words, anchor = 'start', kind = '') =>
  `<text x="${at(x)}" y="${at(y)}" text-anchor="${anchor}" class="${kind}">${words}</text>`;
const path = (d, kind, width) =>
  d ? `<path d="${d}" class="${kind}"${width ? ` style="stroke-width:${at(width)}"` : ''}/>` : '';

// Bars from `base` to y(value), one per value, as one path. keep(i) chooses among them.
function bars(values, x, y, base, kind, width, keep = () => true) {
  let d = '';
  values.forEach((value, i) => {
    if (keep(i)) d += `M${at(x(i))} ${at(base)}V${at(y(value))}`;
  });
  return path(d, `bar ${kind}`, width);
}

// A dot per value.
function dots(values, x, y, kind, radius) {
  let d = '';
  values.forEach((value, i) => {
    d += `M${at(x(i))} ${at(y(value))}h0`;
  });
  return path(d, `dot ${kind}`, 2 * radius);
}

// A linear scale.
const scale = (from, to, low, high) => (value) => low + ((value - from) / (to - from || 1)) * (high - low);

// About three round numbers between -limit and limit.
function ticks(limit) {
  if (!(limit > 0)) return [0];
  const power = 10 ** Math.floor(Math.log10(limit));
  const round = [5, 2, 1].find((step) => step * power <= limit) * power;
  return [-round, 0, round];
}

// A number for people: three significant digits, thousands separated.
function show(value, digits = 3) {
  if (!Number.isFinite(value)) return String(value);
  const rounded = Number(value.toPrecision(digits));
  if (rounded !== 0 && Math.abs(rounded) < 1e-4) return rounded.toExponential();
  const [whole, fraction] = Math.abs(rounded).toString().split('.');
  const separated = whole.replace(/\B(?=(\d{3})+$)/g, ',');
  return `${rounded < 0 ? '−' : ''}${separated}${fraction ? `.${fraction}` : ''}`;
}
