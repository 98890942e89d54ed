"""Run in an environment of its own: what transformers with compressed-tensors computes.

    python logits_worker.py FOLDER TOKENS_JSON

Prints one JSON document: the logits of all positions. Knows nothing of lpdeploy.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

folder, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor([json.loads(tokens)])).logits[0]
print(json.dumps(logits.float().tolist()))
