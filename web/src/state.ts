/** The state of the page and what changes it; app.tsx shows it. */

import { computed, signal } from "@preact/signals";
import { sizesOf, type Model } from "./cascade";
import { keepOffline } from "./offline";
import { finish, type Picture } from "./pictures";
import { forget, keep, readShelf, type Kept } from "./shelf";
import type { Frame, Job, Reply, Request, Sampling } from "./worker";

/** A picture of the present drawing and its steps so far. */
export interface Drawn {
  job: Job;
  frames: Frame[];
}

export const MAX_SEED = 2 ** 32 - 1;
export const MAX_NUMBER = 16;
export const MAX_STEPS = 100;
export const site = new URL(".", location.href.split("#")[0]);

export const model = signal<Model | null>(null);
export const status = signal("Loading the model …"); // one sentence
export const failure = signal<string | null>(null); // one sentence
export const progress = signal<number | null>(0); // 0 to 1 while loading
export const offline = signal(false); // whether the page works offline

// The form.
export const prompt = signal("a blue water turtle");
export const seed = signal(randomSeed());
export const number = signal(1);
export const size = signal(64);
export const steps = signal<number | null>(null); // null: the model's default
export const guidance = signal<number | null>(null);

// The present drawing.
export const sampling = signal<Sampling | null>(null);
export const drawn = signal<Drawn[]>([]);
export const drawing = signal(false);
export const step = signal<number | null>(null); // the slider; null: the newest
export const noisy = signal(false); // show x instead of x0
export const selected = signal(0);
export const palette = signal<number | readonly (readonly number[])[] | null>(null); // colours or their number
export const scale = signal(8); // of downloads: px of a pixel
export const shelf = signal<Kept[]>([]);

export const defaults = computed(() => {
  const base = model.value?.denoisers.find((one) => one.upscale === 1 && one.below === null);
  return { steps: base?.steps ?? 15, guidance: base?.guidanceScale ?? 1 };
});
export const stepsOf = computed(() => drawn.value.find(({ frames }) => frames.length)?.frames[0].of ?? 0);

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
let drawingId = 0;
let loaded = false;
const send = (request: Request) => worker.postMessage(request);

export function randomSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

// --------------------------------------------------------------------------------------------------------- the model

/** Load the model; a link draws its picture as soon as that is done. */
export async function start(): Promise<void> {
  worker.onmessage = ({ data }: MessageEvent<Reply>) => receive(data);
  worker.onerror = () => fail("This browser cannot run the model: it needs WebAssembly with SIMD.");
  readLink();
  void readShelf().then((kept) => (shelf.value = kept));
  try {
    const response = await fetch(new URL("model.json", site));
    if (!response.ok) throw new Error(`The model could not be loaded: the server answered ${response.status}.`);
    model.value = (await response.json()) as Model;
  } catch (error) {
    fail(error instanceof TypeError ? "The model could not be loaded: check the connection." : String(error));
    return;
  }
  document.title = `${model.value.name}: draw creatures`;
  const known = sizesOf(model.value);
  if (!linked("size") || !known.includes(size.value)) size.value = model.value.defaultSize;
  send({ type: "load", model: model.value, site: site.href, size: size.value });
}

function receive(message: Reply): void {
  if (message.type === "loading") {
    progress.value = message.loaded / message.total;
    const [done, all] = [message.loaded, message.total].map((bytes) => (bytes / 1e6).toFixed(1));
    status.value = `Loading the model: ${done} of ${all} MB`;
  } else if (message.type === "ready") {
    [loaded, progress.value, status.value] = [true, null, "Ready."];
    void keepOffline(site).then((works) => (offline.value = works));
    if (linked("prompt") && !drawing.value) draw();
  } else if (message.type === "error") {
    if (message.id === null || message.id === drawingId) fail(message.message);
  } else if (message.id === drawingId && drawing.value) {
    if (message.type === "frame") addFrame(message.job, message.frame);
    else if (message.type === "notice") status.value = message.message;
    else finishDrawing();
  }
}

function fail(message: string): void {
  [failure.value, status.value, progress.value, drawing.value] = [message, "", null, false];
}

// --------------------------------------------------------------------------------------------------------- drawing

/** Draw what the form says, or other jobs with its settings. */
export function draw(jobs?: Job[]): void {
  if (!loaded) return;
  const text = prompt.value.trim();
  const all = jobs ?? Array.from({ length: number.value }, (_, k) => ({ prompt: text, seed: seed.value + k }));
  sampling.value = { size: size.value, steps: steps.value, guidance: guidance.value };
  drawn.value = all.map((job) => ({ job, frames: [] }));
  [drawing.value, step.value, selected.value, failure.value] = [true, null, 0, null];
  status.value = `Drawing ${counted(all.length)} …`;
  drawingId += 1;
  if (!jobs) writeLink();
  send({ type: "draw", id: drawingId, jobs: all, sampling: sampling.value });
}

