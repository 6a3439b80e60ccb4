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
  }

  blockBytes(bits, n) { return this.exports.block_bytes(bits, n); }
  step(bits) { return this.exports.step(bits); }
  centroids(bits) { return new Int8Array(this.exports.memory.buffer, this.exports.centroids(bits), 2 ** bits); }

  // The n signs of S1 or S2 as +1 and -1.
  signs(which, n) {
    const packed = new Uint8Array(this.exports.memory.buffer, this.exports.signs(which), 16);
    return Int8Array.from({ length: n }, (_, i) => ((packed[i >> 3] >> (i & 7)) & 1 ? -1 : 1));
  }

  // Whole blocks of n values or of blockBytes(bits, n) bytes each, as many as there are.
  encode(bits, n, x) {
    const size = this.blockBytes(bits, n);
    return this.#run(x, this.values, n, this.bytes, size, Uint8Array, (blocks) => this.exports.encode(bits, n, blocks));
  }
  decode(bits, n, bytes) {
    const size = this.blockBytes(bits, n);
    return this.#run(bytes, this.bytes, size, this.results, n, Float32Array,
      (blocks) => this.exports.decode(bits, n, blocks));
  }
  decodeRotated(bits, n, bytes) {
    const size = this.blockBytes(bits, n);
    return this.#run(bytes, this.bytes, size, this.results, n, Float32Array,
      (blocks) => this.exports.decode_rotated(bits, n, blocks));
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

// The indices in an encoded block (FORMAT.md, "Layout"), read here to be shown.
function unpack(bits, n, block) {
  const q = block.subarray(2);
  return Uint8Array.from({ length: n }, (_, i) => {
    if (bits === 4) return (q[i % (n / 2)] >> (Math.floor(i / (n / 2)) * 4)) & 15;
    const low = (q[i % (n / 4)] >> (Math.floor(i / (n / 4)) * 2)) & 3;
    return bits === 2 ? low : low | (((q[n / 4 + (i >> 3)] >> (i & 7)) & 1) << 2);
  });
}

// The value of an IEEE binary16.
function half(low, high) {
  const exponent = (high >> 2) & 31, mantissa = ((high & 3) << 8) | low, sign = high & 128 ? -1 : 1;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + mantissa / 1024) * 2 ** (exponent - 15) : mantissa * 2 ** -24);
}
