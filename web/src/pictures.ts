/** Pictures and their post-processing, as pokediff/data/images.py and pokediff/drawing/pixelart.py. */

/** Straight RGBA, row by row, like ImageData. */
export interface Picture {
  width: number;
  height: number;
  data: Uint8ClampedArray;
}

type Rgb = readonly number[]; // three numbers, 0 to 255

export const PIXEL_COLORS = 14; // of a drawn pixel sprite
const MAX_COLORS = 256;
const FAINT = 3; // of 255: alpha below is invisible
const SPECK_SHARE = 0.05; // of the largest island: smaller ones are specks
const [SPLIT_ROUNDS, MAX_ROUNDS] = [3, 50]; // of k-means, after a split and at the end
const LAB_STEPS = 256; // of one unit of CIE Lab

/** Whole numbers as numpy and torch round: halves to even. */
export function roundEven(value: number): number {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}

function sameShape({ width, height }: Picture): Picture {
  return { width, height, data: new Uint8ClampedArray(4 * width * height) };
}

/**
 * (channels, side, side) in [-1, 1], premultiplied RGBA, RGB or grey, to a picture; values outside are clipped, and so
 * is a colour that exceeds its alpha.
 */
export function fromModel(x: Float32Array, channels: 4 | 3 | 1, side: number): Picture {
  const area = side * side;
  const picture = { width: side, height: side, data: new Uint8ClampedArray(4 * area) };
  const level = (channel: number, pixel: number) => {
    const value = Math.min(1, Math.max(-1, x[channel * area + pixel]));
    return roundEven(Math.fround(Math.fround(value + 1) * 127.5));
  };
  for (let pixel = 0; pixel < area; pixel++) {
    const alpha = channels === 4 ? level(3, pixel) : 255;
    for (let channel = 0; channel < 3; channel++) {
      const color = Math.min(alpha, level(channels === 1 ? 0 : channel, pixel));
      picture.data[4 * pixel + channel] = alpha === 0 ? 0 : roundEven(Math.fround((color * 255) / alpha));
    }
    picture.data[4 * pixel + 3] = alpha;
  }
  return picture;
}

/** Every pixel becomes a square of `factor` px a side. */
export function enlarge(picture: Picture, factor: number): Picture {
  if (factor === 1) return picture;
  const [width, height] = [picture.width * factor, picture.height * factor];
  const [from, to] = [pixelsOf(picture), new Uint32Array(width * height)];
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++)
      to[row * width + column] = from[Math.floor(row / factor) * picture.width + Math.floor(column / factor)];
  return { width, height, data: new Uint8ClampedArray(to.buffer) };
}

/** A picture of which no pixel is transparent, over one colour; rounded as Python does it in float32. */
export function composite(picture: Picture, background: Rgb = [255, 255, 255]): Picture {
  const { fround } = Math;
  const result = sameShape(picture);
  for (let k = 0; k < picture.data.length; k += 4) {
    const alpha = fround(picture.data[k + 3] / 255);
    const rest = fround(1 - alpha);
    for (let c = 0; c < 3; c++)
      result.data[k + c] = roundEven(fround(fround(picture.data[k + c] * alpha) + fround(background[c] * rest)));
    result.data[k + 3] = 255;
  }
  return result;
}

/**
 * Pictures of one size as one sheet, row by row, with `gap` transparent pixels between them; by default about as many
 * rows as columns. Throws RangeError for none, and for pictures of several sizes.
 */
export function grid(
  pictures: readonly Picture[],
  columns = Math.max(1, roundEven(Math.sqrt(pictures.length))),
  gap = 2,
): Picture {
  if (pictures.length === 0) throw new RangeError("a sheet of no pictures");
  const [{ width: own, height: tall }] = pictures;
  const rows = Math.ceil(pictures.length / columns);
  const [width, height] = [columns * (own + gap) - gap, rows * (tall + gap) - gap];
  const sheet = { width, height, data: new Uint8ClampedArray(4 * width * height) };
  for (const [index, picture] of pictures.entries()) {
    if (picture.width !== own || picture.height !== tall) throw new RangeError("pictures of several sizes on a sheet");
    const [top, left] = [Math.floor(index / columns) * (tall + gap), (index % columns) * (own + gap)];
    for (let row = 0; row < tall; row++)
      sheet.data.set(picture.data.subarray(4 * row * own, 4 * (row + 1) * own), 4 * ((top + row) * width + left));
  }
  return sheet;
}

