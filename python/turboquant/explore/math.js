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

// 1 if the number of set bits is odd.
function parity(x) {
  let odd = 0;
  for (; x; x &= x - 1) odd ^= 1;
  return odd;
}

// Row r of the Walsh-Hadamard matrix in natural order.
const walsh = (r, n) => Float32Array.from({ length: n }, (_, i) => (parity(i & r) ? -1 : 1));

// ---- the trellis: its state is the newest six path bits, the newest in bit 0 ---------------------------------------

const stateCount = 64;
const taps = [[2, 5], [0, 1, 6]]; // the path bits, by their age in steps, whose sum modulo 2 is bit 0 or 1 of the subset
const masks = taps.map((ages) => sum(ages.map((age) => 2 ** age)));
// The subset of a step. `window` is the state before the step, followed by the step's path bit.
const subsetOf = (window) => 2 * parity(window & masks[1]) + parity(window & masks[0]);
const elementOf = (t, n) => (t % 8) * (n / 8) + (t >> 3);

// The states before the first step and after each step of an encoded block.
function pathOf(block, n) {
  const states = [];
  for (let i = 10, state = 0; i < 16 + n; i++) {
    state = ((state << 1) | ((block[i >> 3] >> (i & 7)) & 1)) % stateCount;
    if (i >= 15) states.push(state);
  }
  return states;
}

// The Viterbi algorithm. metric[t][c]: cost of subset c in step t. Returns for each step and each state the state before
// on the cheapest path there, and the cheapest of all paths, as pathOf does.
function cheapestPaths(metric) {
  const before = [];
  let cost = new Array(stateCount).fill(0);
  for (const m of metric) {
    const from = [], next = [];
    for (let state = 0; state < stateCount; state++) {
      const lower = state >> 1, upper = lower | (stateCount / 2), bit = state & 1;
      const a = cost[lower] + m[subsetOf(2 * lower + bit)], b = cost[upper] + m[subsetOf(2 * upper + bit)];
      from.push(b < a ? upper : lower);
      next.push(Math.min(a, b));
    }
    before.push(from);
    cost = next;
  }
  const best = [cost.indexOf(Math.min(...cost))];
  for (let t = metric.length - 1; t >= 0; t--) best.unshift(before[t][best[0]]);
  return { before, best };
}

// The last branches of the cheapest paths to all states after step t: for each step the pairs [state before, after].
function survivors(before, t) {
  const branches = [];
  let alive = Array.from({ length: stateCount }, (_, state) => state);
  for (let j = t; j >= 0; j--) {
    branches[j] = alive.map((state) => [before[j][state], state]);
    alive = [...new Set(branches[j].map(([from]) => from))];
  }
  return branches;
}

// The value of `levels` nearest to x.
const nearest = (levels, x) => levels.reduce((best, k) => (Math.abs(k - x) < Math.abs(best - x) ? k : best));
const levelsOf = (subset, levels) => Array.from(levels).filter((_, i) => i % 4 === subset);

// The levels of a path that takes the nearer of its two subsets in each step, without looking ahead.
function greedyLevels(state, values, levels) {
  return values.map((value) => {
    const choices = [0, 1].map((bit) => nearest(levelsOf(subsetOf(2 * state + bit), levels), value));
    const bit = Math.abs(choices[1] - value) < Math.abs(choices[0] - value) ? 1 : 0;
    state = (2 * state + bit) % stateCount;
    return choices[bit];
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
