import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { PromptTokenizer } from "../src/text";
import { read } from "./values";

const folder = new URL("../../checkpoints/pokediff/", import.meta.url);
const json = (path: string) => JSON.parse(readFileSync(new URL(path, folder), "utf8"));
const { max_position_embeddings: length, eos_token_id: end } = json("text_encoder/config.json");
const tokenizer = new PromptTokenizer(
  json("tokenizer/tokenizer.json"),
  json("tokenizer/tokenizer_config.json"),
  length,
  end,
);

test.each(read<{ prompt: string; ids: number[] }[]>("tokens"))("ids of $prompt", ({ prompt, ids }) => {
  expect(tokenizer.encode(prompt).ids).toEqual(ids);
});

test("a prompt that is too long says so", () => {
  expect(tokenizer.encode("a cat").cut).toBe(false);
  expect(tokenizer.encode("cat ".repeat(100)).cut).toBe(true);
});
