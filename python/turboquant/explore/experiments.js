// One function per experiment, which draws everything it shows from `state`.
const element = (id) => document.getElementById(id);
const fill = (id, html) => {
  element(id).innerHTML = html;
};
const percent = (share) => `${show(100 * share)} %`;
const times = (count, noun) => `${show(count, 9)} ${noun}${count === 1 ? '' : 's'}`;

const state = {
  n: 128, outliers: 5, size: 20, bits: 4, seed: 1, // the vector, and the width of an index
  plainRotate: false, turboRotate: true,
  stage: 4,
  count: 4, how: 'once', bellSeed: 1, // 10^count rotations
  levels: null, lloydSteps: 0, // null: the codec's
  element: 5,
  row: 0, raise: 1,
  step: 54, // of the trellis
};
let codec;

// ---- the vector ----------------------------------------------------------------------------------------------------

// Standard normal values. An outlier is its value times the size, and at least half the size.
function makeVector({ n, outliers, size, seed }) {
  const random = randomBits(seed), normal = normals(random);
  const x = Float32Array.from({ length: 128 }, normal).slice(0, n);
  const order = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = random() % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  const chosen = new Set(order.slice(0, outliers));
  for (const c of chosen) x[c] = Math.sign(x[c]) * Math.max(Math.abs(x[c]), 0.5) * size;
  return { x, chosen };
}

const channelScale = (n, width, left, right) => scale(-0.5, n - 0.5, left, width - right);
const barWidth = (n, width) => Math.max(((width - 50) / n) * 0.6, 1);

// The interval that holds zero and all values, with some space around.
function interval(...arrays) {
  let low = 0, high = 0;
  for (const v of arrays.flatMap((a) => Array.from(a))) {
    low = Math.min(low, v);
    high = Math.max(high, v);
  }
  const space = 0.05 * (high - low) || 1;
  return [low - space, high + space];
}

// Axis numbers at the left edge.
function valueAxis(y, [low, high], width, left) {
  return ticks(Math.max(-low, high)).filter((value) => low <= value && value <= high).map((value) =>
    line(left, y(value), width, y(value), value ? 'grid' : 'axis') +
    text(left - 6, y(value) + 4, show(value), 'end')).join('');
}

// ---- 1: min-max beside the codec -----------------------------------------------------------------------------------

// Both return the values that are rounded, what they become, the levels, the indices, and the vector that comes back.
function plainQuantizer(x, bits, rotate) {
  const n = x.length;
  const before = rotate ? codec.rotate(n, x) : x;
  const { levels, indices, values, width } = minMax(before, bits);
  const back = rotate ? codec.unrotate(n, values) : values;
  return { before, after: values, levels, indices, back, widths: [width, width], perValue: bits + 32 / n };
}

function turboQuantizer(x, bits, rotate) {
  const n = x.length;
  const input = rotate ? x : codec.unrotate(n, x); // then the codec's rotation gives x again
  const block = codec.encode(bits, n, input);
  const after = codec.decodeRotated(bits, n, block);
  const unit = half(block[0], block[1]) * codec.step(bits);
  const levels = Array.from(codec.centroids(bits), (k) => k * unit);
  const gaps = levels.slice(1).map((level, i) => level - levels[i]);
  return {
    before: rotate ? codec.rotate(n, x) : x, after, levels, indices: codec.unpack(bits, n, block),
    back: rotate ? codec.decode(bits, n, block) : after,
    widths: [Math.min(...gaps), Math.max(...gaps)], perValue: (8 * block.length) / n,
  };
}

function drawLevels(id, q, kind, chosen) {
  const n = q.before.length, left = 34, height = 190, used = new Set(q.indices);
  const range = interval(q.before, q.after), shown = (level) => range[0] < level && level < range[1];
  const label = `${n} values and the ${used.size} of ${q.levels.length} levels that they use`;
  draw(id, height, label, (width) => {
    const x = channelScale(n, width, left, 0), y = scale(...range, height - 12, 4);
    const levels = q.levels.map((level, i) =>
      shown(level) ? line(left, y(level), width, y(level), used.has(i) ? 'level' : 'level unused') : '');
    const marks = [...chosen].map((c) => `M${at(x(c) - 3)} ${height}l3 -6 3 6z`).join('');
    return valueAxis(y, range, width, left) + levels.join('') +
      bars(q.before, x, y, y(0), 'value', barWidth(n, width)) +
      dots(q.after, x, y, kind, n > 64 ? 1.7 : 2.2) + path(marks, 'mark');
  });
}