const pixelsOf = ({ data }: Picture) => new Uint32Array(data.slice().buffer); // one number a pixel

// ------------------------------------------------------------------------------------------------- specks, hard edges

/** Whether the prompt asks for pixel art. */
export function isPixelPrompt(prompt: string): boolean {
  return /(?<![\p{L}\p{N}_])pixel[- ]?(art|sprite|tile|icon)s?(?![\p{L}\p{N}_])/iu.test(prompt);
}

/** A copy in which the pixels for which `keep` is false are transparent. */
function kept(picture: Picture, keep: (pixel: number) => boolean): Picture {
  const result = sameShape(picture);
  for (let pixel = 0; 4 * pixel < picture.data.length; pixel++)
    if (keep(pixel)) result.data.set(picture.data.subarray(4 * pixel, 4 * pixel + 4), 4 * pixel);
  return result;
}

/** Makes pixels with an alpha below FAINT transparent. */
export function removeFaint(picture: Picture): Picture {
  return kept(picture, (pixel) => picture.data[4 * pixel + 3] >= FAINT);
}

/**
 * Makes islands smaller than a share of the largest one transparent. An island is a set of connected pixels, corners
 * included, with an alpha above 25; fainter pixels that touch no island go, too.
 */
export function removeSpecks(picture: Picture): Picture {
  const { width, height, data } = picture;
  const area = width * height;
  const labels = new Int32Array(area); // 0: no island
  const sizes = [0];
  const seen = (pixel: number) => data[4 * pixel + 3] > 25;
  for (let start = 0; start < area; start++) {
    if (!seen(start) || labels[start] > 0) continue;
    const label = sizes.length;
    sizes.push(0);
    labels[start] = label;
    for (const stack = [start]; stack.length > 0; sizes[label]++)
      for (const pixel of around(stack.pop()!, width, height))
        if (seen(pixel) && labels[pixel] === 0) {
          labels[pixel] = label;
          stack.push(pixel);
        }
  }
  if (sizes.length === 1) return picture;
  const least = SPECK_SHARE * sizes.reduce((a, b) => Math.max(a, b));
  const stays = sizes.map((size, label) => label > 0 && size >= least);
  const near = (pixel: number) => around(pixel, width, height).some((other) => stays[labels[other]]);
  return kept(picture, (pixel) => (labels[pixel] > 0 ? stays[labels[pixel]] : near(pixel)));
}

/** A pixel and its up to eight neighbours. */
function around(pixel: number, width: number, height: number): number[] {
  const [row, column] = [Math.floor(pixel / width), pixel % width];
  const found = [];
  for (let r = Math.max(0, row - 1); r <= Math.min(height - 1, row + 1); r++)
    for (let c = Math.max(0, column - 1); c <= Math.min(width - 1, column + 1); c++) found.push(r * width + c);
  return found;
}

/** Alpha 255 where it is at least 128, else 0. */
export function harden(picture: Picture): Picture {
  const result = kept(picture, (pixel) => picture.data[4 * pixel + 3] >= 128);
  for (let k = 3; k < result.data.length; k += 4) result.data[k] = result.data[k] > 0 ? 255 : 0;
  return result;
}

// ------------------------------------------------------------------------------------------------------------ palettes

// Linear sRGB to CIE XYZ relative to the white of D65 (IEC 61966-2-1).
const XYZ = [
  [0.4124, 0.3576, 0.1805],
  [0.2126, 0.7152, 0.0722],
  [0.0193, 0.1192, 0.9505],
].map((row) => row.map((value) => value / (row[0] + row[1] + row[2])));

