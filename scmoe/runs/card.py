"""The model card, README.md of an exported folder: what the model is, how it was trained, how it is loaded.

It names no path of the machine. The licence is left to the user.
"""

from dataclasses import asdict
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.runs.hf_config import OURS

CARD = """---
{head}---

# {family}, {architecture}

A language model with {parameters:,} parameters, trained with scmoe for {step:,} of {steps:,} optimizer steps of \
{batch:,} sequences with {seq_len:,} tokens each, on {data}.{moe}

## Load it

```python
{loading}```

`scmoe.load("FOLDER")` returns the same network without transformers.

## Settings of the training

```yaml
{settings}```

## Licence and limits

No licence is set. Choose one with a line `license:` at the top. Add what the model is for and how it was evaluated \
(`make evaluate`). It was not trained to follow instructions, or to be safe.
"""


def model_card(config: Config, content: dict[str, Any], step: int, parameters: int) -> str:
    """Return the text. content: of config.json. parameters: their number."""
    moe, data, trainer = config.moe, config.data, config.trainer
    of_hub, dense, has_tokenizer = data.name == "hf", moe.architecture == "dense", content["eos_token_id"] is not None
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["scmoe"] if dense else ["scmoe", "mixture-of-experts"]
    if of_hub:
        head["datasets"] = [data.path]
    loading = [
        "import scmoe.hf  # transformers then knows the model" if content["model_type"] == OURS else "",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}\n",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")' if has_tokenizer else "",
    ]
    settings = {name: asdict(getattr(config, name)) for name in ("model", "moe", "optim")}
    settings["trainer"] = {key: getattr(trainer, key) for key in ("precision", "gradient_clip", "accumulate")}
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        family=config.model.family,
        architecture=moe.architecture,
        parameters=parameters,
        step=step,
        steps=trainer.max_steps,
        batch=data.global_batch_size,
        seq_len=data.seq_len,
        data=f"the data set {data.path}" if of_hub else f"data.name={data.name}",
        moe="" if dense else f" Each token goes to {moe.top_k} of {moe.num_experts} experts; none is dropped.",
        loading="".join(f"{line}\n" for line in loading if line),
        settings=yaml.safe_dump({**settings, "seed": config.seed}, sort_keys=False),
    )