function drawErrors(id, errors, range, kind) {
  const n = errors.length, left = 34, height = 96;
  const label = `Error of each channel, at most ${show(largest(errors))}`;
  draw(id, height, label, (width) => {
    const x = channelScale(n, width, left, 0), y = scale(...range, height - 6, 6);
    return valueAxis(y, range, width, left) + bars(errors, x, y, y(0), kind, barWidth(n, width));
  });
}

function grid() {
  const { bits, plainRotate, turboRotate } = state;
  const { x, chosen } = makeVector(state);
  const plain = plainQuantizer(x, bits, plainRotate), turbo = turboQuantizer(x, bits, turboRotate);
  fill('plain-title', plainRotate ? 'Min-max of the rotated vector' : 'Min-max');
  fill('turbo-title', turboRotate ? 'TurboQuant' : 'TurboQuant without its rotation');

  const both = [plain, turbo];
  const errors = both.map((q) => difference(q.back, x));
  const range = interval(...errors);
  for (const [i, name] of ['plain', 'turbo'].entries()) {
    const rotated = state[`${name}Rotate`];
    drawLevels(`${name}-levels`, both[i], name, rotated ? [] : chosen);
    fill(`${name}-levels-caption`, rotated ? 'The rotated values and their levels' : 'The values and their levels');
    drawErrors(`${name}-errors`, errors[i], range, name);
  }

  const ordinary = (values) => values.filter((_, i) => !chosen.has(i));
  const rows = [
    ['Range', (q) => `${show(Math.min(...q.before))} … ${show(Math.max(...q.before))}`],
    ['Levels in use', (q) => `${new Set(q.indices).size} of ${q.levels.length}`],
    ['Distance of levels', ({ widths: [a, b] }) => (show(a) === show(b) ? show(a) : `${show(a)} … ${show(b)}`)],
    ['Largest error', (_, e) => show(largest(e))],
    ['RMS error', (_, e) => show(rms(e))],
    ['RMS error of ordinary channels', (_, e) => show(rms(ordinary(e)))],
    ['Error, relative to the vector', (_, e) => percent(norm(e) / norm(x))],
    ['Bits per value', (q) => show(q.perValue, 5)],
  ];
  fill('grid-table', rows.map(([name, value]) =>
    `<tr><th scope="row">${name}</th>${both.map((q, i) => `<td>${value(q, errors[i])}</td>`).join('')}</tr>`).join(''));

  const [plainError, turboError] = errors.map(norm);
  let enough = 1;
  while (enough < 24 && norm(difference(plainQuantizer(x, enough, plainRotate).back, x)) > turboError) enough++;
  const [plainName, turboName] = [plainRotate ? 'min-max after rotation' : 'min-max',
    turboRotate ? 'TurboQuant' : 'TurboQuant without its rotation'];
  fill('grid-result', plainError > turboError
    ? `At ${bits} bits ${plainName} errs ${show(plainError / turboError)} times as much. It needs ${enough} bits to do as
       well as ${turboName} with ${bits}. The ordinary channels, whose RMS is ${show(rms(ordinary(x)))}, are off by
       ${show(rms(ordinary(errors[0])))} with it and by ${show(rms(ordinary(errors[1])))} with TurboQuant.`
    : `At ${bits} bits ${plainName} does as well or better here: its error is ${show(plainError / turboError)} times that
       of ${turboName}.`);
}

// ---- 2: the butterfly ----------------------------------------------------------------------------------------------

