/** The worker: it loads the networks and draws, so that the page never waits. */

import { legsTo, type Model } from "./cascade";
import { denoise } from "./denoise";
import { Networks, threads } from "./networks";
import { makeNoise, slerp } from "./noise";
import { finish, fromModel, isPixelPrompt, PIXEL_COLORS, type Picture } from "./pictures";
import { plan, type Leg } from "./sampler";

/** One picture to draw: a prompt and a seed, or a variation, whose noise moves by `share` towards that of `to`. */
export interface Job {
  prompt: string;
  seed: number;
  to?: number;
  share?: number; // 0 to 1
}

/** How to draw; null: the model's default. */
export interface Sampling {
  size: number;
  steps: number | null;
  guidance: number | null;
}

export type Request =
  | { type: "load"; model: Model; site: string; size: number }
  | { type: "draw"; id: number; jobs: Job[]; sampling: Sampling }
  | { type: "stop" };

/** One step of a picture; the last one, denoiser null, has the finished picture in `x0` and the raw one in `x`. */
export interface Frame {
  index: number;
  of: number; // steps
  sigma: number;
  denoiser: string | null;
  x: Picture;
  x0: Picture;
}

export type Reply =
  | { type: "loading"; loaded: number; total: number }
  | { type: "ready"; threads: number }
  | { type: "frame"; id: number; job: number; frame: Frame }
  | { type: "notice"; id: number; message: string }
  | { type: "done"; id: number }
  | { type: "error"; id: number | null; message: string };

let model: Model;
let networks: Networks;
let current = 0; // the drawing that goes on; a stop or a new one changes it
let loading: Promise<void> = Promise.resolve();

const reply = (message: Reply, transfer: Transferable[] = []) => self.postMessage(message, { transfer });

/** Let waiting messages in, such as a stop. */
const pause = () =>
  new Promise<void>((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve();
    port2.postMessage(null);
  });

/** Load the denoisers of these legs, after what is being loaded. */
async function load(legs: readonly Leg[]): Promise<void> {
  const denoisers = new Set(legs.flatMap((leg) => leg.evaluations.map(({ denoiser }) => denoiser)));
  const progress = (loaded: number, total: number) => reply({ type: "loading", loaded, total });
  loading = loading.catch(() => undefined).then(() => networks.load([...denoisers], progress));
  await loading;
}

/** The noise of a job at every size; of a variation between two seeds. */
function noiseOf(job: Job, sizes: number[]): Float32Array[] {
  const own = makeNoise(job.seed, model.channels, sizes);
  if (job.to === undefined) return own;
  const other = makeNoise(job.to, model.channels, sizes);
  return own.map((noise, k) => slerp(noise, other[k], job.share ?? 0));
}

async function draw(id: number, jobs: Job[], { size, steps, guidance }: Sampling): Promise<void> {
  current = id;
  const legs = plan(model, size, steps);
  await load(legs);
  const of = legs.reduce((sum, leg) => sum + leg.evaluations.length, 0);
  const { vector: negative } = await networks.encode("");
  for (const [number, job] of jobs.entries()) {
    const { vector, cut } = await networks.encode(job.prompt);
    if (cut && number === 0) reply({ type: "notice", id, message: "The prompt is too long; its end was not read." });
    const noise = noiseOf(job, legsTo(model, size));
    for await (const step of denoise(legs, networks.run, vector, negative, noise, guidance)) {
      await pause();
      if (current !== id) return;
      const { index, sigma, denoiser } = step;
      const raw = fromModel(step.x0, model.channels, step.size);
      const last = denoiser === null;
      const x = last ? raw : fromModel(step.x, model.channels, step.size);
      const x0 = last ? finished(raw, job.prompt) : raw;
      reply({ type: "frame", id, job: number, frame: { index, of, sigma, denoiser, x, x0 } });
    }
  }
  reply({ type: "done", id });
}

/** As `sample.py` finishes a picture: a prompt for pixel art ends in hard alpha and few colours. */
function finished(raw: Picture, prompt: string): Picture {
  const pixel = isPixelPrompt(prompt);
  return finish(raw, pixel ? PIXEL_COLORS : null, pixel || model.pixelArt);
}

self.onmessage = async ({ data }: MessageEvent<Request>) => {
  const id = data.type === "draw" ? data.id : null;
  try {
    if (data.type === "stop") current = 0;
    else if (data.type === "load") {
      model = data.model;
      networks = new Networks(model, new URL(data.site));
      await load(plan(model, data.size, null));
      reply({ type: "ready", threads: threads() });
    } else await draw(data.id, data.jobs, data.sampling);
  } catch (error) {
    reply({ type: "error", id, message: error instanceof Error ? error.message : String(error) });
  }
};
