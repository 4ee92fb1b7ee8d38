"""One vLLM engine in a process of its own: ``python -m tests.vllm_child QUESTION ANSWER``.

The question is a JSON file with ``engine`` (arguments of ``vllm.LLM``), ``prompts`` (lists of token
ids) and ``tokens`` (how many to generate); the answer a JSON file with ``tokens``, as many greedy
lists, and ``cached``, how many tokens of each prompt another one had left.
"""

import json
import sys
from pathlib import Path


def main(question: str, answer: str) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    engine = LLM(skip_tokenizer_init=True, enforce_eager=True, **asked["engine"])
    greedy = SamplingParams(
        temperature=0, max_tokens=asked["tokens"], detokenize=False, ignore_eos=True
    )
    found = engine.generate([{"prompt_token_ids": p} for p in asked["prompts"]], greedy)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    cached = [one.num_cached_tokens for one in found]
    text = json.dumps({"tokens": tokens, "cached": cached})
    Path(answer).write_text(text, encoding="utf-8")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main(*sys.argv[1:])
