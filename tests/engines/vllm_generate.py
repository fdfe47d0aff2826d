"""Generate greedily in vLLM, in a process of its own: `vllm_generate.py MODEL PROMPTS.json OUT.json OPTIONS.json`."""

import json
import sys

from vllm import LLM, SamplingParams


def main():
    model, prompts, out, options = sys.argv[1:]
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4, **json.loads(options))
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    with open(prompts) as file:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in json.load(file)], sampling)
    results = []
    for output in outputs:
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        said = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        results.append((tokens, [said[i][tokens[i]].logprob for i in range(1, len(tokens))]))
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":  # vLLM starts processes that import this
    main()
