/** Prompts to the token ids of the text encoder. */

import { Tokenizer } from "@huggingface/tokenizers";

/** As `ClipTextEncoder`: start mark, at most `maxTokens` in all, end mark (CLIP reads its vector off the end mark). */
export class PromptTokenizer {
  private readonly tokenizer: Tokenizer;

  constructor(
    file: object,
    config: object,
    private readonly maxTokens: number,
    private readonly endToken: number,
  ) {
    this.tokenizer = new Tokenizer(file, config);
  }

  /** The ids, and whether words were cut. */
  encode(prompt: string): { ids: number[]; cut: boolean } {
    const ids: number[] = this.tokenizer.encode(prompt).ids;
    if (ids.length <= this.maxTokens) return { ids, cut: false };
    return { ids: [...ids.slice(0, this.maxTokens - 1), this.endToken], cut: true };
  }
}
