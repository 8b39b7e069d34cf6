/** From a prompt's vector and noise to a picture, step by step: `PokeDiffPipeline.denoise` for one picture. */

import { guidanceAt, type Denoiser } from "./cascade";
import { addNoise, ddim, dpmSolver, type Evaluation, type Leg } from "./sampler";

/** Runs a network on `rows` pictures of (channels, size, size) each, and returns x0 of the same shape. */
export type Run = (
  denoiser: Denoiser,
  rows: number,
  inputs: { x: Float32Array; timestep: Float32Array; text: Float32Array; low_res?: Float32Array },
) => Promise<Float32Array>;

/** One evaluation, or the end: sigma 0, denoiser null, x = x0 = the picture. (channels, size, size) in [-1, 1]. */
export interface Step {
  index: number;
  size: number; // px, of the denoiser
  sigma: number;
  denoiser: string | null;
  x: Float32Array;
  x0: Float32Array;
}

const clamp = (x: Float32Array) => x.map((value) => Math.min(1, Math.max(-1, value)));

/** Every pixel becomes a square of `factor` px a side; (channels, size, size). */
export function enlargePixels(x: Float32Array, size: number, factor: number): Float32Array {
  const side = size * factor;
  return Float32Array.from({ length: x.length * factor * factor }, (_, k) => {
    const [channel, row, column] = [Math.floor(k / (side * side)), Math.floor(k / side) % side, k % side];
    return x[(channel * size + Math.floor(row / factor)) * size + Math.floor(column / factor)];
  });
}

/**
 * Yields every step from noise to the picture, the picture last. `noise` holds the first noise of each leg, `negative`
 * is the vector that guidance moves away from; `guidance` null: the denoiser's default.
 */
export async function* denoise(
  legs: readonly Leg[],
  run: Run,
  text: Float32Array,
  negative: Float32Array,
  noise: readonly Float32Array[],
  guidance: number | null,
): AsyncGenerator<Step> {
  let x = noise[0];
  let lowRes: Float32Array | undefined;
  let index = 0;
  for (const [number, leg] of legs.entries()) {
    if (number > 0) {
      lowRes = x;
      const enlarged = enlargePixels(x, legs[number - 1].size, leg.size / legs[number - 1].size);
      x = addNoise(enlarged, noise[number], leg.evaluations[0].sigma);
    }
    const stepper = leg.sampler === "ddim" ? ddim() : dpmSolver();
    for (const [k, evaluation] of leg.evaluations.entries()) {
      const { size, sigma, denoiser } = evaluation;
      const x0 = await predict(run, evaluation, x, text, negative, lowRes, guidanceAt(denoiser, sigma, guidance));
      yield { index, size, sigma, denoiser: denoiser.name, x, x0 };
      x = stepper(x, x0, sigma, leg.following[k]);
      index += 1;
    }
    x = clamp(x);
  }
  yield { index, size: legs[legs.length - 1].size, sigma: 0, denoiser: null, x, x0: x };
}

/** x0 under classifier-free guidance (Ho & Salimans 2022): both texts in one run; with scale 1 only the wanted one. */
async function predict(
  run: Run,
  { timestep, denoiser }: Evaluation,
  x: Float32Array,
  text: Float32Array,
  negative: Float32Array,
  lowRes: Float32Array | undefined,
  scale: number,
): Promise<Float32Array> {
  const low_res = denoiser.upscale > 1 ? lowRes : undefined;
  if (scale === 1) return clamp(await run(denoiser, 1, { x, text, timestep: Float32Array.of(timestep), low_res }));
  const both = await run(denoiser, 2, {
    x: joined(x, x),
    text: joined(text, negative),
    timestep: Float32Array.of(timestep, timestep),
    low_res: low_res && joined(low_res, low_res),
  });
  const [wanted, unwanted] = [both.subarray(0, x.length), both.subarray(x.length)];
  return clamp(wanted.map((value, k) => unwanted[k] + scale * (value - unwanted[k])));
}

function joined(a: Float32Array, b: Float32Array): Float32Array {
  const both = new Float32Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}
