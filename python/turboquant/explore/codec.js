// The codec itself: cpp/src/scalar.cpp as WebAssembly, exported by tools/wasm/codec.cpp.
class Codec {
  static async load(base64) {
    const bytes = Uint8Array.from(atob(base64.trim()), (letter) => letter.charCodeAt(0));
    const { instance } = await WebAssembly.instantiate(bytes);
    return new Codec(instance.exports);
  }

  constructor(exports) {
    this.exports = exports;
    const memory = exports.memory.buffer; // never grows, so the views stay valid
    this.values = new Float32Array(memory, exports.values(), exports.capacity());
    this.results = new Float32Array(memory, exports.results(), exports.capacity());
    this.bytes = new Uint8Array(memory, exports.bytes());
    this.indexBuffer = new Uint8Array(memory, exports.indices());
    this.types = Array.from({ length: exports.types() }, (_, id) => ({
      id, bits: exports.bits(id), n: exports.block(id), bytes: exports.block_bytes(id), step: exports.step(id),
      centroids: new Int8Array(memory, exports.centroids(id), exports.levels(id)),
      trellis: exports.levels(id) > 2 ** exports.bits(id),
    }));
    this.metricBuffer = new Int16Array(memory, exports.metric_buffer(), 4 * 128);
  }

  // The first type with that many bits and, if n is given, blocks of n: of turbo4, turbo3 and turbo2, or trellis-coded.
  type(bits, n, trellis = false) {
    const fits = (one) => one.bits === bits && (n === undefined || one.n === n) && one.trellis === trellis;
    const found = this.types.find(fits);
    if (!found) throw new RangeError('the codec has no such format');
    return found;
  }
  step(bits, trellis) { return this.type(bits, undefined, trellis).step; }
  centroids(bits, trellis) { return this.type(bits, undefined, trellis).centroids; }

  // The n signs of S1 or S2 as +1 and -1.
  signs(which, n) {
    const packed = new Uint8Array(this.exports.memory.buffer, this.exports.signs(which), 16);
    return Int8Array.from({ length: n }, (_, i) => ((packed[i >> 3] >> (i & 7)) & 1 ? -1 : 1));
  }

  // Whole blocks of n values or their bytes, as many as there are.
  encode(bits, n, x, trellis) {
    const { id, bytes } = this.type(bits, n, trellis);
    return this.#run(x, this.values, n, this.bytes, bytes, Uint8Array, (blocks) => this.exports.encode(id, blocks));
  }
  decode(bits, n, encoded, trellis) {
    const { id, bytes } = this.type(bits, n, trellis);
    return this.#run(encoded, this.bytes, bytes, this.results, n, Float32Array,
      (blocks) => this.exports.decode(id, blocks));
  }
  decodeRotated(bits, n, encoded, trellis) {
    const { id, bytes } = this.type(bits, n, trellis);
    return this.#run(encoded, this.bytes, bytes, this.results, n, Float32Array,
      (blocks) => this.exports.decode_rotated(id, blocks));
  }

  // The n indices in an encoded block; of a trellis-coded type the numbers of the levels in their subsets.
  unpack(bits, n, block, trellis) {
    this.bytes.set(block);
    this.exports.unpack(this.type(bits, n, trellis).id);
    return this.indexBuffer.slice(0, n);
  }

  // What the encoder of a trellis-coded type compares for one block: the distance of levels whose difference is 1, in
  // the rotated vector; and for each step the costs of the four subsets.
  metrics(bits, n, x) {
    this.values.set(x);
    const unit = this.exports.metrics(this.type(bits, n, true).id);
    return { unit, metric: Array.from({ length: n }, (_, t) => Array.from(this.metricBuffer.subarray(4 * t, 4 * t + 4))) };
  }

  // Where they are: for each index, for each of its bits from the lowest on, the byte of the block and the bit in it.
  places(bits, n, trellis) {
    const block = new Uint8Array(this.type(bits, n, trellis).bytes), places = Array.from({ length: n }, () => []);
    const before = this.unpack(bits, n, block, trellis);
    for (let byte = 2; byte < block.length; byte++)
      for (let bit = 0; bit < 8; bit++) {
        block[byte] = 1 << bit;
        this.unpack(bits, n, block, trellis).forEach((index, i) => {
          if (index !== before[i]) places[i][Math.log2(index ^ before[i])] = { byte, bit };
        });
        block[byte] = 0;
      }
    return places;
  }

  rotate(n, x) {
    return this.#run(x, this.values, n, this.results, n, Float32Array, (blocks) => this.exports.rotate(n, blocks));
  }
  unrotate(n, y) {
    return this.#run(y, this.values, n, this.results, n, Float32Array, (blocks) => this.exports.unrotate(n, blocks));
  }

  // Feeds `input` through a function of the module, as many blocks at a time as its buffers hold.
  #run(input, from, inSize, to, outSize, Type, call) {
    const blocks = input.length / inSize;
    if (!Number.isInteger(blocks)) throw new RangeError(`${input.length} is no multiple of the block, ${inSize}`);
    const atOnce = 1000;
    const output = new Type(blocks * outSize);
    for (let first = 0; first < blocks; first += atOnce) {
      const count = Math.min(atOnce, blocks - first);
      from.set(input.subarray(first * inSize, (first + count) * inSize));
      if (!call(count)) throw new RangeError('the codec has no such format');
      output.set(to.subarray(0, count * outSize), first * outSize);
    }
    return output;
  }
}

// The value of an IEEE binary16.
function half(low, high) {
  const exponent = (high >> 2) & 31, mantissa = ((high & 3) << 8) | low, sign = high & 128 ? -1 : 1;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + mantissa / 1024) * 2 ** (exponent - 15) : mantissa * 2 ** -24);
}
