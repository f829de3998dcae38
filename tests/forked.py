"""Where processes of tests come from: a server that has imported everything, from which they are forked at no cost."""

import multiprocessing
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "datasets",
        "inrank_dist.commands.train",
        "inrank_dist.train.loop",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
        "deepspeed",
        "faults",
        "runs",
    ]
)