/** sRGB to CIE Lab in whole steps of 1 / LAB_STEPS, so that Python finds the same distances to the last digit. */
export function toLab(rgb: Rgb): number[] {
  const linear = rgb.map((level) => {
    const value = level / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  const [x, y, z] = XYZ.map((row) => {
    const value = row[0] * linear[0] + row[1] * linear[1] + row[2] * linear[2];
    return value > (6 / 29) ** 3 ? Math.cbrt(value) : (value * (29 / 6) ** 2) / 3 + 4 / 29;
  });
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)].map((value) => roundEven(LAB_STEPS * value));
}

/**
 * At most `colors` colours for the picture's opaque pixels, in ascending order: the medians of clusters in CIE Lab.
 * Throws RangeError for a number outside 2 to 256.
 */
export function pickPalette(picture: Picture, colors: number): Rgb[] {
  if (!(Number.isInteger(colors) && colors >= 2 && colors <= MAX_COLORS))
    throw new RangeError(`a palette has 2 to ${MAX_COLORS} colours, not ${colors}`);
  const counted = new Map<number, number>(); // colour as one number: its pixels
  for (let k = 0; k < picture.data.length; k += 4) {
    if (picture.data[k + 3] < 128) continue;
    const color = (picture.data[k] << 16) | (picture.data[k + 1] << 8) | picture.data[k + 2];
    counted.set(color, (counted.get(color) ?? 0) + 1);
  }
  const codes = [...counted.keys()].sort((a, b) => a - b);
  const distinct = codes.map(channelsOf);
  if (distinct.length <= colors) return distinct;
  const weights = codes.map((code) => counted.get(code)!);
  const groups = Array.from({ length: colors }, (): number[] => []);
  cluster(distinct.map(toLab), weights, colors).forEach((label, k) => groups[label].push(k));
  const medians = new Set<number>();
  for (const members of groups) {
    if (members.length === 0) continue;
    const [r, g, b] = [0, 1, 2].map((c) => median(members.map((k) => [distinct[k][c], weights[k]])));
    medians.add((r << 16) | (g << 8) | b);
  }
  return [...medians].sort((a, b) => a - b).map(channelsOf);
}

const channelsOf = (code: number): Rgb => [code >> 16, (code >> 8) & 255, code & 255];

/** Of values with numbers of occurrences; the mean of both middle ones of an even number, rounded. */
function median(values: [number, number][]): number {
  const sorted = [...values].sort((a, b) => a[0] - b[0]);
  const total = sorted.reduce((sum, [, count]) => sum + count, 0);
  const at = (position: number) => {
    let before = 0;
    return sorted.find(([, count]) => (before += count) > position)![0];
  };
  return roundEven((at(Math.floor((total - 1) / 2)) + at(Math.floor(total / 2))) / 2);
}

/** The cluster of each point: k-means that starts by splitting, `_cluster` in pixelart.py. */
function cluster(points: number[][], weights: number[], number: number): Int32Array {
  let labels: Int32Array = new Int32Array(points.length);
  const centers = [points[0]];
  moveToMeans(centers, points, weights, labels);
  while (centers.length < number) {
    const errors = points.map((point, k) => weights[k] * squared(point, centers[labels[k]]));
    const sums = centers.map(() => 0);
    errors.forEach((error, k) => (sums[labels[k]] += error));
    const largest = indexOfLargest(sums);
    centers.push(points[indexOfLargest(errors.map((error, k) => (labels[k] === largest ? error : -1)))]);
    for (let round = 0; round < SPLIT_ROUNDS; round++) {
      labels = nearestOf(points, centers);
      moveToMeans(centers, points, weights, labels);
    }
  }
  for (let round = 0; round < MAX_ROUNDS; round++) {
    const moved = nearestOf(points, centers);
    if (moved.every((label, k) => label === labels[k])) break;
    labels = moved;
    moveToMeans(centers, points, weights, labels);
  }
  return labels;
}

/** Moves each centre to the weighted mean of its cluster, rounded; that of an empty one stays. */
function moveToMeans(centers: number[][], points: number[][], weights: number[], labels: Int32Array): void {
  const sums = centers.map(() => [0, 0, 0, 0]);
  points.forEach((point, k) => {
    const sum = sums[labels[k]];
    for (let axis = 0; axis < 3; axis++) sum[axis] += weights[k] * point[axis];
    sum[3] += weights[k];
  });
  sums.forEach(([l, a, b, total], k) => {
    if (total > 0) centers[k] = [l, a, b].map((sum) => roundEven(sum / total));
  });
}