function butterfly() {
  const { n } = state, stages = Math.log2(n);
  const { x } = makeVector(state);
  const steps = rotationSteps(x, codec.signs(1, n), codec.signs(2, n));
  const s = state.stage, step = steps[s];
  const done = Math.min(Math.max(s - 1, 0), stages); // butterfly stages so far
  const tracked = x.reduce((best, v, i) => (Math.abs(v) > Math.abs(x[best]) ? i : best), 0);
  const reached = (i, stage) => i >> stage === tracked >> stage;
  // Without the factor that the stages add to the length.
  const even = steps.map(({ kind, y }, i) =>
    kind === 'stage' ? Float64Array.from(y, (v) => v / Math.SQRT2 ** (i - 1)) : y);
  const limit = 1.05 * Math.max(largest(even[s]), largest(even[Math.max(s - 1, 0)])) || 1;

  const names = ['the vector', 'signs S1', ...steps.slice(2, -1).map(({ h }) => `values ${h} apart`), 'signs S2, 1/√n'];
  const label = `Before and after step ${s} of ${steps.length - 1}, ${names[s]}`;
  const height = 300;
  draw('butterfly-chart', height, label, (width) => {
    const at0 = channelScale(n, width, 2, 2), thick = Math.max(((width - 4) / n) * 0.6, 1);
    const upper = scale(-limit, limit, 96, 2), lower = scale(-limit, limit, height - 2, height - 96);
    const stageBefore = step.kind === 'stage' ? done - 1 : done;
    const part = (values, y, stage) =>
      line(0, y(0), width, y(0), 'axis') +
      bars(values, at0, y, y(0), 'value', thick, (i) => !reached(i, stage)) +
      bars(values, at0, y, y(0), 'turbo', thick, (i) => reached(i, stage));
    if (step.kind === 'input') return part(even[0], lower, 0);
    let plain = '', marked = '', flips = '';
    const flip = step.kind === 'signs' ? codec.signs(1, n) : codec.signs(2, n);
    for (let i = 0; i < n; i++) {
      for (const j of step.kind === 'stage' ? [i, i ^ step.h] : [i]) {
        const wire = `M${at(at0(i))} 100L${at(at0(j))} ${height - 100}`;
        if (step.kind !== 'stage' && flip[i] < 0) flips += wire;
        else if (reached(i, stageBefore)) marked += wire;
        else plain += wire;
      }
    }
    return path(plain, 'wire') + path(flips, 'wire flip') + path(marked, 'wire turbo') +
      part(even[s - 1], upper, stageBefore) + part(even[s], lower, done);
  });
  fill('butterfly-caption', {
    input: 'The vector. Coloured: its largest value.',
    signs: 'Before (top) and after. Dashed lines change the sign.',
    stage: 'Before (top) and after. Coloured: what the largest value has reached. Heights are divided by √2 per stage.',
    final: 'Before (top) and after. Dashed lines change the sign.',
  }[step.kind]);

  const peaks = even.map((y) => largest(y) / (rms(y) || 1));
  const most = Math.max(...peaks), peakHeight = 110;
  draw('peak-chart', peakHeight, `Largest value over RMS: ${peaks.map((p) => show(p, 2)).join(', ')}`, (width) => {
    const cx = channelScale(peaks.length, width, 0, 0), y = scale(0, most, peakHeight - 18, 18);
    const thick = (width / peaks.length) * 0.62;
    const short = ['x', 'S1', ...steps.slice(2, -1).map(({ h }) => h), 'S2'];
    return bars(peaks, cx, y, y(0), 'value', thick, (i) => i !== s) +
      bars(peaks, cx, y, y(0), 'turbo', thick, (i) => i === s) +
      peaks.map((p, i) => text(cx(i), y(p) - 5, show(p, 2), 'middle', i === s ? 'strong' : '') +
        text(cx(i), peakHeight - 3, short[i], 'middle', i === s ? 'strong' : '')).join('');
  });

  const value = `${s} of ${steps.length - 1}: ${names[s]}`;
  fill('stage-value', value);
  element('stage').setAttribute('aria-valuetext', value);
  const spread = 2 ** done;
  const words = {
    input: `Channel ${tracked} holds the largest value, ${show(peaks[0])} times the root mean square.`,
    signs: 'The signs are fixed, drawn once for the format; only the sign of values changes.',
    stage: `The largest value has reached ${spread} of ${n} outputs; the largest now is ${show(peaks[s])} times the root
      mean square. ${show(done * n, 9)} of ${show(n * stages, 9)} additions are done; a dense matrix would need
      ${show(n * n, 9)} multiplications.`,
    final: '',
  }[step.kind];
  if (step.kind === 'final') {
    const own = codec.rotate(n, x);
    const equal = own.every((v, i) => v === step.y[i]);
    fill('butterfly-result', `The largest value is ${show(peaks[s])} times the root mean square; it was
      ${show(peaks[0])} times. The vector's length was ${show(norm(x), 5)} and is ${show(norm(step.y), 5)}.
      ${equal ? `These ${n} values are those of the codec's own rotation, bit for bit.`
        : 'They differ from those of the codec, which should not be.'}`);
  } else {
    fill('butterfly-result', words);
  }
}

// ---- 3: the bell curve ---------------------------------------------------------------------------------------------

const facts = (rows) => rows.map(([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`).join('');

function bell() {
  const { n, bits, how } = state, count = 10 ** state.count, sigma = 1 / Math.sqrt(n);
  const { x } = makeVector(state);
  const { rotated, error } = randomRotations(codec, x, bits, count, how, state.bellSeed);
  const bins = 81, span = 4.5;
  const { counts } = histogram(rotated, bins, span * sigma);
  const heights = counts.map((c) => (c * bins) / (rotated.length * 2 * span)); // in units of density(0) = 0.399
  const measured = rms(rotated), distance = kolmogorov(rotated, sigma);
  const inside = histogram(rotated, 1, 3 * sigma).counts[0] / rotated.length;

  const height = 230, top = Math.min(Math.max(0.44, 1.05 * largest(heights)), 1.2);
  const label = `${show(rotated.length, 9)} coordinates beside the bell curve; largest distance ${show(distance, 2)}`;
  draw('bell-chart', height, label, (width) => {
    const cx = scale(-span, span, 0, width), y = scale(0, top, height - 20, 4);
    const middle = (i) => cx(-span + ((i + 0.5) * 2 * span) / bins);
    let curve = '';
    for (let i = 0; i <= 120; i++) {
      const t = -span + (i * span) / 60;
      curve += `${i ? 'L' : 'M'}${at(cx(t))} ${at(y(density(t)))}`;
    }
    const marks = (width < 420 ? [-2, 0, 2] : [-3, -2, -1, 0, 1, 2, 3]).map((t) =>
      line(cx(t), y(0), cx(t), y(0) + 4, 'axis') + text(cx(t), height - 4, show(t * sigma, 2), 'middle')).join('');
    return bars(heights.map((v) => Math.min(v, top)), middle, y, y(0), 'soft', (width / bins) * 0.85) +
      path(curve, 'curve') + line(0, y(0), width, y(0), 'axis') + marks;
  });
  const expected = normalError(idealLevels(bits));
  fill('bell-facts', facts([
    ['Standard deviation', `${show(measured)} (1/√${n} = ${show(sigma)})`],
    ['Distance from the bell curve', show(distance, 2)],
    ['Beyond three deviations', `${percent(1 - inside)} (bell curve: 0.27 %)`],
    [`Squared error of the codec, ${bits} bits`, `${percent(error)} (Lloyd-Max: ${percent(expected)})`],
  ]));
  fill('bell-result', `${times(count, 'rotation')}: ${show(rotated.length, 9)} coordinates, at most ${show(distance, 2)}
    from the bell curve (Kolmogorov-Smirnov). The codec's squared error, averaged over them, is ${percent(error)} of
    the vector's square.`);
}

// ---- 4: Lloyd-Max --------------------------------------------------------------------------------------------------

const codecLevels = (bits) => Array.from(codec.centroids(bits), (k) => k * codec.step(bits));
const evenLevels = (bits) => Array.from({ length: 2 ** bits }, (_, i) => ((i + 0.5) / 2 ** bits - 0.5) * 6);

function converge(levels) {
  let steps = 0, moved = 1;
  while (moved > 1e-9 && steps < 5000) {
    const next = lloydStep(levels);
    moved = largest(difference(next, levels));
    levels = next;
    steps++;
  }
  return { levels, steps };
}

const ideals = new Map();
function idealLevels(bits) {
  if (!ideals.has(bits)) ideals.set(bits, converge(codecLevels(bits)).levels);
  return ideals.get(bits);
}

function lloyd() {
  const { n, bits } = state, own = codecLevels(bits);
  const levels = state.levels ?? own;
  const { x } = makeVector(state);
  const rotated = codec.rotate(n, x), strength = rms(rotated) || 1;
  const height = 220, span = 3.6;
  const label = `${levels.length} slots on the bell curve, levels ${levels.map((v) => show(v, 2)).join(', ')}`;
  draw('lloyd-chart', height, label, (width) => {
    const cx = scale(-span, span, 0, width), y = scale(0, 0.42, height - 34, 4), base = y(0);
    const shapes = slots(levels).map(({ from, to }, i) => {
      const a = Math.max(from, -span), b = Math.min(to, span);
      let d = `M${at(cx(a))} ${at(base)}`;
      for (let k = 0; k <= 24; k++) {
        const t = a + ((b - a) * k) / 24;
        d += `L${at(cx(t))} ${at(y(density(t)))}`;
      }
      return path(`${d}L${at(cx(b))} ${at(base)}z`, i % 2 ? 'slot odd' : 'slot');
    });
    const stems = levels.map((level) => line(cx(level), base, cx(level), y(density(level)), 'stem'));
    const triangles = own.map((level) => `M${at(cx(level) - 4)} ${at(base + 9)}l4 -7 4 7z`).join('');
    const rug = Array.from(rotated, (v) => v / strength).filter((v) => Math.abs(v) < span)
      .map((v) => `M${at(cx(v))} ${at(base + 13)}v6`).join('');
    const numbers = [-3, -2, -1, 0, 1, 2, 3].map((t) => text(cx(t), height - 2, show(t), 'middle')).join('');
    return shapes.join('') + stems.join('') + line(0, base, width, base, 'axis') +
      dots(levels, (i) => cx(levels[i]), (v) => y(density(v)), 'turbo', 3.2) +
      path(triangles, 'mark') + path(rug, 'rug') + numbers;
  });
  const error = normalError(levels), best = normalError(idealLevels(bits));
  fill('lloyd-facts', facts([
    ['Squared error of these levels', show(error, 4)],
    ['Least possible (Lloyd-Max)', show(best, 4)],
    ["The codec's levels", show(normalError(own), 4)],
    ['Best evenly spaced levels', show(normalError(bestUniform(bits)), 4)],
    [`Shannon's limit, 4<sup>−${bits}</sup>`, show(4 ** -bits, 4)],
  ]));
  const off = largest(difference(levels, own));
  const where = state.levels ? `After ${times(state.lloydSteps, 'step')}` : "With the codec's levels";
  fill('lloyd-result', `${where} the squared error is ${show(error, 4)},
    ${error < 1.0005 * best ? 'the least there is' : `${percent(error / best - 1)} above the least`}.
    ${state.levels ? `The levels are at most ${show(off, 2)} from the codec's.` : ''}`);
}

// ---- 5: the bytes --------------------------------------------------------------------------------------------------

// The bytes of a block in hexadecimal. kind(b) is the class of byte b; those of `parts` are marked.
const hexadecimal = (block, kind, parts) => Array.from(block, (byte, b) =>
  `<span class="${kind(b)}${parts.includes(b) ? ' here' : ''}">${byte.toString(16).padStart(2, '0')}</span>`).join(' ');

function stored() {
  const { n, bits, element: i } = state;
  const { x } = makeVector(state);
  const block = codec.encode(bits, n, x), d = half(block[0], block[1]);
  const indices = codec.unpack(bits, n, block), places = codec.places(bits, n);
  const low = new Set(places.map((bit) => bit[0].byte)), high = places[0].findIndex((place) => !low.has(place.byte));
  const parts = [...new Set(places[i].map((place) => place.byte))];
  fill('stored-bytes',
    hexadecimal(block, (b) => (b < 2 ? 'byte-scale' : low.has(b) ? 'byte-index' : 'byte-high'), parts));
  element('byte-high').hidden = high < 0;
  element('byte-low').textContent =
    high < 0 ? 'indices' : `bits 0 ${high > 2 ? 'to' : 'and'} ${high - 1} of the indices`;

  const k = codec.centroids(bits)[indices[i]], value = codec.decodeRotated(bits, n, block)[i];
  const words = parts.map((byte) => {
    const of = places[i].filter((place) => place.byte === byte).map((place) => place.bit);
    if (of.length === 4) return `the ${of[0] ? 'high' : 'low'} half of byte ${byte}`;
    return `${of.length > 1 ? 'bits' : 'bit'} ${of.join(' and ')} of byte ${byte}`;
  });
  fill('element-value', `${i} of ${n}`);
  fill('stored-result', `${block.length} bytes instead of ${2 * n} as f16: ${show((2 * n) / block.length)} times
    smaller. d = ${show(d, 5)}. Value ${i} of the rotated vector is ${show(codec.rotate(n, x)[i])}; its index,
    ${indices[i]}, is in ${words.join(' and ')} and stands for the level ${show(k)}:
    ${show(d, 5)} · ${show(codec.step(bits), 4)} · ${show(k)} = ${show(value)}.`);
}

// ---- 6: why signs --------------------------------------------------------------------------------------------------

// H/sqrt(n) alone: the codec's rotation with its signs taken out again.
const hadamard = (x) => {
  const n = x.length;
  return flipped(codec.rotate(n, flipped(x, codec.signs(1, n))), codec.signs(2, n));
};

function signs() {
  const { n, bits, row, raise } = state;
  const a = walsh(row, n), b = Float32Array.from(a);
  b[0] += raise;
  const ways = {
    without: { forward: hadamard, input: (x) => codec.unrotate(n, hadamard(x)), backward: hadamard },
    with: { forward: (x) => codec.rotate(n, x), input: (x) => x, backward: (y) => codec.unrotate(n, y) },
  };
  const different = {};
  for (const [name, { forward, input, backward }] of Object.entries(ways)) {
    const kept = [a, b].map((x) => {
      const block = codec.encode(bits, n, input(x));
      const indices = codec.unpack(bits, n, block), back = backward(codec.decodeRotated(bits, n, block));
      return { y: forward(x), indices, back };
    });
    const changed = kept[0].indices.filter((v, i) => v !== kept[1].indices[i]).length;
    different[name] = changed;
    const most = Math.sqrt(n) * (1 + raise / n); // of H alone; the same scale for both
    const range = [-0.4 * most, 1.05 * most], left = 34, height = 170;
    const label = `A and B transformed; the largest value is ${show(largest(kept[0].y))}`;
    draw(`${name}-chart`, height, label, (width) => {
      const cx = channelScale(n, width, left, 0), y = scale(...range, height - 4, 4);
      return valueAxis(y, range, width, left) +
        bars(kept[0].y, cx, y, y(0), 'value', barWidth(n, width)) +
        dots(kept[1].y, cx, y, name === 'with' ? 'turbo' : 'plain', n > 64 ? 1.7 : 2.2);
    });
    fill(`${name}-facts`, facts([
      ['Largest value / RMS', show(largest(kept[0].y) / rms(kept[0].y))],
      ['Indices in which A and B differ', `${changed} of ${n}`],
      ['Error of A, relative', percent(norm(difference(kept[0].back, a)) / norm(a))],
      ['First value of A, decoded', `${show(kept[0].back[0])} (was 1)`],
      ['First value of B, decoded', `${show(kept[1].back[0])} (was ${show(b[0])})`],
    ]));
  }
  fill('row-value', `${row} of H${row === 0 ? ' (constant)' : ''}`);
  element('row').setAttribute('aria-valuetext', element('row-value').textContent);
  fill('raise-value', show(raise));
  fill('signs-result', raise === 0 ? 'A and B are the same vector now.'
    : different.without === 0
      ? `Without signs A and B get the same ${n} indices: what sets them apart is gone. With signs they differ in
         ${different.with} of ${n}${different.with ? '' : ', too: so small a change moves no index'}.`
      : `Without signs A and B differ in ${different.without} of ${n} indices, with signs in ${different.with}.`);
}

// ---- 7: the trellis ------------------------------------------------------------------------------------------------

const stepsShown = 32; // at once
const subsets = [0, 1, 2, 3];

// The row of a state, from the bottom: its bits as a number, the newest bit first, so that this bit chooses the half.
function rowOf(pathState) {
  let row = 0;
  for (let bit = 0; bit < 6; bit++) row = 2 * row + ((pathState >> bit) & 1);
  return row;
}

const latticeLeft = 30;
const latticeScale = (width) => scale(0, stepsShown, latticeLeft, width - 6);

// The step at a horizontal place in the chart of the lattice.
function stepAt(x, width) {
  const column = Math.floor(scale(latticeLeft, width - 6, 0, stepsShown)(x));
  return state.step - (state.step % stepsShown) + Math.min(Math.max(column, 0), stepsShown - 1);
}

// The vector in a trellis-coded type, and the encoder's view of it.
function trellisCode() {
  const { n, bits } = state;
  const { x } = makeVector(state);
  const block = codec.encode(bits, n, x, true), path = pathOf(block, n);
  const levels = Array.from(codec.centroids(bits, true)), rests = codec.unpack(bits, n, block, true);
  const { unit, metric } = codec.metrics(bits, n, x);
  const rotated = codec.rotate(n, x);
  const steps = Array.from({ length: n }, (_, t) => {
    const i = elementOf(t, n), bit = path[t + 1] & 1, subset = subsetOf(2 * path[t] + bit);
    const other = subsetOf(2 * path[t] + 1 - bit);
    return { i, bit, subset, other, level: levels[4 * rests[i] + subset], value: rotated[i] / unit };
  });
  return { x, block, path, levels, metric, unit, steps, ...cheapestPaths(metric) };
}

function drawLattice({ path: chosen, steps }, t, paths) {
  const height = 330, bottom = height - 18, first = t - (t % stepsShown);
  const label = `The path through the 64 states in steps ${first} to ${first + stepsShown - 1}; after step ${t} in state ` +
    chosen[t + 1].toString(2).padStart(6, '0');
  draw('lattice-chart', height, label, (width) => {
    const column = latticeScale(width), x = (j) => column(j - first), y = (s) => scale(0, 63, bottom - 4, 6)(rowOf(s));
    const branch = (j, [from, to]) => `M${at(x(j))} ${at(y(from))}L${at(x(j + 1))} ${at(y(to))}`;
    const inside = steps.map((_, j) => j).filter((j) => first <= j && j < first + stepsShown);
    const main = (js) => js.map((j) => branch(j, [chosen[j], chosen[j + 1]])).join('');
    const nodes = [first, ...inside.map((j) => j + 1)].map((j) =>
      Array.from({ length: stateCount }, (_, s) => `M${at(x(j))} ${at(y(s))}h0`).join('')).join('');
    const alive = inside.filter((j) => j <= t).map((j) => paths[j].map((pair) => branch(j, pair)).join('')).join('');
    const band = `M${at(x(t))} 2H${at(x(t + 1))}V${bottom}H${at(x(t))}z`;
    const colours = subsets.map((c) => path(inside.filter((j) => j <= t && steps[j].subset === c).map((j) =>
      `M${at(x(j + 1))} ${at(y(chosen[j + 1]))}h0`).join(''), `dot subset-${c}`, 7));
    return path(band, 'band') + path(nodes, 'dot node', 1.6) + path(alive, 'wire survivor') +
      path(main(inside.filter((j) => j > t)), 'wire ahead') +
      path(branch(t, [chosen[t], chosen[t + 1] ^ 1]), 'wire flip') +
      path(main(inside.filter((j) => j <= t)), 'chosen') + colours.join('') +
      ['11', '10', '01', '00'].map((bits, i) =>
        text(0, 6 + ((bottom - 10) * (2 * i + 1)) / 8 + 4, bits)).join('') +
      inside.filter((j) => j === t || (j % 8 === 0 && Math.abs(j - t) > 1)).map((j) =>
        text((x(j) + x(j + 1)) / 2, height - 3, j, 'middle', j === t ? 'strong' : '')).join('');
  });
}

// The path bits that the subset depends on, and the two sums that give it.
function drawRegister({ path: states }, t, subset) {
  const window = 2 * states[t] + (states[t + 1] & 1), bitOf = (age) => (window >> age) & 1;
  const height = 122, middle = 61, size = 26;
  const label = `Path bits of steps ${t - 6} to ${t}: ${window.toString(2).padStart(7, '0')}, subset ${subset}`;
  draw('register-chart', height, label, (width) => {
    const pitch = Math.min((width - 90) / 7, 44), x = (age) => pitch * (6.5 - age), end = 7 * pitch + 12;
    const boxes = Array.from({ length: 7 }, (_, age) =>
      path(`M${at(x(age) - size / 2)} ${middle - 13}h${size}v${size}h-${size}z`, 'box') +
      text(x(age), middle + 4, bitOf(age), 'middle', 'strong'));
    const sums = [[0, middle + 34], [1, middle - 34]].map(([which, level]) => {
      const toward = level > middle ? middle + 13 : middle - 13;
      const wires = taps[which].map((age) => `M${at(x(age))} ${toward}V${level}`).join('');
      const line = `M${at(x(Math.max(...taps[which])))} ${level}H${at(end)}`;
      return path(wires + line, `chosen subset-${subset}`) +
        text(end + 6, level + 4, `⊕ = c${'₀₁'[which]} = ${(subset >> which) & 1}`);
    });
    return boxes.join('') + sums.join('') + text(end + 6, middle + 4, `subset ${subset}`, 'start', 'strong') +
      text(x(6), middle + 54, `step ${t - 6}`, 'middle') + text(x(0), middle + 54, t, 'middle');
  });
}

// The levels of the four subsets beside the value.
function drawSubsets({ levels, metric }, t, { subset, other, level, value }) {
  const height = 150, label = `The levels of the four subsets and the value ${show(value)}; ${show(level)} is taken`;
  draw('subset-chart', height, label, (width) => {
    const x = scale(-136, 136, 60, width - 62), y = (c) => 26 + 32 * c;
    const rows = subsets.map((c) => {
      const kind = c === subset ? `stem subset-${c}` : c === other ? 'level' : 'level unused';
      const marks = levelsOf(c, levels).map((k) => `M${at(x(k))} ${y(c) - 9}v18`).join('');
      const strong = c === subset ? 'strong' : '';
      return line(x(-136), y(c), x(136), y(c), 'grid') + path(marks, kind) + text(0, y(c) + 4, `subset ${c}`, 'start', strong) +
        text(width, y(c) + 4, `cost ${metric[t][c]}`, 'end', strong);
    });
    const place = x(Math.min(Math.max(value, -136), 136));
    return rows.join('') + line(place, 8, place, height - 16, 'curve') +
      path(`M${at(x(level))} ${y(subset)}h0`, `dot subset-${subset}`, 11) +
      [-100, 0, 100].map((k) => text(x(k), height - 2, show(k), 'middle')).join('');
  });
}

function trellis() {
  const { n, bits, step: t } = state;
  const code = trellisCode(), { x, block, levels, metric, unit, steps } = code, here = steps[t];
  const name = `turbo${bits}_tcq${n === 128 ? '' : `_${n}`}`;
  const paths = survivors(code.before, t), back = Math.max(t - 32, 0);
  drawLattice(code, t, paths);
  drawRegister(code, t, here.subset);
  drawSubsets(code, t, here);

  const rests = codec.places(bits, n, true)[here.i].map((place) => place.byte);
  fill('trellis-bytes', hexadecimal(block, (b) => (b < 2 ? 'byte-scale' : b < 2 + n / 8 ? 'byte-path' : 'byte-index'),
    [2 + (t >> 3), ...rests]));
  const scale = half((block[0] & 7) << 5, ((block[1] & 3) << 5) | (block[0] >> 3)); // the ten low bits of the first two bytes
  const costs = metric[t];
  const branches = here.subset < here.other ? [here.subset, here.other] : [here.other, here.subset];
  const dearer = costs[here.subset] > costs[here.other]
    ? 'This is the dearer branch here, and the better one for the steps around it.' : '';
  fill('step-value', `${t} of ${n}`);
  fill('trellis-result', `${name}: step ${t} is value ${here.i} of the rotated vector, ${show(here.value * unit)} or
    ${show(here.value)} in units of the levels. From the state before, the path bit leads to subset ${branches[0]} or
    ${branches[1]}, at a cost of ${costs[branches[0]]} or ${costs[branches[1]]}. It is ${here.bit}: subset ${here.subset}.
    ${dearer} The nearest level there is ${show(here.level)}, number ${levels.indexOf(here.level) >> 2} of 0 to
    ${levels.length / 4 - 1}, which is decoded as ${show(scale, 5)} · ${show(codec.step(bits, true), 4)} ·
    ${show(here.level)} = ${show(codec.decodeRotated(bits, n, block, true)[here.i])}. In step ${back} the cheapest
    paths to the 64 states are ${times(paths[back].length, 'different path')}.`);

  const values = steps.map(({ value }) => value), strength = sum(values.map(square));
  const share = (chosenLevels) => percent(sum(chosenLevels.map((k, j) => square(k - values[j]))) / strength);
  const coded = (trellisCoded) => {
    const back = codec.decode(bits, n, codec.encode(bits, n, x, trellisCoded), trellisCoded);
    return percent(square(norm(difference(back, x)) / norm(x)));
  };
  fill('trellis-facts', facts([
    [`turbo${bits}: ${2 ** bits} levels, every value takes the nearest`, coded(false)],
    [`${levels.length} levels, path chosen step by step`, share(greedyLevels(code.path[0], values, levels))],
    [`${levels.length} levels, best path`, share(steps.map(({ level }) => level))],
    [`${name}: the best path, with the scale that is stored`, coded(true)],
    [`${levels.length} levels, every value takes the nearest (${bits + 1} bits)`,
      share(values.map((value) => nearest(levels, value)))],
    ['The path of this page and that of the codec', code.best.join() === code.path.join() ? 'the same' : 'different'],
  ]));
}
