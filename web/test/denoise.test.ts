import { expect, test } from "vitest";
import { guidanceAt, legsTo, sizesOf, type Denoiser, type Model } from "../src/cascade";
import { denoise, type Run, type Step } from "../src/denoise";
import { makeNoise } from "../src/noise";
import { plan } from "../src/sampler";
import { bytes, largestDifference, read } from "./values";

const values = read<{
  sigmas: number[];
  denoisers: Denoiser[];
  plans: { size: number; steps: number | null; sampler: string; timesteps: number[]; denoisers: string[] }[];
  drawings: {
    steps: number;
    guidance: number | null;
    sampler: string;
    size: number;
    seed: number;
    x0: string;
  }[];
  guidance: [number, number | null, number][];
  null: number[];
}>("sampling");

/** The shipped cascade; for DDIM its base is a few-step one. */
function modelOf(sampler: string): Model {
  const [base, ...others] = values.denoisers;
  const denoisers = [{ ...base, fast: sampler === "ddim" }, ...others];
  return { sigmas: values.sigmas, denoisers, channels: 4 } as unknown as Model;
}

/** `Toy` in scripts/web_values.py. */
const toy: Run = async (_, rows, { x, timestep, text, low_res }) => {
  const [length, dim] = [x.length / rows, text.length / rows];
  const small = low_res
    ? low_res.subarray(0, low_res.length / rows).reduce((a, b) => a + b, 0) / (low_res.length / rows)
    : 0;
  return x.map((value, k) => {
    const row = Math.floor(k / length);
    return Math.tanh(0.5 * value + 0.3 * small + 0.2 * text[row * dim] - timestep[row] / 2000);
  });
};

test.each(values.plans)("plan for $size px, $steps steps, $sampler", ({ size, steps, sampler, ...expected }) => {
  const rows = plan(modelOf(sampler), size, steps).flatMap((leg) => leg.evaluations);
  expect(rows.map((row) => row.timestep)).toEqual(expected.timesteps);
  expect(rows.map((row) => row.denoiser.name)).toEqual(expected.denoisers);
});

test.each(values.drawings)("drawing: $sampler, $steps steps, guidance $guidance, $size px", async (drawing) => {
  const { steps, guidance, sampler, size, seed } = drawing;
  const model = modelOf(sampler);
  const text = new Float32Array(values.null.length);
  text[0] = 1;
  const legs = plan(model, size, steps);
  const noise = makeNoise(seed, 4, legsTo(model, size));
  const drawn: Step[] = [];
  for await (const step of denoise(legs, toy, text, Float32Array.from(values.null), noise, guidance)) drawn.push(step);
  expect(drawn.map((step) => step.index)).toEqual(drawn.map((_, k) => k));
  const last = drawn[drawn.length - 1];
  expect([last.denoiser, last.sigma]).toEqual([null, 0]);
  const every4th = last.x0.filter((_, k) => k % 4 === 0 && Math.floor(k / size) % 4 === 0);
  const expected = new Float32Array(bytes(drawing.x0).buffer);
  expect(largestDifference(every4th, expected)).toBeLessThan(1e-4);
});

test("guidance is stronger at high noise", () => {
  for (const [sigma, scale, expected] of values.guidance)
    expect(guidanceAt(values.denoisers[0], sigma, scale)).toBeCloseTo(expected, 6);
});

test("a size that the model does not draw is refused", () => {
  const model = modelOf("dpmpp_2m");
  expect(sizesOf(model)).toEqual([32, 64, 128]);
  expect(() => plan(model, 48, null)).toThrow("draws 32, 64, 128 px");
});
