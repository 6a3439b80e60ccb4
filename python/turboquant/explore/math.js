// The arithmetic of the page that is not the codec's.

// Mulberry32: 32 random bits per call, the same for the same seed.
function randomBits(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (t ^ (t >>> 14)) >>> 0;
  };
}

// Standard normal numbers (Box-Muller).
function normals(bits) {
  const uniform = () => (bits() + 0.5) / 2 ** 32;
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}

const square = (x) => x * x;
const sum = (xs) => xs.reduce((total, x) => total + x, 0);
function norm(x) {
  let total = 0;
  for (let i = 0; i < x.length; i++) total += x[i] * x[i];
  return Math.sqrt(total);
}
const rms = (x) => (x.length ? norm(x) / Math.sqrt(x.length) : 0);
const largest = (x) => x.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
const difference = (a, b) => Float64Array.from(a, (v, i) => v - b[i]);
const flipped = (x, signs) => Float32Array.from(x, (v, i) => v * signs[i]);

// Rounding to 2^bits evenly spaced values between the smallest and the largest one.
function minMax(x, bits) {
  const low = Math.min(...x), high = Math.max(...x), width = (high - low) / (2 ** bits - 1);
  const indices = Array.from(x, (v) => (width ? Math.round((v - low) / width) : 0));
  const levels = Array.from({ length: 2 ** bits }, (_, i) => low + i * width);
  return { low, high, width, indices, levels, values: Float32Array.from(indices, (i) => levels[i]) };
}

// Density and distribution function of N(0, 1); the latter by its series (Marsaglia 2004), good to 1e-15.
const density = (x) => (Math.abs(x) > 38 ? 0 : Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI));
function cumulative(x) {
  if (Math.abs(x) > 8) return x > 0 ? 1 : 0;
  let term = x, total = x;
  for (let i = 3; total !== total + term; i += 2) {
    term *= (x * x) / i;
    total += term;
  }
  return 0.5 + total * density(x);
}

// The slots of ascending levels: each value goes to the nearest, so the borders are midpoints.
function slots(levels) {
  return levels.map((level, i) => ({
    level,
    from: i ? (levels[i - 1] + level) / 2 : -Infinity,
    to: i < levels.length - 1 ? (level + levels[i + 1]) / 2 : Infinity,
  }));
}

const edge = (x, value) => (Number.isFinite(x) ? value : 0);

// One Lloyd step for N(0, 1): each level moves to the mean of its slot.
function lloydStep(levels) {
  return slots(levels).map(({ from, to }) => (density(from) - density(to)) / (cumulative(to) - cumulative(from)));
}

// The mean squared error of rounding N(0, 1) to the nearest level.
function normalError(levels) {
  return sum(slots(levels).map(({ level, from, to }) =>
    (1 + level * level) * (cumulative(to) - cumulative(from)) - 2 * level * (density(from) - density(to)) +
    edge(from, from * density(from)) - edge(to, to * density(to))));
}

// The evenly spaced levels with the least error for N(0, 1), by golden-section search over their distance.
function bestUniform(bits) {
  const levels = (width) => Array.from({ length: 2 ** bits }, (_, i) => (i - (2 ** bits - 1) / 2) * width);
  const ratio = (Math.sqrt(5) - 1) / 2;
  let a = 0, b = 4;
  while (b - a > 1e-9) {
    const c = b - ratio * (b - a), d = a + ratio * (b - a);
    if (normalError(levels(c)) < normalError(levels(d))) b = d;
    else a = c;
  }
  return levels((a + b) / 2);
}

// The steps of the codec's rotation in float32: the input, signs S1, log2 n butterfly stages, signs S2 with 1/sqrt(n).
function rotationSteps(x, signs1, signs2) {
  const n = x.length;
  const steps = [{ kind: 'input', y: Float32Array.from(x) }];
  let y = flipped(x, signs1);
  steps.push({ kind: 'signs', y });
  for (let h = 1; h < n; h *= 2) {
    y = Float32Array.from(y, (v, i) => (i & h ? y[i - h] - v : v + y[i + h]));
    steps.push({ kind: 'stage', h, y });
  }
  const scale = Math.fround(1 / Math.sqrt(n));
  steps.push({ kind: 'final', y: Float32Array.from(y, (v, i) => Math.fround(v * signs2[i]) * scale) });
  return steps;
}

// Row r of the Walsh-Hadamard matrix in natural order.
function walsh(r, n) {
  return Float32Array.from({ length: n }, (_, i) => {
    let odd = 0;
    for (let common = i & r; common; common &= common - 1) odd ^= 1;
    return odd ? -1 : 1;
  });
}

// What `count` random rotations of x make of it, relative to its length. how: 'once' = random signs, then the codec's
// rotation; 'twice' = both again; 'uniform' = uniformly distributed over all rotations.
function randomRotations(codec, x, bits, count, how, seed) {
  const n = x.length, length = norm(x) || 1, unit = x.map((v) => v / length);
  const random = randomBits(seed), normal = normals(random);
  const flip = (target, source, at) => {
    for (let i = 0, word = 0; i < n; i++) {
      word = i % 32 ? word >>> 1 : random();
      target[i] = word & 1 ? -source[at + i] : source[at + i];
    }
  };
  const input = new Float32Array(count * n);
  for (let r = 0; r < count; r++) {
    const block = input.subarray(r * n, (r + 1) * n);
    if (how === 'uniform') {
      for (let i = 0; i < n; i++) block[i] = normal();
      const factor = 1 / norm(block);
      for (let i = 0; i < n; i++) block[i] *= factor;
    } else {
      flip(block, unit, 0);
    }
  }
  if (how === 'twice') {
    const first = codec.rotate(n, input);
    for (let r = 0; r < count; r++) flip(input.subarray(r * n, (r + 1) * n), first, r * n);
  }
  const rotated = codec.rotate(n, input);
  const decoded = codec.decode(bits, n, codec.encode(bits, n, input));
  let wrong = 0, energy = 0;
  for (let i = 0; i < input.length; i++) {
    wrong += (decoded[i] - input[i]) ** 2;
    energy += input[i] ** 2;
  }
  return { rotated, error: energy ? wrong / energy : 0 };
}

// Counts of values in `bins` equal bins over -span ... span; what lies outside goes to `below` and `above`.
function histogram(values, bins, span) {
  const counts = new Float64Array(bins);
  let below = 0, above = 0;
  const perUnit = bins / (2 * span);
  for (let i = 0; i < values.length; i++) {
    const bin = Math.floor((values[i] + span) * perUnit);
    if (bin < 0) below++;
    else if (bin >= bins) above++;
    else counts[bin]++;
  }
  return { counts, below, above };
}

// The largest distance between the distribution of `values` and N(0, sigma^2), from 4096 bins over 6 sigma: to 0.001.
function kolmogorov(values, sigma) {
  const bins = 4096, span = 6;
  const { counts, below } = histogram(values, bins, span * sigma);
  let seen = below, most = 0;
  for (let i = 0; i <= bins; i++) {
    most = Math.max(most, Math.abs(seen / values.length - cumulative((2 * span * i) / bins - span)));
    seen += counts[i];
  }
  return most;
}
