import { expect, test } from "vitest";
import { makeNoise, randn, slerp } from "../src/noise";
import { largestDifference, read } from "./values";

const values = read<{
  seeds: number[];
  sizes: number[];
  every: number;
  noise: number[][][];
  slerp: { of: [number, number]; share: number; value: number[] };
}>("noise");
const shortened = (x: Float32Array) => x.filter((_, k) => k % values.every === 0);

test.each(values.seeds.map((seed, row) => [seed, row]))("noise of seed %i is torch's at every size", (seed, row) => {
  const noise = makeNoise(seed, 4, values.sizes);
  expect(noise.map((leg) => leg.length)).toEqual(values.sizes.map((size) => 4 * size * size));
  noise.forEach((leg, k) => expect(largestDifference(shortened(leg), values.noise[row][k])).toBeLessThan(5e-6));
});

test("slerp is Python's, and ends at its ends", () => {
  const [start, end] = values.slerp.of.map((row) => makeNoise(values.seeds[row], 4, [32])[0]);
  const between = slerp(start, end, values.slerp.share);
  expect(largestDifference(shortened(between), values.slerp.value)).toBeLessThan(5e-6);
  expect(largestDifference(slerp(start, end, 0), start)).toBeLessThan(1e-6);
  expect(slerp(start, start, 0.5)).toEqual(start);
});

test("a length that torch would draw otherwise is refused", () => {
  expect(() => randn(0, 15)).toThrow(RangeError);
});
