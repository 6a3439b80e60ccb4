// The controls: they change `state` and redraw the experiments that depend on it.
const experiments = { grid, butterfly, bell, lloyd, stored, signs, trellis };
const waiting = new Map(); // timers of what is drawn with a delay
let frame = 0;
const pending = new Set();

// Draws experiments with the next frame; the bell curve, which takes longest, when the controls no longer move.
function redraw(...names) {
  const main = document.querySelector('main');
  const rest = () => main.setAttribute('aria-busy', pending.size > 0 || waiting.has('bell'));
  for (const name of names.length ? names : Object.keys(experiments)) {
    if (name === 'bell') later('bell', 120, () => [experiments.bell(), rest()]);
    else pending.add(name);
  }
  rest();
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    for (const name of pending) experiments[name]();
    pending.clear();
    rest();
  });
}

function later(name, milliseconds, action) {
  clearTimeout(waiting.get(name));
  waiting.set(name, setTimeout(() => {
    waiting.delete(name);
    action();
  }, milliseconds));
}

// Screen readers hear the result of the experiment whose controls were used, once these no longer move.
function announce(name) {
  later('announcement', 700, () => {
    const result = element(name).querySelector('.result');
    element('announcement').textContent = result.textContent.replace(/\s+/g, ' ').trim();
  });
}

// Sliders with the buttons Back, Next and Play: their experiments, their last steps, and the steps of Play in a second.
const walks = {
  stage: { experiment: 'butterfly', last: () => Math.log2(state.n) + 2, pace: 1 },
  step: { experiment: 'trellis', last: () => state.n - 1, pace: 4 },
};

function setWalk(name, place) {
  const last = walks[name].last();
  state[name] = Math.min(Math.max(place, 0), last);
  element(name).max = last;
  element(name).value = state[name];
  element(`${name}-back`).disabled = state[name] === 0;
  element(`${name}-next`).disabled = state[name] === last;
  redraw(walks[name].experiment);
}

function walkTo(name, place) {
  setWalk(name, place);
  announce(walks[name].experiment);
}

// Texts and limits of the controls that the vector's own controls decide.
function showVectorControls() {
  const { n, outliers, size, bits } = state;
  element('outliers').max = n / 8;
  state.outliers = Math.min(outliers, n / 8);
  element('outliers').value = state.outliers;
  fill('outliers-value', show(state.outliers));
  fill('size-value', `${size}×`);
  element('size').setAttribute('aria-valuetext', `${size} times`);
  for (const input of document.querySelectorAll('[data-state="bits"]')) {
    input.value = bits;
    fill(`${input.id}-value`, show(bits));
  }
  for (const name of ['element', 'row']) {
    element(name).max = n - 1;
    state[name] = Math.min(state[name], n - 1);
    element(name).value = state[name];
  }
  const count = times(10 ** state.count, 'rotation');
  fill('count-value', show(10 ** state.count, 9));
  element('count').setAttribute('aria-valuetext', count);
}

function setVector(change) {
  const bits = state.bits;
  Object.assign(state, change);
  if (state.bits !== bits) state.levels = null;
  showVectorControls();
  for (const name of Object.keys(walks)) setWalk(name, state[name]);
  redraw();
}

function listen() {
  const numbers = { outliers: 'grid', size: 'grid', count: 'bell', element: 'stored', row: 'signs', raise: 'signs' };
  for (const [name, experiment] of Object.entries(numbers)) {
    element(name).addEventListener('input', (event) => {
      const change = { [name]: Number(event.target.value) };
      if (experiment === 'grid') setVector(change);
      else {
        Object.assign(state, change);
        showVectorControls();
        redraw(experiment);
      }
      announce(experiment);
    });
  }
  for (const input of document.querySelectorAll('[data-state="bits"]')) {
    input.addEventListener('input', () => {
      setVector({ bits: Number(input.value) });
      announce(input.closest('section')?.id ?? 'grid');
    });
  }
  for (const input of document.querySelectorAll('[name="n"]')) {
    input.addEventListener('change', () => {
      setVector({ n: Number(input.value) });
      announce('grid');
    });
  }
  for (const name of ['plain', 'turbo']) {
    element(`${name}-rotate`).addEventListener('change', (event) => {
      state[`${name}Rotate`] = event.target.checked;
      redraw('grid');
      announce('grid');
    });
  }
  for (const input of document.querySelectorAll('[name="how"]')) {
    input.addEventListener('change', () => {
      state.how = input.value;
      redraw('bell');
      announce('bell');
    });
  }
  const click = (id, action, experiment) => element(id).addEventListener('click', () => {
    action();
    redraw(experiment);
    announce(experiment);
  });
  click('another', () => setVector({ seed: state.seed + 1 }), 'grid');
  click('again', () => state.bellSeed++, 'bell');
  const setLevels = (levels, steps) => Object.assign(state, { levels, lloydSteps: steps });
  const present = () => state.levels ?? codecLevels(state.bits);
  click('lloyd-start', () => setLevels(evenLevels(state.bits), 0), 'lloyd');
  click('lloyd-step', () => setLevels(lloydStep(present()), state.lloydSteps + 1), 'lloyd');
  click('lloyd-run', () => {
    const { levels, steps } = converge(state.levels ?? evenLevels(state.bits));
    setLevels(levels, state.lloydSteps + steps);
  }, 'lloyd');
  click('lloyd-codec', () => setLevels(null, 0), 'lloyd');

  for (const name of Object.keys(walks)) {
    element(name).addEventListener('input', (event) => walkTo(name, Number(event.target.value)));
    element(`${name}-back`).addEventListener('click', () => walkTo(name, state[name] - 1));
    element(`${name}-next`).addEventListener('click', () => walkTo(name, state[name] + 1));
    listenToPlay(name);
  }
  element('lattice-chart').addEventListener('pointermove', (event) => {
    const box = element('lattice-chart').getBoundingClientRect();
    const step = stepAt(event.clientX - box.left, box.width);
    if (step !== state.step) walkTo('step', step);
  });
  element('vector').addEventListener('submit', (event) => event.preventDefault());

  let width = document.body.clientWidth; // phones resize the window's height while scrolling: nothing to draw then
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    redraw();
  }).observe(document.body);
}

// Play goes through the steps until the end or until it is pressed again.
function listenToPlay(name) {
  const button = element(`${name}-play`), { last, pace } = walks[name];
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = 'Play';
  };
  button.addEventListener('click', () => {
    if (timer) return stop();
    const atEnd = () => state[name] >= last();
    walkTo(name, atEnd() ? 0 : state[name] + 1);
    button.textContent = 'Stop';
    timer = setInterval(() => (atEnd() ? stop() : walkTo(name, state[name] + 1)), 1000 / pace);
  });
}

async function start() {
  for (const input of document.querySelectorAll('input')) { // a reload may have kept other positions than `state` has
    input.value = input.defaultValue;
    input.checked = input.defaultChecked;
  }
  codec = await Codec.load(element('codec-wasm').textContent);
  globalThis.explore = { codec, state, vector: () => makeVector(state).x }; // for the console, and the tests
  listen();
  showVectorControls();
  for (const name of Object.keys(walks)) setWalk(name, state[name]);
  redraw();
}

start().catch((error) => {
  element('problem').textContent = `This browser could not start the experiments (${error.message}). They need
    WebAssembly: Firefox 102, Chrome 97, Safari 16 or newer.`;
  element('problem').hidden = false;
});
