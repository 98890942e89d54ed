"""Run in llama-cpp-python's own environment: greedy tokens of a GGUF file, and texts as tokens.

    python llama_worker.py FILE PROMPT_TOKENS_JSON TOKENS TEXTS_JSON

Prints one JSON document. Knows nothing of lpdeploy.
"""

import itertools
import json
import sys

import llama_cpp

file, prompt, count, texts = sys.argv[1:]
llama = llama_cpp.Llama(
    file,
    n_ctx=128,
    # A cache in f32, as transformers has it.
    type_k=llama_cpp.GGML_TYPE_F32,
    type_v=llama_cpp.GGML_TYPE_F32,
    verbose=False,
)
tokens = llama.generate(json.loads(prompt), top_k=1, temp=0.0, repeat_penalty=1.0)
print(
    json.dumps({
        "version": llama_cpp.__version__,
        "tokens": list(itertools.islice(tokens, int(count))),
        "texts": [
            llama.tokenize(text.encode(), add_bos=True, special=False)
            for text in json.loads(texts)
        ],
    })
)  # fmt: skip
