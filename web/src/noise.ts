/** Gaussian noise from a seed: the numbers of `torch.randn` with a CPU generator. */

const N = 624;
const M = 397;

/** 32-bit Mersenne Twister (Matsumoto & Nishimura 1998), seeded as `torch.Generator.manual_seed`: by the low 32 bits. */
export class MersenneTwister {
  private readonly state = new Uint32Array(N);
  private next = N;

  constructor(seed: number | bigint) {
    this.state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let k = 1; k < N; k++) {
      const previous = this.state[k - 1] ^ (this.state[k - 1] >>> 30);
      this.state[k] = Math.imul(1812433253, previous) + k;
    }
  }

  /** A uniform whole number from 0 to 2^32 - 1. */
  uint32(): number {
    if (this.next === N) this.twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  private twist(): void {
    const s = this.state;
    for (let k = 0; k < N; k++) {
      const y = (s[k] & 0x80000000) | (s[(k + 1) % N] & 0x7fffffff);
      s[k] = s[(k + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}

/**
 * `length` standard normal numbers, as `torch.randn` draws them: sixteen 24-bit uniforms at a time, of which the first
 * eight and the last eight make the pairs of a Box-Muller transform (`normal_fill` in ATen).
 *
 * `length` is a multiple of 16. At most 2e-6 from torch, whose logarithm and sine are approximations too.
 */
export function randn(seed: number | bigint, length: number): Float32Array {
  if (length % 16 !== 0) throw new RangeError(`randn: ${length} is not a multiple of 16`);
  const twister = new MersenneTwister(seed);
  const x = new Float32Array(length);
  for (let k = 0; k < length; k++) x[k] = (twister.uint32() & 0xffffff) / 0x1000000;
  for (let start = 0; start < length; start += 16) {
    for (let k = start; k < start + 8; k++) {
      const radius = Math.sqrt(-2 * Math.log(1 - x[k]));
      const angle = 2 * Math.PI * x[k + 8];
      x[k] = radius * Math.cos(angle);
      x[k + 8] = radius * Math.sin(angle);
    }
  }
  return x;
}

/**
 * The first noise of every size that a drawing passes through, (channels, size, size) each.
 *
 * Noise of the first size is that of the seed; further sizes have seeds of their own, so that a seed gives the same
 * creature at every size (`make_noises` in pokediff/model/interface.py).
 */
export function makeNoise(seed: number, channels: number, sizes: readonly number[]): Float32Array[] {
  return sizes.map((size, number) => {
    const own = number === 0 ? BigInt(seed) : -((1n + BigInt(seed)) * BigInt(number));
    return randn(own, channels * size * size);
  });
}

/**
 * Spherical interpolation from `start` to `end`, share 0 to 1: unlike a linear one it keeps the variance of noise
 * (White 2016, section 2.1). `slerp` in pokediff/model/samplers.py.
 */
export function slerp(start: Float32Array, end: Float32Array, share: number): Float32Array {
  let [dot, a, b] = [0, 0, 0];
  for (let k = 0; k < start.length; k++) {
    dot += start[k] * end[k];
    a += start[k] * start[k];
    b += end[k] * end[k];
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, dot / Math.sqrt(a * b))));
  const near = angle < 1e-4; // nearly equal: linear
  const left = near ? 1 - share : Math.sin((1 - share) * angle) / Math.sin(angle);
  const right = near ? share : Math.sin(share * angle) / Math.sin(angle);
  return start.map((value, k) => left * value + right * end[k]);
}
