"""The configurations of the parts that train, as values, so that neither OmegaConf nor a YAML file is needed.

tests/unit/test_gpu_check.py compares them with the files in configs/.
"""

from dataclasses import replace

from scmoe.config.fields import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, TrainerConfig
from scmoe.experiments.bench.gpu.gpu_parts import ROOT

# configs/base.yaml
BASE = Config(
    moe=MoEConfig(noisy=True, capacity_factor=2.0, load_balance_coef=0.01),
    optim=OptimConfig(beta1=0.9, beta2=0.95, weight_decay=0.1, min_lr_ratio=0.1),
    trainer=TrainerConfig(gradient_clip=1.0, precision="bf16-mixed"),
)
# configs/model/gpt2_moe_small.yaml
GPT2_MOE_SMALL = replace(
    BASE,
    model=ModelConfig("gpt", layers=12, dim=768, heads=12),
    data=DataConfig("synthetic", tokenizer="gpt2", vocab_size=50257, seq_len=1024),
)
# configs/quickstart.yaml on the pages of docs/, which every checkout has; synthetic tokens have nothing to learn
QUICKSTART = replace(
    BASE,
    model=ModelConfig("gpt", layers=4, dim=192, heads=6),
    moe=replace(BASE.moe, noisy=False),
    data=DataConfig("text", str(ROOT / "docs"), vocab_size=4096, seq_len=256, global_batch_size=8, val_sequences=128),
    optim=replace(BASE.optim, lr=3e-3, warmup_steps=40),
    trainer=replace(BASE.trainer, max_steps=350),
)


def tiny(config: Config) -> Config:
    """Returns the same model at a size for a trial on a CPU."""
    model = replace(config.model, layers=2, dim=48, heads=6)
    data = replace(config.data, vocab_size=512, seq_len=32, global_batch_size=4)
    optim, trainer = replace(config.optim, warmup_steps=4), replace(config.trainer, max_steps=30)
    return replace(config, model=model, data=data, optim=optim, trainer=trainer)