/** Stop at once; the pictures that are done stay. */
export function stop(): void {
  if (!drawing.value) return;
  send({ type: "stop" });
  const done = drawn.value.filter(({ frames }) => isDone(frames));
  drawing.value = false;
  drawingId += 1;
  status.value = `Stopped; ${counted(done.length)} finished.`;
}

/** Pictures whose noise lies near that of the selected one, `share` of the way to another seed. */
export function vary(share: number): void {
  const { job } = drawn.value[selected.value];
  const jobs = Array.from({ length: 8 }, (_, k) => ({
    prompt: job.prompt,
    seed: job.seed,
    to: job.seed + k + 1,
    share,
  }));
  draw([{ prompt: job.prompt, seed: job.seed }, ...jobs]);
}

function addFrame(job: number, frame: Frame): void {
  progress.value = null; // a denoiser of another size may have been loaded
  drawn.value = drawn.value.map((one, k) => (k === job ? { ...one, frames: [...one.frames, frame] } : one));
  const left = drawn.value.filter(({ frames }) => !isDone(frames)).length;
  status.value = `Drawing: step ${Math.min(frame.index + 1, frame.of)} of ${frame.of}, ${counted(left)} left`;
  if (isDone(drawn.value[job].frames)) keepPicture(drawn.value[job]);
}

function keepPicture({ job, frames }: Drawn): void {
  const id = `${Date.now().toString(36).padStart(9, "0")}-${job.seed}-${job.to ?? ""}`;
  const kept = { id, job, sampling: sampling.value!, picture: frames[frames.length - 1].x0 };
  shelf.value = keep(shelf.value, kept);
}

function finishDrawing(): void {
  drawing.value = false;
  status.value = `${counted(drawn.value.length)} drawn.`;
}

export const isDone = (frames: readonly Frame[]) => frames.length > 0 && frames[frames.length - 1].denoiser === null;
export const counted = (n: number) => `${n} picture${n === 1 ? "" : "s"}`;

/** The picture to show of a drawing: at the slider's step, x or x0; finished ones in the palette. */
export function shown({ frames }: Drawn): Picture | null {
  const frame = frames[Math.min(step.value ?? Infinity, frames.length - 1)];
  if (!frame) return null;
  if (frame.denoiser !== null) return noisy.value ? frame.x : frame.x0;
  return inPalette(frame.x0);
}

/** A finished picture in the palette that was chosen. */
export function inPalette(picture: Picture): Picture {
  return palette.value === null ? picture : finish(picture, palette.value, false, false);
}

// ------------------------------------------------------------------------------------------------------------ shelf

/** Show a picture of the shelf, and its settings in the form. */
export function open({ job, sampling: how, picture }: Kept): void {
  stop();
  [prompt.value, seed.value, number.value] = [job.prompt, job.seed, 1];
  [size.value, steps.value, guidance.value] = [how.size, how.steps, how.guidance];
  sampling.value = how;
  drawn.value = [{ job, frames: [{ index: 0, of: 0, sigma: 0, denoiser: null, x: picture, x0: picture }] }];
  [step.value, selected.value, failure.value] = [null, 0, null];
  status.value = "From the shelf; Draw shows its steps again.";
  writeLink();
}

export async function clearShelf(): Promise<void> {
  await forget(shelf.value.map(({ id }) => id));
  shelf.value = [];
}

// ------------------------------------------------------------------------------------------------------------- links

const params = () => new URLSearchParams(location.hash.slice(1));
const linked = (name: string) => params().has(name);

/** The form as the part of a link after #; the same link draws the same picture. */
function writeLink(): void {
  const values: Record<string, string | number | null> = {
    prompt: prompt.value.trim(),
    seed: seed.value,
    size: size.value,
    number: number.value === 1 ? null : number.value,
    steps: steps.value,
    guidance: guidance.value,
  };
  const given = Object.entries(values).flatMap(([name, value]) => (value === null ? [] : [[name, String(value)]]));
  history.replaceState(null, "", `#${new URLSearchParams(given)}`);
}

function readLink(): void {
  const values = params();
  const whole = (name: string, low: number, high: number) => {
    const value = Number(values.get(name) ?? NaN);
    return Number.isInteger(value) && value >= low && value <= high ? value : null;
  };
  prompt.value = values.get("prompt") ?? prompt.value;
  seed.value = whole("seed", 0, MAX_SEED) ?? seed.value;
  size.value = whole("size", 1, 1024) ?? size.value;
  number.value = whole("number", 1, MAX_NUMBER) ?? 1;
  steps.value = whole("steps", 1, MAX_STEPS);
  const scale = Number(values.get("guidance") ?? NaN);
  guidance.value = scale >= 0 && scale <= 20 ? scale : null;
}

addEventListener("hashchange", () => {
  readLink();
  if (model.value && !sizesOf(model.value).includes(size.value)) size.value = model.value.defaultSize;
  if (linked("prompt")) draw();
});