const squared = (a: number[], b: number[]) => (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2;

const indexOfLargest = (values: number[]) => values.reduce((best, value, k) => (value > values[best] ? k : best), 0);

/** The nearest centre of each point, the first of equally near ones. */
function nearestOf(points: number[][], centers: number[][]): Int32Array {
  const flat = Float64Array.from(centers.flat()); // plain loops: 256 colours of a large picture take 1e9 distances
  const labels = new Int32Array(points.length);
  for (let k = 0; k < points.length; k++) {
    const [l, a, b] = points[k];
    let least = Infinity;
    for (let at = 0; at < flat.length; at += 3) {
      const x = l - flat[at];
      const y = a - flat[at + 1];
      const z = b - flat[at + 2];
      const distance = x * x + y * y + z * z;
      if (distance < least) {
        least = distance;
        labels[k] = at / 3;
      }
    }
  }
  return labels;
}

/** Every visible pixel in the colour of the palette that is nearest in CIE Lab; alpha stays. */
export function applyPalette(picture: Picture, palette: readonly Rgb[]): Picture {
  const centers = palette.map(toLab);
  const found = new Map<number, Rgb>();
  const result = sameShape(picture);
  for (let k = 0; k < picture.data.length; k += 4) {
    result.data[k + 3] = picture.data[k + 3];
    if (picture.data[k + 3] === 0) continue;
    const code = (picture.data[k] << 16) | (picture.data[k + 1] << 8) | picture.data[k + 2];
    if (!found.has(code)) found.set(code, palette[nearestOf([toLab(channelsOf(code))], centers)[0]]);
    result.data.set(found.get(code)!, k);
  }
  return result;
}

/**
 * The colours of a palette file: .hex (one rrggbb a line, as Lospec writes them) or .gpl (GIMP, Aseprite, Inkscape).
 * Throws an Error with a sentence for another file, a line that is no colour, and 0 or more than 256 colours.
 */
export function parsePalette(text: string, name: string): Rgb[] {
  const lines = text.replace(/^\uFEFF/, "").split(/\r\n|\r|\n/).map((line) => line.trim()); // prettier-ignore
  const colors: Rgb[] = [];
  let body: string[];
  let read: (line: string) => Rgb | null;
  if (/\.hex$/i.test(name)) {
    body = lines.filter(Boolean);
    read = (line) => (/^#?[0-9a-f]{6}$/i.test(line) ? channelsOf(parseInt(line.replace("#", ""), 16)) : null);
  } else if (/\.gpl$/i.test(name)) {
    if (lines[0] !== "GIMP Palette") throw new Error(`${name}: its first line is not "GIMP Palette".`);
    body = lines.slice(1).filter((line) => line && !/^(#|(Name|Columns|Channels):)/.test(line));
    read = (line) => {
      const match = /^(\d+)\s+(\d+)\s+(\d+)/.exec(line);
      return match && match.slice(1).map((part) => Math.min(255, Number(part)));
    };
  } else throw new Error(`${name}: a palette is a .gpl or .hex file.`);
  for (const line of body) {
    const color = read(line);
    if (color === null) throw new Error(`${name}: "${line}" is not a colour.`);
    colors.push(color);
  }
  if (colors.length < 1 || colors.length > MAX_COLORS)
    throw new Error(`${name} has ${colors.length} colours, not 1 to ${MAX_COLORS}.`);
  return colors;
}

/** A finished picture: with `clean` without faint pixels and specks, with `hard` without half-transparent pixels, in the
 * colours of `palette`, or as many. */
export function finish(
  picture: Picture,
  palette: number | readonly Rgb[] | null,
  hard: boolean,
  clean = true,
): Picture {
  let result = clean ? removeSpecks(removeFaint(picture)) : picture;
  if (hard) result = harden(result);
  if (palette === null) return result;
  const colors = typeof palette === "number" ? pickPalette(result, palette) : palette;
  return colors.length > 0 ? applyPalette(result, colors) : result;
}
