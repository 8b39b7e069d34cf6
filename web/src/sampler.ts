/** Noise levels of a drawing and the samplers that walk down them: diffusers' schedulers, for one picture. */

import { expert, leading, legsTo, type Denoiser, type Model } from "./cascade";
import { roundEven } from "./pictures";

/** One evaluation of a denoiser. */
export interface Evaluation {
  size: number; // px
  timestep: number; // 999 (noise) ... 0
  sigma: number; // standard deviation of the noise relative to the picture's unit scale
  denoiser: Denoiser;
}

/** The evaluations at one size; `following` is the sigma after each of them. */
export interface Leg {
  size: number;
  evaluations: Evaluation[];
  following: number[];
  sampler: "dpmpp_2m" | "ddim";
}

/** "trailing" timesteps: from the last one, pure noise, down (Lin et al. 2023, section 3.3). */
export function trailingTimesteps(total: number, steps: number): number[] {
  return Array.from({ length: steps }, (_, k) => roundEven(total - (k * total) / steps) - 1);
}

/**
 * The legs of a drawing up to `size` px. The first takes `steps` (null: the denoiser's default); every further one runs
 * the end of the schedule that its denoisers are trained on, in their own number of steps (`plan` in
 * pokediff/model/plan.py). A few-step base is sampled by DDIM, as it was distilled; else DPM-Solver++.
 */
export function plan(model: Model, size: number, steps: number | null): Leg[] {
  const { sigmas } = model;
  const sizes = legsTo(model, size);
  const sampler = leading(model, sizes[0]).fast ? "ddim" : "dpmpp_2m";
  return sizes.map((side, number) => {
    const lead = leading(model, side);
    let all = steps ?? lead.steps;
    let skipped = 0;
    if (number > 0) {
      const reach = sigmas.filter((sigma) => sigma < (lead.below ?? Infinity)).length / sigmas.length;
      all = Math.min(Math.ceil(lead.steps / reach), sigmas.length);
      skipped = all - lead.steps;
    }
    const timesteps = trailingTimesteps(sigmas.length, all).slice(skipped);
    const evaluations = timesteps.map((timestep) => {
      const sigma = sigmas[timestep];
      return { size: side, timestep, sigma, denoiser: expert(model, side, sigma) };
    });
    const stride = Math.floor(sigmas.length / all);
    const following = timesteps.map((timestep, k) =>
      sampler === "ddim" ? (sigmas[timestep - stride] ?? 0) : k + 1 < timesteps.length ? sigmas[timesteps[k + 1]] : 0,
    );
    return { size: side, evaluations, following, sampler };
  });
}

const alphaOf = (sigma: number) => 1 / Math.sqrt(1 + sigma * sigma);

/** An image with the noise of a level: alpha image + std noise, of unit variance. */
export function addNoise(image: Float32Array, noise: Float32Array, sigma: number): Float32Array {
  const alpha = alphaOf(sigma);
  return image.map((value, k) => alpha * (value + sigma * noise[k]));
}

/** A sampler: x at one noise level and the x0 predicted from it to x at the next level. */
export type Stepper = (x: Float32Array, x0: Float32Array, sigma: number, next: number) => Float32Array;

/** DDIM without added noise (Song et al. 2021, equation 12). */
export function ddim(): Stepper {
  return (x, x0, sigma, next) => {
    const [alpha, alphaNext] = [alphaOf(sigma), alphaOf(next)];
    const keep = (next * alphaNext) / (sigma * alpha); // x = alpha x0 + alpha sigma noise
    return x.map((value, k) => alphaNext * x0[k] + keep * (value - alpha * x0[k]));
  };
}

/**
 * DPM-Solver++(2M), midpoint (Lu et al. 2022, "DPM-Solver++", algorithm 2). The first step, for want of an earlier x0,
 * and the step to sigma 0 are of first order. It remembers the step before: one a leg.
 */
export function dpmSolver(): Stepper {
  let earlier: { x0: Float32Array; h: number } | null = null;
  return (x, x0, sigma, next) => {
    const [alpha, alphaNext] = [alphaOf(sigma), alphaOf(next)];
    const h = next === 0 ? Infinity : Math.log(sigma / next); // of lambda = log(alpha / std) = -log sigma
    const keep = (alphaNext * next) / (alpha * sigma);
    const gain = -alphaNext * Math.expm1(-h);
    const slope = earlier === null || next === 0 ? 0 : h / earlier.h / 2;
    const before = earlier?.x0 ?? x0;
    const result = x.map((value, k) => keep * value + gain * (x0[k] + slope * (x0[k] - before[k])));
    earlier = { x0, h };
    return result;
  };
}
