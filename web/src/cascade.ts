/** What a model is: its denoisers, and which one is used where. The same rules as pokediff/model/cascade.py. */

/** A denoiser, as its config.json describes it. */
export interface Denoiser {
  name: string;
  imageSize: number; // px
  below: number | null; // sigma below which it is used; null: any
  upscale: number; // factor from the small picture that it receives; 1: none
  steps: number; // default number of steps
  guidanceScale: number | null; // default; null: never guided
  highNoiseGuidance: number; // factor on (guidance scale - 1) above HIGH_NOISE
  fast: boolean; // a few-step denoiser, sampled by DDIM as it was distilled
  file: string; // its ONNX network
  bytes: number;
}

/** model.json of a site; pokediff/drawing/web.py writes it. */
export interface Model {
  name: string;
  version: string; // of pokediff
  channels: 4 | 3 | 1;
  defaultSize: number; // px
  pixelArt: boolean; // hard edges by default
  sigmas: number[]; // of every timestep of the noise schedule, ascending
  denoisers: Denoiser[];
  nullText: number[]; // text vector of the empty prompt
  textEncoder: { file: string; bytes: number; maxTokens: number; endToken: number };
  tokenizer: { file: string; bytes: number; config: object };
  runtimeBytes: number; // of ONNX Runtime's WebAssembly
  words: Record<string, Record<string, number>>; // known words by group, with their numbers of pictures
  rights: string; // whose pictures it was trained on, and what that allows
  attribution: string | null; // file with the authors of the training pictures
}

export const HIGH_NOISE = 10; // sigma above which shapes are decided

/** The sizes in px that a model draws, ascending. */
export function sizesOf(model: Model): number[] {
  return [...new Set(model.denoisers.map((denoiser) => denoiser.imageSize))].sort((a, b) => a - b);
}

const limit = (denoiser: Denoiser) => denoiser.below ?? Infinity;
const ofSize = (model: Model, size: number) => model.denoisers.filter(({ imageSize }) => imageSize === size);

/**
 * The denoiser for this size and noise: of those used at `sigma`, the one trained on the least noise. Throws RangeError
 * when there is none.
 */
export function expert(model: Model, size: number, sigma: number): Denoiser {
  const able = ofSize(model, size).filter((denoiser) => sigma < limit(denoiser));
  if (able.length === 0) throw new RangeError(`no denoiser of ${size} px for sigma ${sigma}`);
  return able.reduce((best, one) => (limit(one) < limit(best) ? one : best));
}

/** The denoiser of this size for the most noise. Throws RangeError for a size that the model does not draw. */
export function leading(model: Model, size: number): Denoiser {
  const able = ofSize(model, size);
  if (able.length === 0) throw new RangeError(`size ${size}: this model draws ${sizesOf(model).join(", ")} px`);
  return able.reduce((best, one) => (limit(one) > limit(best) ? one : best));
}

/** The sizes that are drawn in order up to `size`, e.g. [32, 64]. */
export function legsTo(model: Model, size: number): number[] {
  const { upscale } = leading(model, size);
  return upscale === 1 ? [size] : [...legsTo(model, size / upscale), size];
}

/** The guidance scale of a denoiser at a noise level; `guidance_at` in pokediff/model/cascade.py says why. */
export function guidanceAt(denoiser: Denoiser, sigma: number, scale: number | null): number {
  if (denoiser.guidanceScale === null) return 1;
  const wanted = scale ?? denoiser.guidanceScale;
  const stronger = wanted > 1 && sigma > HIGH_NOISE ? denoiser.highNoiseGuidance : 1;
  return 1 + (wanted - 1) * stronger;
}
