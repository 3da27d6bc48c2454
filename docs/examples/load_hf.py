"""Load what `make export FORMAT=hf` wrote with transformers, and let it write a text (extra `hf`).

.venv/bin/python docs/examples/load_hf.py exported/hf
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scmoe.hf  # noqa: F401  # transformers now knows the architectures that only this project has


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/latest/export/hf"
    if not Path(folder).exists():
        sys.exit(f"{folder} does not exist. Write it with: make export FORMAT=hf")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("My fellow citizens", return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**prompt, max_new_tokens=20, max_length=None, do_sample=True, top_k=50)
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()
